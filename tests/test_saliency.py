"""What 04_saliency cannot show on two networks: every architecture, many classes, odd shapes, a pass that breaks.
And what holds for CAMs as well: whatever a network returns, however it flattens, in two threads, in double precision."""
import copy, threading
from types import SimpleNamespace

import pytest
import torch
from captum.attr import NoiseTunnel, Saliency
from torch import nn

from conftest import settled
from pcam_tp.cam import CAMS
from pcam_tp.classifier import Classifier, class_score
from pcam_tp.models import MODELS, build, small_cnn
from pcam_tp.saliency import guided_backprop, input_x_gradient, saliency, smoothed, smoothgrad

X = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
RELU = ['small_cnn', 'resnet18', 'resnet50', 'densenet121', 'alexnet', 'vgg11']
OTHERS = ['vit_b_16', 'efficientnet_b0', 'inception_v3', 'convnext_tiny']
ALL = [saliency, input_x_gradient, smoothgrad.using(n_samples=3)]
BOTH = [*ALL, guided_backprop, smoothed(saliency, n_samples=2), *CAMS.values()]
every = pytest.mark.parametrize('f', BOTH, ids=lambda f: f.__name__)
hooks = lambda model: sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) + len(m._backward_pre_hooks) for m in model.modules())
close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5*float(b.abs().max()))


@pytest.mark.parametrize('name', RELU + OTHERS)
def test_every_architecture(name):
    model = settled(build(name)).train()
    modes = [m.training for m in model.modules()]
    maps, info = smoothgrad(model, X[:1], n_samples=2, details=True)
    for v in (maps, saliency(model, X[:1]), input_x_gradient(model, X[:1])):
        assert v.shape == (1, 96, 96) and v.dtype == torch.float32 and v.isfinite().all() and (v != 0).float().mean() > .9, name
    squared, error = info['squared_gradient'], 1e-6*info['squared_gradient'].max()   # where gradients nearly cancel
    assert (squared*(1 + 1e-4) + error >= info['gradient']**2).all(), 'a mean of squares is at least the square of the mean'
    if name in OTHERS:
        with pytest.raises(ValueError, match='no nn.ReLU module'): guided_backprop(model, X[:1])
    else:
        guided = guided_backprop(model, X[:1])
        assert guided.isfinite().all() and guided.any() and not torch.allclose(guided, saliency(model, X[:1], channels='sum'), rtol=1e-3)
    assert hooks(model) == 0 and modes == [m.training for m in model.modules()] and all(p.grad is None for p in model.parameters())


def test_the_tests_know_every_family(): assert {n.rstrip('0123456789') for n in RELU + OTHERS} == {n.rstrip('0123456789') for n in MODELS}


def test_many_classes_and_other_shapes():
    model, x = settled(build('small_cnn', n_classes=5, width=.2), X), torch.rand(3, 3, 70, 96, generator=torch.Generator().manual_seed(1))
    for f in ALL + [guided_backprop]:
        each = [f(model, x, c) for c in range(5)]
        assert each[0].shape == (3, 70, 96)
        close(f(model, x, [4, 0, 2]), torch.stack([each[4][0], each[0][1], each[2][2]]))
        assert f(model, x, details=True)[1]['target'].shape == (3,)


def test_one_logit_gives_opposite_maps():
    model = settled(Classifier(small_cnn(n_classes=1, width=.2)))
    for score in ('log_odds', 'logit', 'probability'):
        close(saliency(model, X, 0, channels='sum', score=score), -saliency(model, X, 1, channels='sum', score=score))
        close(saliency(model, X, 0, score=score), saliency(model, X, 1, score=score))
        close(smoothgrad(model, X, 0, n_samples=3, score=score), -smoothgrad(model, X, 1, n_samples=3, score=score))


def test_the_noise_follows_the_range_of_each_image():
    "A flat image gets no noise; noise on an image of half the range is half as large, and the range is the image's own, not the batch's."
    seen = []
    class Spy(nn.Module):
        def forward(self, x): seen.append(x.detach().clone()); return torch.stack([x.sum((1, 2, 3)), x.mean((1, 2, 3))], 1)
    model = Classifier(Spy(), mean=(0,)*3, std=(1,)*3)
    ramp = torch.linspace(0, 1, 3*64*64).view(1, 3, 64, 64)
    smoothgrad(model, torch.cat([ramp, .5*ramp + .2, torch.full_like(ramp, .4)]), 0, n_samples=2, noise=.2, seed=5)
    copies = seen[-1]
    e = torch.randn(2, 3, 64, 64, generator=torch.Generator(model.device).manual_seed(5), device=model.device)
    close(copies[:2] - ramp, .2*e)
    close(copies[2:4] - .5*ramp - .2, .1*e)
    assert (copies[4:] == torch.tensor(.4)).all()


