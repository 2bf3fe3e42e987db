"""What a student runs past in 06_integrated_gradients: known answers, captum, many networks, classes and shapes,
baselines of every form."""
import numpy as np
import pytest
import torch
from torch.testing import assert_close

from conftest import settled
from pcam_tp.classifier import Classifier, class_score, evaluating, predict
from pcam_tp.integrated_gradients import PATH_RULES, integrated_gradients, path_rule
from pcam_tp.maps import rank_correlation
from pcam_tp.models import build
from pcam_tp.questions import baseline

SOME = torch.Generator().manual_seed(0)
X = torch.rand(3, 3, 96, 96, generator=SOME)


def adds_up(model, x, maps, info, target, baselines=('white',), share=.1):
    "The details are what the model says, and the map adds up to them."
    score = lambda v: class_score(predict(model, v), target.cpu()).to(x.device)
    torch.testing.assert_close(info['score'], score(x), rtol=1e-4, atol=1e-5)
    first = torch.stack([score(baseline(x, b)) for b in baselines]).mean(0)
    torch.testing.assert_close(info['baseline_score'], first, rtol=1e-4, atol=1e-5)
    total = maps.sum((1, 2)) - info['delta']
    torch.testing.assert_close(total, info['score'] - info['baseline_score'], rtol=1e-3, atol=1e-4)
    difference = (info['score'] - info['baseline_score']).abs()
    if share: assert (info['delta'].abs() <= share*difference + 1e-3).all(), info['delta']


@pytest.mark.parametrize('name', ['vit_b_16', 'inception_v3', 'resnet18'])
def test_networks(name):
    model, x = settled(build(name)), X[:1]
    maps, info = integrated_gradients(model, x, 1, n_steps=2, details=True, batch_size=2)
    assert maps.shape == (1, 96, 96) and maps.dtype == torch.float32 and maps.isfinite().all() and maps.abs().max() > 0
    one = torch.ones(1, dtype=torch.long)
    adds_up(model, x, maps, info, one, share=None)   # two steps of an untrained network promise nothing


@pytest.mark.parametrize('shape', [(72, 101), (40, 33)])
@pytest.mark.parametrize('k', [2, 5])
def test_classes_and_shapes(shape, k):
    model, x = build('small_cnn', n_classes=k, width=.2), torch.rand(4, 3, *shape, generator=SOME)
    target = torch.tensor([0, k - 1, 1, 0])
    for method in PATH_RULES:
        maps, info = integrated_gradients(model, x, target, n_steps=40, method=method, batch_size=7, details=True)
        assert maps.shape == (4, *shape) and torch.equal(info['target'], target)
        adds_up(model, x, maps, info, target)


def test_every_form_of_baseline():
    "Words, a colour, an image, images, and lists of them, in any groups; noise is the same for all images."
    model, target = build('small_cnn', width=.1), torch.tensor([1, 0, 1])
    others = torch.rand(3, 3, 96, 96, generator=SOME)
    kinds = ['black', 'blur', 'mean', torch.tensor([.7, .5, .7]), others[0], others[:1], others]
    options = dict(n_steps=4, batch_size=2)   # two groups: images 0, 1 and image 2
    single = [integrated_gradients(model, X, target, baseline=b, **options) for b in kinds]
    together, info = integrated_gradients(model, X, target, baseline=tuple(kinds), details=True, **options)
    torch.testing.assert_close(together, torch.stack(single).mean(0), rtol=1e-4, atol=1e-6)
    adds_up(model, X, together, info, target, kinds, share=1)
    torch.testing.assert_close(single[4], single[5])
    for n in range(3):
        alone = integrated_gradients(model, X[n:n + 1], target[n:n + 1], baseline=others[n:n + 1], **options)
        torch.testing.assert_close(single[-1][n:n + 1], alone, rtol=1e-4, atol=1e-6)
    last = lambda i, seed: integrated_gradients(model, X[i:], 1, baseline='noise', seed=seed, **options)[-1]
    noise = [last(0, 3), last(2, 3), last(2, 4)]
    torch.testing.assert_close(noise[0], noise[1], rtol=1e-4, atol=1e-6)
    assert (noise[1] - noise[2]).abs().max() > 1e-5


def test_two_noises_are_two():
    model = build('small_cnn', width=.1)
    one, two = (integrated_gradients(model, X[:1], 1, baseline=b, n_steps=2) for b in ('noise', ['noise', 'noise']))
    assert (one - two).abs().max() > 1e-5


