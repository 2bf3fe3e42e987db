"""What 04_saliency leaves out: known answers, parity with the field's libraries, every architecture, many classes, odd
shapes, no trace, a pass that breaks. And what holds for CAMs as well: whatever a network returns, however it flattens,
in two threads, in double precision."""
import copy, threading
from types import SimpleNamespace

import pytest
import torch
from captum.attr import NoiseTunnel, Saliency
from torch import nn

from conftest import settled
from pcam_tp.cam import CAMS
from pcam_tp.classifier import Classifier, class_score, predict
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


# ---------------------------------------------------------------- known answers

class Linear(nn.Module):
    "Logits (0, w·x): the log-odds of class 1 are w·x."
    def __init__(self, shape=(3, 8, 6)):
        super().__init__()
        self.w = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    def forward(self, x): return torch.stack([torch.zeros(len(x), device=x.device), (x*self.w).sum((1, 2, 3))], 1)

class Quadratic(Linear):
    def forward(self, x): return super().forward(x*x/2)

class Wrapped(nn.Module):
    "Another network around a trained one."
    def __init__(self, net, f): super().__init__(); self.net, self.f = net, f
    def forward(self, x): return self.f(self.net(x), x)

PLAIN = dict(mean=(0, 0, 0), std=(1, 1, 1))   # no normalisation: pixels as they are
TINY = torch.rand(5, 3, 8, 6, generator=torch.Generator().manual_seed(1))
off = lambda a, b: float((a - b).norm()/b.norm())   # a unit near its kink may open: two maps as a whole
wrapped = lambda model, f: Classifier(Wrapped(model, f), **PLAIN).eval()


def test_a_linear_network():
    "The slope is w whatever the image and the noise; Input × Gradient adds up to the score."
    linear = Classifier(Linear(), **PLAIN)
    w, ones = linear.net.w.detach(), torch.ones(5, dtype=torch.long)
    close(saliency(linear, TINY, 1), w.abs().amax(0).expand(5, -1, -1))
    close(saliency(linear, TINY, 1, channels='mean'), w.abs().mean(0).expand(5, -1, -1))
    close(saliency(linear, TINY, 0, channels='sum'), -w.sum(0).expand(5, -1, -1))
    ixg = input_x_gradient(linear, TINY, 1)
    close(ixg, (w*TINY).sum(1))
    close(ixg.sum((1, 2)), class_score(linear(TINY), ones).detach())
    maps, info = smoothgrad(linear, TINY, 1, noise=10., n_samples=3, details=True)
    close(maps, w.sum(0).expand(5, -1, -1))
    close(info['squared_gradient'], (w**2).expand(5, -1, -1, -1))
    close(smoothgrad(linear, TINY, 1, kind='smoothgrad_sq'), (w**2).sum(0).expand(5, -1, -1))
    assert smoothgrad(linear, TINY, 1, kind='vargrad').abs().max() < 1e-4*(w**2).max()


def test_a_quadratic_network():
    "The log-odds ½Σwx² have the gradient wx: noise e adds we, so the variance is w²·var(e), whatever the image."
    quadratic = Classifier(Quadratic(), **PLAIN)
    w = quadratic.net.w.detach()
    e = torch.randn(5, 3, 8, 6, generator=torch.Generator(quadratic.device).manual_seed(0), device=quadratic.device)
    spread = (TINY.amax((1, 2, 3)) - TINY.amin((1, 2, 3))).view(-1, 1, 1, 1)
    variance = (w*.2*spread)**2*e.var(0, correction=0)
    close(smoothgrad(quadratic, TINY, 1, n_samples=5, noise=.2, kind='vargrad'), variance.sum(1))
    close(smoothgrad(quadratic, TINY, 1, n_samples=5, noise=.2), (w*(TINY + .2*spread*e.mean(0))).sum(1))


def test_a_gradient_is_a_difference():
    "In double precision, at the steepest slope."
    model = settled(build('small_cnn', width=.2)).double()
    x, t = X[:1].double(), torch.tensor([1])
    slope = saliency(model, x, t, details=True)[1]['gradient'].double().flatten()
    at = slope.abs().argmax()
    step = 1e-5*nn.functional.one_hot(at, len(slope)).view_as(x)
    with torch.no_grad(): up, down = (class_score(model(x + s), t).item() for s in (step, -step))
    assert abs((up - down)/2e-5 - slope[at].item()) < 1e-3*abs(slope[at].item())


def test_noise_by_hand():
    "The mean of gradients of noisy copies; no noise is the gradient; the seed decides, batches do not."
    model, t = settled(build('small_cnn', width=.2)), torch.tensor([1, 0])
    e = torch.randn(4, 3, 96, 96, generator=torch.Generator(model.device).manual_seed(0), device=model.device)
    spread = (X.amax((1, 2, 3)) - X.amin((1, 2, 3))).view(-1, 1, 1, 1)
    def slope(x):
        x = x.requires_grad_()
        return torch.autograd.grad(class_score(model(x), t).sum(), x)[0]
    assert off(smoothgrad(model, X, t, n_samples=4), sum(slope(X + .15*spread*k) for k in e).sum(1)/4) < .01
    assert off(smoothgrad(model, X, t, n_samples=1, noise=0), saliency(model, X, t, channels='sum')) < .01
    assert off(smoothgrad(model, X[:1], 1, n_samples=5, batch_size=3), smoothgrad(model, X, 1, n_samples=5)[:1]) < .01
    a, b, c = (smoothgrad(model, X, 1, n_samples=2, seed=k) for k in (3, 3, 4))
    assert off(a, b) < 1e-3 and off(a, c) > .05