def test_a_pass_that_breaks_leaves_nothing():
    class Broken(nn.Module):
        def __init__(self): super().__init__(); self.conv, self.relu, self.calls = nn.Conv2d(3, 2, 3), nn.ReLU(), 0
        def forward(self, x):
            out = self.relu(self.conv(x)).mean((2, 3))
            if out.requires_grad: raise RuntimeError('out of memory')
            return out
    model = Classifier(Broken()).train()
    for f in ALL + [guided_backprop]:
        with pytest.raises(RuntimeError, match='out of memory'): f(model, X)
        assert hooks(model) == 0 and all(m.training for m in model.modules()) and all(p.grad is None for p in model.parameters())


def test_a_network_in_training_is_explained_as_in_evaluation():
    model = build('small_cnn', width=.1, dropout=.5)
    for f in ALL + [guided_backprop]: close(f(model.train(), X, 1), f(copy.deepcopy(model).eval(), X, 1))


def test_grads_of_a_running_training_step_stay():
    model = build('small_cnn', width=.1).train()
    model(X).sum().backward()
    before = copy.deepcopy([p.grad for p in model.parameters()])
    for f in ALL + [guided_backprop]: f(model, X)
    assert all(torch.equal(a, p.grad) for a, p in zip(before, model.parameters()))


@every
def test_bfloat16_is_near(f):
    model = settled(build('small_cnn', width=.3))
    a, b = (f(model, X, 1, precision=p) for p in ('fp32', 'bf16'))
    assert torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1] > .95 and not torch.equal(a, b)


# ---------------------------------------------------------------- noise

@pytest.mark.parametrize('kind', ['smoothgrad', 'smoothgrad_sq', 'vargrad'])
def test_captum_noise_tunnel(kind):
    "captum's own noise, drawn from the processor's generator with the same seed, for one image."
    if X.device.type != 'cpu': pytest.skip('captum draws its noise on the device, we on the processor: other numbers')
    model = settled(build('small_cnn', width=.2, n_classes=3))
    x = X[:1] - .1*X[:1].amin()
    tunnel, spread = NoiseTunnel(Saliency(model)), (x.amax() - x.amin()).item()
    torch.manual_seed(4)
    theirs = tunnel.attribute(x.clone().requires_grad_(), nt_type=kind, nt_samples=6, stdevs=.2*spread, target=2, abs=False)
    ours = smoothgrad(model, x, 2, n_samples=6, noise=.2, kind=kind, seed=4, score='logit', batch_size=6)
    assert (ours - theirs.sum(1)).norm() < .01*ours.norm() and ours.norm() > 0
    signed = kind == 'smoothgrad'
    assert smoothgrad.using(kind=kind).signed == signed == bool((ours < 0).any())


def test_a_variance_is_not_negative():
    "Where the slope does not depend on the noise, the squares cancel but for rounding."
    model = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(3*96*96, 2)))
    assert smoothgrad(model, X, 1, kind='vargrad', noise=3.).min() >= 0


def test_any_explainer_can_be_smoothed():
    "The mean of maps by hand, with the same noise; the class is that of the image itself, and copies are not clamped."
    model, cam = settled(build('small_cnn', width=.2)), CAMS['layercam'].using(layer='conv2')
    x, target = torch.cat([X, X[:1]**3]), torch.tensor([1, 0, 1])
    e = torch.randn(3, 3, 96, 96, generator=torch.Generator(model.device).manual_seed(6), device=model.device)
    spread = (x.amax((1, 2, 3)) - x.amin((1, 2, 3))).view(-1, 1, 1, 1)
    def of_copy(k):
        noisy, kept = x + .3*spread*e[k], {}
        assert noisy.min() < -.1 and noisy.max() > 1.1
        hook = model.net.conv2.register_forward_hook(lambda m, i, out: kept.update(A=out))
        score = class_score(model(noisy), target); hook.remove()
        return model.to_pixels((kept['A']*torch.autograd.grad(score.sum(), kept['A'])[0].relu()).sum(1).detach(), (96, 96))
    right = sum(of_copy(k) for k in range(3))/3
    f = smoothed(cam, n_samples=3, noise=.3)
    for size in (None, 2):
        maps, info = f(model, x, target, seed=6, details=True, batch_size=size)
        assert (maps - right).norm() < .01*right.norm() and info['target'].tolist() == [1, 0, 1]
    assert (f.passes(), f.using(n_samples=5).passes(), f.backward, f.__name__) == (3, 5, True, 'smoothed_layercam')
    for options, said in ((dict(n_samples=0), 'whole number'), (dict(noise=-1), 'from 0 up'), (dict(channels='sum'), 'no option channels')):
        with pytest.raises(ValueError, match=said): f(model, x, **options)
    with pytest.raises(ValueError, match='no nn.ReLU module'): smoothed(guided_backprop)(Classifier(nn.Sequential(nn.Flatten(), nn.Linear(27648, 2))), x)
    with pytest.raises(ValueError, match='values from'): f(model, x - 1)


# ---------------------------------------------------------------- the same for all methods of 03 and 04