def test_a_baseline_with_a_graph_or_from_inference_mode():
    model = build('small_cnn', width=.1)
    plain = X[1].clone()
    with torch.inference_mode(): inference = X[1].clone()
    kinds = plain, plain.clone().requires_grad_(), inference
    maps = [integrated_gradients(model, X[:1], 1, baseline=b, n_steps=2) for b in kinds]
    for m in maps[1:]: torch.testing.assert_close(m, maps[0], rtol=1e-4, atol=1e-6)
    assert not maps[1].requires_grad


def test_crop_and_resize():
    "Outside the crop nothing was seen, and nothing is credited; an enlarged image still adds up."
    net = build('small_cnn', width=.2).net
    model = Classifier(net, crop=40, size=48)
    maps, info = integrated_gradients(model, X, [1, 1, 0], n_steps=40, details=True)
    outside = torch.ones(96, 96, dtype=torch.bool)
    outside[28:68, 28:68] = False
    assert (maps[:, outside] == 0).all() and (maps[:, ~outside] != 0).float().mean() > .9
    adds_up(model, X, maps, info, torch.tensor([1, 1, 0]))


def test_bf16_is_close():
    model = build('small_cnn', width=.2)
    a, b = (integrated_gradients(model, X, 1, n_steps=10, precision=p) for p in ('fp32', 'bf16'))
    assert torch.nn.functional.cosine_similarity(a.flatten(1), b.flatten(1)).min() > .8 and b.dtype == torch.float32


@pytest.mark.parametrize('n', [1, 2, 5, 20])
def test_rules(n):
    "The degrees to which each rule is exact."
    for method, degree in (('gausslegendre', 2*n - 1), ('midpoint', 1)):
        a, w = path_rule(n, method)
        assert ((a > 0) & (a < 1)).all() and len(a) == len(w) == n
        for p in range(degree + 1): assert abs(w @ a**p - 1/(p + 1)) < 1e-12
        assert n == 20 or abs(w @ a**(degree + 1) - 1/(degree + 2)) > 1e-7


@pytest.mark.parametrize('options, says', [
    (dict(baseline=['white', torch.rand(2, 3, 96, 96)]), 'each of the 3 images'),
    (dict(baseline=['grey']), 'expected one of'),
    (dict(baseline=()), 'empty'), (dict(baseline=[]), 'empty'), (dict(n_steps=0), 'n_steps is 0'),
    (dict(n_steps=2.5), 'whole number'), (dict(method='trapezoid'), 'gausslegendre, midpoint'),
    (dict(baseline=X[0, :, :9]), 'shape'), (dict(n_steps=True), 'n_steps is True'), (dict(n_steps='50'), "n_steps is '50'"),
    (dict(n_steps=-1), 'n_steps is -1'), (dict(method='left'), 'midpoint'), (dict(score='loss'), 'log_odds')])
def test_bad_input(options, says):
    with pytest.raises(ValueError, match=says): integrated_gradients(build('small_cnn', width=.1), X, **options)


def test_a_list_of_numbers_and_arrays():
    "One number is one baseline; three numbers in a list are three, and a colour is an array."
    model = build('small_cnn', width=.1)
    maps = lambda b: integrated_gradients(model, X, 1, baseline=b, n_steps=2)
    torch.testing.assert_close(maps([0, np.ones(3), 'blur']), maps(['black', 'white', 'blur']), rtol=1e-4, atol=1e-6)
    found, right = maps([0, 1]), (maps(0) + maps(1))/2
    if found.is_cuda: assert (found - right).norm() < .02*right.norm()   # other batches: rounding turns a few ReLUs
    else: torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-6)


def test_passes_of_lists_and_details():
    model, seen = build('small_cnn', width=.1), []
    model.seen = bool(model(X[:1]).any())   # a network that was never asked is asked for one image first
    model.net.register_forward_hook(lambda m, i, out: seen.append(len(out)))
    for method in (integrated_gradients, integrated_gradients.using(baseline=['white', 'blur'])):
        several = dict(n_steps=2, baseline=['black', 'noise', 0])
        for options in (dict(n_steps=3), dict(n_steps=2, details=True), several):
            method(model, X, 1, **options)
            assert sum(seen) == 3*method.passes((96, 96), **options)
            seen.clear()


# Known answers

class Power(torch.nn.Module):
    "One logit, Σ w·xᵖ."
    def __init__(self, p, shape=(3, 6, 5)):
        super().__init__()
        self.p, self.w = p, torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    def forward(self, x): return (self.w*x**self.p).sum((1, 2, 3))


def power(p): return Classifier(Power(p), mean=(0., 0, 0), std=(1., 1, 1))
def weights(model): return model.net.w.detach()