def test_smoothed_gradients():
    "Smoothing the signed gradient is SmoothGrad; the mean of |gradients| is never below the |mean|."
    model, twice = settled(build('small_cnn', width=.2)), dict(n_samples=4, seed=2)
    assert off(smoothed(saliency.using(channels='sum'))(model, X, 1, **twice), smoothgrad(model, X, 1, **twice)) < .01
    for c in ('max', 'mean'):
        of_maps, of_gradients = smoothed(saliency.using(channels=c))(model, X, 1, **twice), smoothgrad(model, X, 1, channels=c, **twice)
        assert (of_gradients - of_maps).relu().norm() < .01*of_gradients.norm() < .01*of_maps.norm()
    assert (smoothed(saliency).signed, smoothed(saliency, n_samples=7).passes()) == (False, 7)


# ---------------------------------------------------------------- which score

def test_a_common_term_in_both_logits():
    "It changes no probability and no map of log-odds or probability; it does change that of a logit."
    model = settled(build('small_cnn', width=.2))
    ring = torch.zeros(96, 96); ring[20:24] = .5
    other = wrapped(model, lambda z, x: z + (ring*(x - .6)).sum((1, 2, 3))[:, None])
    assert (other(X).softmax(1) - model(X).softmax(1)).abs().max() < 1e-3
    maps = lambda score: [saliency(m, X, 1, channels='sum', score=score) for m in (other, model)]
    assert off(*maps('log_odds')) < .01 and off(*maps('probability')) < .01 and off(*maps('logit')) > 1


def test_one_logit_of_two():
    "z = z₁ − z₀ is explained as the pair is; (0, z) has a logit that is constant, and its map is zero."
    model = settled(build('small_cnn', width=.2))
    one, zero = (wrapped(model, f) for f in (lambda z, x: z.diff(dim=1), lambda z, x: nn.functional.pad(z.diff(dim=1), (1, 0))))
    for c in (0, 1): assert off(saliency(one, X, c, channels='sum'), saliency(model, X, c, channels='sum')) < .01
    assert not saliency(zero, X, 0, score='logit').any() and saliency(zero, X, 1, score='logit').any()


def test_a_probability_saturates():
    "∇p = p(1 − p)·∇log-odds, and nothing at all where p rounds to 1; log-odds only get the factor."
    model = settled(build('small_cnn', width=.2))
    t = model(X).argmax(1)
    odds, of_p = (saliency(model, X, t, score=s) for s in ('log_odds', 'probability'))
    p = model(X).softmax(1).amax(1).detach()
    assert off(of_p, odds*(p*(1 - p)).view(-1, 1, 1)) < .01
    apart = lambda z: z - z.mean(1, keepdim=True)
    sure = wrapped(model, lambda z, x: 1e4*apart(z) + 1e3*apart(z).sign())
    assert off(saliency(sure, X, t), 1e4*odds) < .01 and not saliency(sure, X, t, score='probability').any()


# ---------------------------------------------------------------- the field's libraries

GRAINY = .95*X + .05*torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(3))


@pytest.mark.filterwarnings('ignore::UserWarning')
@pytest.mark.parametrize('name', ['small_cnn', 'resnet18'])
def test_the_same_as_captum(name):
    "A module whose column c is the log-odds of class c, and the same noisy copies on both sides."
    from captum.attr import GuidedBackprop, InputXGradient
    model, t = settled(build(name)), torch.tensor([1, 0])
    odds = Wrapped(model, lambda z, x: torch.stack([z[:, 0] - z[:, 1], z[:, 1] - z[:, 0]], 1))
    grad = lambda v: Saliency(odds).attribute(v.detach().requires_grad_(), t, abs=False)
    spread = (GRAINY.amax((1, 2, 3)) - GRAINY.amin((1, 2, 3))).view(-1, 1, 1, 1)
    e = torch.randn(3, 3, 96, 96, generator=torch.Generator(model.device).manual_seed(0), device=model.device)
    copies, x = torch.stack([grad(GRAINY + .15*spread*k) for k in e]), GRAINY.clone().requires_grad_()
    smooth = smoothgrad.using(n_samples=3)
    for f, theirs in ((saliency, Saliency(odds).attribute(x, t).amax(1)), (saliency.using(channels='sum'), grad(x).sum(1)),
                      (input_x_gradient, InputXGradient(odds).attribute(x, t).sum(1)), (smooth, copies.mean(0).sum(1)),
                      (smooth.using(kind='smoothgrad_sq'), copies.square().mean(0).sum(1)),
                      (guided_backprop, GuidedBackprop(odds).attribute(x, t).sum(1))):
        assert off(f(model, GRAINY, t), theirs.detach()) < .01 and theirs.any(), f.__name__


