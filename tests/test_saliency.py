"What 04_saliency cannot show on two networks: every architecture, many classes, odd shapes, a pass that breaks."
import copy

import pytest
import torch
from torch import nn

from pcam_tp.models import MODELS, Classifier, OneLogit, build, small_cnn
from pcam_tp.saliency import guided_backprop, input_x_gradient, saliency, smoothgrad

X = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
RELU = ['small_cnn', 'resnet18', 'resnet50', 'densenet121', 'alexnet', 'vgg11']
OTHERS = ['vit_b_16', 'efficientnet_b0', 'inception_v3', 'convnext_tiny']
ALL = [saliency, input_x_gradient, lambda *a, **k: smoothgrad(*a, n_samples=3, **k)]
hooks = lambda model: sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) + len(m._backward_pre_hooks) for m in model.modules())
close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5*float(b.abs().max()))


def settled(model, x=X):
    "Running statistics of a batch: without them untrained networks with batch normalisation answer next to nothing."
    model.eval()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d): m.train().momentum = None
    with torch.no_grad(): model(x)
    return model.eval()


@pytest.mark.parametrize('name', RELU + OTHERS)
def test_every_architecture(name):
    model = settled(build(name)).train()
    modes = [m.training for m in model.modules()]
    maps, info = smoothgrad(model, X[:1], n_samples=2, details=True)
    for v in (maps, saliency(model, X[:1]), input_x_gradient(model, X[:1])):
        assert v.shape == (1, 96, 96) and v.dtype == torch.float32 and v.isfinite().all() and (v != 0).float().mean() > .9, name
    assert (info['squared_gradient']*(1 + 1e-4) >= info['gradient']**2).all(), 'a mean of squares is at least the square of the mean'
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
    model = settled(Classifier(OneLogit(small_cnn(n_classes=1, width=.2))))
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
    model.register_parameter('unused', nn.Parameter(torch.zeros(1)))
    ramp = torch.linspace(0, 1, 3*64*64).view(1, 3, 64, 64)
    smoothgrad(model, torch.cat([ramp, .5*ramp + .2, torch.full_like(ramp, .4)]), 0, n_samples=2, noise=.2, seed=5)
    copies = seen[-1]
    e = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(5))
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


@pytest.mark.parametrize('f', ALL + [guided_backprop])
def test_bfloat16_is_near(f):
    model = settled(build('small_cnn', width=.3))
    a, b = (f(model, X, 1, precision=p) for p in ('fp32', 'bf16'))
    assert torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1] > .95 and not torch.equal(a, b)