class Says(nn.Module):
    "A small network that wraps its logits."
    def __init__(self, wrap, n_classes=2): super().__init__(); self.net, self.wrap = small_cnn(n_classes, width=.1), wrap
    def forward(self, x): return self.wrap(self.net(x))

def says(wrap, n_classes=2, seed=0, **options):
    torch.manual_seed(seed)
    return Classifier(Says(wrap, n_classes), layers='net.conv4', **options).eval()


@every
def test_whatever_a_network_returns(f):
    near = lambda a, b: (a - b).norm() < .01*b.norm()   # a unit near its kink may open
    x = torch.cat([X, X[:1]**2])
    right = f(says(lambda z: z), x, 1)
    for wrap, options in ((lambda z: (z, z.mean()), dict(output=0)), (lambda z: dict(logits=z), {}), (lambda z: SimpleNamespace(logits=z), {}),
                          (lambda z: z[..., None, None], {}), (lambda z: dict(out=z), dict(output='out'))):
        assert near(f(says(wrap, **options), x, 1), right)
    one = f(says(lambda z: z, 1), x, 1)
    for batch_size in (3, 2):   # a last batch of one
        assert near(f(says(lambda z: z.squeeze(), 1), x, 1, batch_size=batch_size), one)
    assert one.isfinite().all() and one.any()
    for wrap in (lambda z: (z, z), lambda z: dict(a=z), lambda z: z.argmax(1), lambda z: z.mean()):
        with pytest.raises(ValueError, match='the network (returns|gives)'): f(says(wrap), x, 1)


@every
def test_targets_are_classes_of_these_images(f):
    model, x = says(lambda z: z), X.repeat(2, 1, 1, 1)
    for target, said in (([0, 1], 'each of the 4 images'), ([0, 1]*3, 'each of the 4 images'), (torch.rand(4), 'whole numbers'), (1.7, 'whole numbers'),
                         (2, 'classes 0 to 1'), (-1, 'classes 0 to 1'), ([True, False]*2, 'whole numbers')):
        with pytest.raises(ValueError, match=said): f(model, x, target, batch_size=2)


@every
def test_two_threads_explain_one_network(f):
    model = says(lambda z: z).train()
    serial, found = [f(model, X[i:i + 1], i) for i in range(2)], {}
    def work(i):
        for k in range(4): found[i, k] = f(model, X[i:i + 1], i)
    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert len(found) == 8, 'a thread died'
    for (i, k), maps in found.items(): close(maps, serial[i])
    assert model.training and all(m.training for m in model.modules()) and hooks(model) == 0


class Hooked(nn.Module):
    "Keeps its activation and hooks its gradient in `forward`, as public tutorials do."
    def __init__(self): super().__init__(); self.features, self.head = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), nn.Linear(4, 2)
    def forward(self, x):
        self.kept = self.features(x)
        self.kept.register_hook(lambda g: setattr(self, 'gradient', g))
        return self.head(self.kept.mean((2, 3)))


@every
def test_hooks_in_forward(f):
    torch.manual_seed(0); hooked = Hooked()
    plain = nn.Sequential(hooked.features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), hooked.head)
    right = f(Classifier(plain, layers='0'), X)
    close(f(Classifier(hooked, layers='features'), X), right)


@every
def test_networks_that_flatten_with_view(f):
    class View(nn.Module):
        def __init__(self): super().__init__(); self.features, self.head = small_cnn(width=.1)[:6], nn.Linear(26*24*24, 2)
        def forward(self, x): z = self.features(x); return self.head(z.view(z.size(0), -1))
    torch.manual_seed(0); view = View()
    flat = nn.Sequential(view.features, nn.Flatten(), view.head)
    close(f(Classifier(view, layers='features'), X), f(Classifier(flat, layers='0'), X))


@every
def test_double_precision(f):
    single = settled(build('small_cnn', width=.1))
    right = f(single, X, 1)
    double = copy.deepcopy(single).double()
    near = lambda a, b: (a - b).norm() < .01*b.norm()   # a unit near its kink may open
    for model, x in ((single, X.double()), (double, X), (double, X.double())):
        maps = f(model, x, 1)
        assert maps.dtype == torch.float32 and near(maps, right)
    torch.set_default_dtype(torch.float64)
    try: assert near(f(single, X, 1), right)
    finally: torch.set_default_dtype(torch.float32)


@every
def test_words_that_help(f):
    model = says(lambda z: z)
    for x, options, said in ((X[:0], {}, 'N > 0'), (X[0], {}, r'x\[None\]'), (255*X, {}, 'Divide bytes by 255'), (X - .5, {}, 'values from'), (X*float('nan'), {}, 'nan'),
                             (X, dict(batch_size=0), 'at least 1'), (X, dict(score='sigmoid'), 'log_odds'), (X, dict(precision='int8'), 'fp32')):
        with pytest.raises(ValueError, match=said): f(model, x, **options)
    with pytest.raises(ValueError, match='wrap it, Classifier'): f(model.net, X)