def test_guided_as_in_grad_cam():
    "grad-cam exchanges the ReLUs, one image at a time, and writes into `.grad`: it gets a copy."
    from pytorch_grad_cam import GuidedBackpropReLUModel
    model = settled(build('small_cnn', width=.3))
    theirs = GuidedBackpropReLUModel(copy.deepcopy(model), model.device)
    found = torch.stack([torch.as_tensor(theirs(GRAINY[i:i + 1].clone(), i).sum(-1)) for i in range(2)])
    assert off(guided_backprop(model, GRAINY, [0, 1], score='logit').cpu(), found.cpu()) < .01


# ---------------------------------------------------------------- no trace, and words

@every
def test_no_trace_in_a_network_that_learns(f):
    "Modes, requires_grad, grads, hooks and images stay, in `no_grad` and `inference_mode` too; 0 outside a crop."
    m = settled(build('small_cnn', width=.1, geometry=dict(crop=64))).train()
    m.net.conv1.eval(); m.net.conv2.requires_grad_(False)
    state = lambda: ([k.training for k in m.modules()], [(p.requires_grad, p.grad) for p in m.parameters()], hooks(m),
                     GRAINY._version, GRAINY.requires_grad)
    before, outside = state(), f(m, GRAINY, 1)
    with torch.no_grad(): assert off(f(m, GRAINY[:1], 1), outside[:1]) < .01
    with torch.inference_mode(): assert off(f(m, GRAINY, 1, batch_size=1), outside) < .01
    assert off(f(copy.deepcopy(m).requires_grad_(False), GRAINY, 1), outside) < .01
    assert not outside[:, :16].any() and outside.flatten(1).any(1).all()
    assert state() == before


def test_words_of_own_options():
    model = settled(build('small_cnn', width=.1))
    for f in (saliency, smoothgrad, guided_backprop):
        with pytest.raises(ValueError, match='max, mean, sum'): f(model, X, channels='rgb')
    for options, said in ((dict(n_samples=0), 'whole number'), (dict(n_samples=2.5), 'whole number'), (dict(noise=-.1), 'from 0 up'),
                          (dict(kind='squared'), 'smoothgrad_sq, vargrad')):
        with pytest.raises(ValueError, match=said): smoothgrad(model, X, **options)
    linear, passes = Classifier(Linear(), **PLAIN), []
    hook = linear.net.register_forward_hook(lambda m, i, out: passes.append(len(out)))
    with pytest.raises(ValueError, match='no nn.ReLU module, but no activation module'): guided_backprop(linear, TINY)
    hook.remove()
    assert not passes, 'before anything is computed'


def test_gradients_of_float16_weights_do_not_vanish():
    "A sure answer, p = .9999: of so small a gradient float16 keeps next to nothing, unless it is scaled."
    full = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(3*96*96, 2)))
    layer = full.net[1]
    with torch.no_grad():
        layer.weight /= 100
        layer.bias += torch.tensor([0., 9.2]) - full(X[:1])[0]
    half = Classifier(copy.deepcopy(full.net).half())
    a, b = (saliency(m, X[:1], 1, score='probability', channels='sum') for m in (full, half))
    assert (a - b).abs().mean()/a.abs().mean() < .05


def test_float32_is_not_rounded_on_cuda():
    "TF32 is off in both passes of precision 'fp32', for several threads at once, and as it was before afterwards."
    cudnn, matmul, seen = torch.backends.cudnn, torch.backends.cuda.matmul, []
    def look(*_): seen.append((cudnn.enabled, cudnn.allow_tf32, matmul.allow_tf32))
    class Looking(nn.Module):
        def forward(self, x):
            look()
            x = x.clone()
            if x.requires_grad: x.register_hook(look)
            return x.mean((2, 3))[:, :2]
    models, before = [Classifier(Looking()) for _ in range(3)], (cudnn.allow_tf32, torch.get_float32_matmul_precision())
    on = X.is_cuda
    try:
        cudnn.allow_tf32 = True
        torch.set_float32_matmul_precision('medium')
        for m in models: predict(m, X)   # the first question of all asks for one answer more
        seen.clear()
        threads = [threading.Thread(target=lambda m=m: [saliency(m, X, 1) for _ in range(5)]) for m in models]
        for t in threads: t.start()
        for t in threads: t.join()
        within = set(seen)
        seen.clear()
        saliency(models[0], X, 1, precision='bf16')
        assert set(seen) == {(True, True, True)}, 'nobody asked for 32 bits'
        look()
        after = seen[-1], torch.get_float32_matmul_precision()
    finally:
        cudnn.allow_tf32 = before[0]
        torch.set_float32_matmul_precision(before[1])
    assert within == {(True, not on, not on)} and after == ((True, True, True), 'medium')