TOY = torch.rand(4, 3, 6, 5, generator=torch.Generator().manual_seed(1))
EXACT = dict(rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('n', [1, 7])
@pytest.mark.parametrize('method', PATH_RULES)
def test_a_linear_network(method, n):
    "w·(x − b) for any number of steps and both rules; nothing is missing."
    model, b = power(1), torch.rand(3, 6, 5, generator=torch.Generator().manual_seed(2))
    m, d = integrated_gradients(model, TOY, 1, baseline=b, n_steps=n, method=method, details=True)
    assert_close(m, (weights(model)*(TOY - b)).sum(1), **EXACT)
    assert_close(d['delta'], torch.zeros_like(d['delta']), rtol=0, atol=1e-4)


@pytest.mark.parametrize('n', [1, 2, 10])
def test_quadratic_and_cubic_networks(n):
    "From black one midpoint is exact for the first; the second is off by 1/(4n²), and two points of Gauss are exact."
    quadratic, cubic = power(2), power(3)
    of = lambda model, **options: integrated_gradients(model, TOY, 1, baseline='black', **options)
    assert_close(of(quadratic, n_steps=n, method='midpoint'), (weights(quadratic)*TOY**2).sum(1), **EXACT)
    exact = (weights(cubic)*TOY**3).sum(1)
    assert_close(of(cubic, n_steps=n, method='midpoint'), exact*(1 - 1/(4*n**2)), **EXACT)
    if n > 1: assert_close(of(cubic, n_steps=n), exact, **EXACT)
    else: assert (of(cubic, n_steps=1) - exact).abs().max() > 1e-3


def test_the_image_itself_as_baseline():
    assert integrated_gradients(power(3), TOY, 1, baseline=TOY).abs().max() == 0


def test_the_loop():
    "A gradient at each middle, one after the other: the same credits, and the same that is missing."
    model, target, n = settled(build('small_cnn', width=.2)), torch.tensor([1, 0, 1]), 8
    b, total = torch.zeros_like(X), torch.zeros_like(X)
    for k in range(n):
        point = (b + (k + .5)/n*(X - b)).requires_grad_()
        total += torch.autograd.grad(class_score(model(point), target).sum(), point)[0]/n
    expected = (X - b)*total
    maps, info = integrated_gradients(model, X, target, baseline='black', n_steps=n, method='midpoint', details=True)
    off = lambda a, b: ((a - b).norm()/b.norm()).item()   # of all pixels: rounding turns a few ReLUs on or off
    assert off(info['attributions'], expected) < .005 and off(maps, expected.sum(1)) < .005


def test_blind_where_the_image_is_the_baseline():
    "White pixels get exactly nothing from white, whatever they do; from black they get something."
    model, x = settled(build('small_cnn', width=.2)), X.clone()
    x[..., 40:56, 40:56] = 1
    credit = lambda k: integrated_gradients(model, x, 1, baseline=k, n_steps=4)[:, 40:56, 40:56]
    assert credit('white').abs().max() == 0 and credit('black').abs().max() > 0


# captum

def of_captum(model, x, target, b, n, method):
    from captum.attr import IntegratedGradients
    def score(images, t): return class_score(model(images), t)
    with evaluating(model):
        ig = IntegratedGradients(score)
        return ig.attribute(x, b, additional_forward_args=(target,), n_steps=n, method=method).detach().float()


@pytest.mark.parametrize('n, ours, theirs', [(20, 'gausslegendre', 'gausslegendre'), (12, 'midpoint', 'riemann_middle')])
@pytest.mark.parametrize('name, options', [('small_cnn', dict(width=.2)), ('resnet18', {})])
def test_captum_agrees(name, options, n, ours, theirs):
    model, target, b = settled(build(name, **options)), torch.tensor([1, 0]), baseline(X[:2], 'blur')
    maps, d = integrated_gradients(model, X[:2], target, baseline=b, n_steps=n, method=ours, details=True)
    reference = of_captum(model, X[:2], target, b, n, theirs)
    assert (d['attributions'] - reference).norm() < 5e-3*reference.norm()
    assert rank_correlation(maps, reference.sum(1)).min() > .999


def test_captums_trapezoid_loses_credit():
    "Its weights sum to (n − 1)/n, so that a tenth is gone with 10 steps, of a linear network too."
    model, black = power(1), torch.zeros_like(TOY)
    lost = of_captum(model, TOY, torch.ones(4, dtype=torch.long), black, 10, 'riemann_trapezoid')
    share = lost.sum((1, 2, 3))/model.net(TOY).detach()
    assert_close(share, torch.full_like(share, .9), rtol=0, atol=1e-4)
