"What 07_lime cannot show: parity, many classes, other shapes, a transformer, flat images, networks of others, no waiting for a device."
import itertools
import math

import captum.attr
import numpy as np
import pytest
import torch
from torch import nn

from pcam_tp.classifier import Classifier, class_score, predict
from pcam_tp.models import build
from pcam_tp.questions import BASELINES, Question
from pcam_tp.superpixels import (SEGMENTATIONS, _ask, _coalitions, cosine_kernel, kernelshap, lime, lime_masks, paint, segments,
                                 weighted_ridge)

X = torch.rand(3, 3, 48, 72, generator=torch.Generator().manual_seed(0))
BLOCKS = (torch.arange(48)[:, None]//24*3 + torch.arange(72)//24).expand(3, -1, -1)   # six blocks of 24×24
METHODS = [lime, kernelshap]


class Areas(nn.Module):
    "Five logits: class c is the mean brightness of block c, times c + 1."
    def __init__(self):
        super().__init__(); self.factor = nn.Parameter(torch.arange(1., 6))
    def forward(self, x):
        means = nn.functional.avg_pool2d(x.mean(1, keepdim=True), 24).flatten(1)
        return means[:, :5]*self.factor


def areas(): return Classifier(Areas(), classes=tuple('abcde'), mean=(0, 0, 0), std=(1, 1, 1))


@pytest.mark.parametrize('f', METHODS)
def test_many_classes_and_other_shapes(f):
    options = dict(n_samples=64, segmentation=BLOCKS, baseline='black', score='logit', details=True) | (dict(alpha=1e-6) if f is lime else {})
    for target in (None, 3, [0, 2, 4]):
        maps, info = f(areas(), X, target, **options)
        assert maps.shape == X.shape[:1] + X.shape[2:] and maps.dtype == torch.float32 and len(info['weights']) == 3
        t = predict(areas(), X).argmax(1).to(X.device) if target is None else torch.as_tensor(target).expand(3)
        assert torch.equal(info['target'], t)
        for w, c, x in zip(info['weights'], t, X):   # the block of the class, and nothing else, has all of the logit
            truth = torch.zeros(6)
            truth[c] = (c + 1)*x[:, BLOCKS[0] == c].mean()
            torch.testing.assert_close(w, truth, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('f', METHODS)
def test_map_does_not_depend_on_the_batch(f):
    model = build('small_cnn', width=.1, n_classes=5)
    maps, info = f(model, X, n_samples=50, details=True)
    assert len({len(w) for w in info['weights']}) >= 1 and torch.equal(paint(info['weights'], info['segments']), maps)
    for batch_size in (1, 2, 7, 60, 1000): torch.testing.assert_close(f(model, X, n_samples=50, batch_size=batch_size), maps, rtol=1e-4, atol=1e-5)
    for i in range(3): torch.testing.assert_close(f(model, X[i:i + 1], n_samples=50), maps[i:i + 1], rtol=1e-4, atol=1e-5)
    given = f(model, X, n_samples=50, segmentation=info['segments'], batch_size=2)
    torch.testing.assert_close(given, maps, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('f', METHODS)
def test_whatever_hides(f):
    model = build('small_cnn', width=.1)
    images = X.flip(0)
    for option in (dict(hide='superpixel'), *(dict(baseline=b) for b in (*BASELINES, .5, torch.tensor([.8, .6, .8]), images[0], images))):
        maps, info = f(model, X, 1, n_samples=20, batch_size=2, details=True, **option)
        assert maps.isfinite().all()
        if f is kernelshap:
            gain = class_score(predict(model, X).to(X.device), torch.ones(3, dtype=torch.long)) - info['intercept']
            torch.testing.assert_close(torch.stack([w.sum() for w in info['weights']]), gain, rtol=1e-3, atol=1e-4)
    alone = f(model, X[2:], 1, n_samples=20, baseline=images[2])[0]
    torch.testing.assert_close(f(model, X, 1, n_samples=20, baseline=images)[2], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('f', METHODS)
def test_transformer(f):
    x = torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(1))
    n = 20 if f is lime else 6
    maps, info = f(build('vit_b_16'), x, n_samples=n, batch_size=10, details=True)
    assert maps.shape == (1, 96, 96) and maps.isfinite().all() and info['passes'][0] <= n


@pytest.mark.parametrize('f', METHODS)
def test_images_without_structure(f):
    "One superpixel: hidden by its own colour nothing changes, so the map is zero; hidden white it has one weight."
    grey, model = torch.full((2, 3, 48, 48), .5), build('small_cnn', width=.1)
    assert segments(grey, 'felzenszwalb').max() == 0
    maps, info = f(model, grey, 1, segmentation='felzenszwalb', n_samples=30, hide='superpixel', details=True)
    assert maps.abs().max() < 1e-5 and info['r2'].isnan().all() and (info['passes'] <= 2).all()
    white, info = f(model, grey, 1, segmentation='felzenszwalb', n_samples=30, details=True)
    torch.testing.assert_close(white, white[:1, :1, :1].expand_as(white))
    assert white.abs().max() > 0 and len(info['weights'][0]) == 1
    for method in SEGMENTATIONS: assert f(model, grey, 1, segmentation=method, n_samples=20).isfinite().all()


def test_quickshift_is_that_of_lime():
    from lime.wrappers.scikit_image import SegmentationAlgorithm
    theirs = SegmentationAlgorithm('quickshift', kernel_size=4, max_dist=200, ratio=.2, random_seed=5)(X[0].permute(1, 2, 0).numpy(force=True))
    assert np.array_equal(segments(X[:1], 'quickshift')[0].numpy(force=True), np.unique(theirs, return_inverse=True)[1].reshape(48, 72))


def test_hide_color_and_masks_are_those_of_lime():
    import lime.lime_image as lime_image
    lime_image.tqdm = lambda it: it
    model, labels = build('small_cnn', width=.1), segments(X[:1])
    def classifier(batch): return predict(model, torch.from_numpy(batch).permute(0, 3, 1, 2).float()).softmax(1).double().numpy(force=True)
    for option, color in ((dict(hide='superpixel'), None), (dict(baseline='black'), 0)):
        exp = lime_image.LimeImageExplainer(random_state=11).explain_instance(X[0].permute(1, 2, 0).numpy(force=True), classifier, labels=(1,), top_labels=None,
                                                                               num_samples=150, hide_color=color, segmentation_fn=lambda _: labels[0].numpy(force=True))
        w, info = lime(model, X[:1], 1, segmentation=labels, n_samples=150, seed=11, score='probability', details=True, **option)
        theirs = np.array([v for _, v in sorted(exp.local_exp[1])])
        assert np.abs(info['weights'][0].numpy(force=True) - theirs).max() < 1e-4*np.abs(theirs).max() + 1e-8
        assert abs(info['intercept'][0] - exp.intercept[1]) < 1e-5 and abs(info['r2'][0] - exp.score) < 1e-3


def test_coalitions():
    for S in range(1, 8):
        z, w = _coalitions(S, 128, 0)
        assert len(z) == 2**S == len(np.unique(z, axis=0)) and z[0].all() and not z[1].any()
        for k in range(1, S): assert np.isclose(w[z.sum(1) == k].sum(), (S - 1)/(k*(S - k)))   # the kernel's weight of a size
    for S, n in ((1, 10), (4, 16), (36, 200)):
        z, w = _coalitions(S, n, 0)
        assert len(z) == len(w) <= n and abs(z[2:].mean() - .5 if len(z) > 2 else 0) < 1e-9   # each with its complement
    z, w = _coalitions(40, 2000, 3)
    assert len(z) <= 2000 and (z[2:].sum(1) > 0).all() and (z[2:].sum(1) < 40).all()
    expected = 1/(np.arange(1, 40)*(40 - np.arange(1, 40)))
    found = np.bincount(z[2:].sum(1), minlength=40)[1:]/len(z[2:])
    assert np.abs(found - expected/expected.sum()).max() < .03


def test_more_superpixels_than_samples():
    model = build('small_cnn', width=.1)
    labels = torch.arange(48*72).view(1, 48, 72)//48   # 72 rows of 48 pixels
    for f in METHODS:
        maps, info = f(model, X[:1], 1, segmentation=labels, n_samples=20, details=True)
        assert maps.isfinite().all() and len(info['weights'][0]) == 72
    assert lime_masks(72, 20).shape == (20, 72) and cosine_kernel(lime_masks(72, 20))[0] == 1
    assert np.isfinite(weighted_ridge(lime_masks(72, 20), np.arange(20.), np.ones(20), 0)[0]).all()


def test_labels_with_gaps_and_bad_input():
    model = build('small_cnn', width=.1)
    torch.testing.assert_close(lime(model, X, 1, segmentation=BLOCKS*7 + 3, n_samples=30), lime(model, X, 1, segmentation=BLOCKS, n_samples=30))
    for f in METHODS:
        for bad in (dict(segmentation=None), dict(segmentation=BLOCKS[:, :10]), dict(segmentation='quick'), dict(hide='grey'), dict(hide='black'), dict(baseline='grey'), dict(n_samples=1), dict(score='z')):
            with pytest.raises(ValueError): f(model, X, 1, **dict(n_samples=10) | bad)
        with pytest.raises(ValueError): f(model, 255*X, n_samples=10)


class Reads(nn.Module):
    "One logit, squeezed to (n,): what the network gets, flattened by `view`."
    def __init__(self, shape=(3, 48, 72)):
        super().__init__(); self.weight = nn.Parameter(torch.randn(int(np.prod(shape)), generator=torch.Generator().manual_seed(2)))
    def forward(self, x): return (x.view(x.size(0), -1) @ self.weight).squeeze()


@pytest.mark.parametrize('f', METHODS)
def test_one_logit_flattened_by_view(f):
    "The weights for one class are minus those for the other, and add up; also where the last batch has one image."
    model = Classifier(Reads(), mean=(0, 0, 0), std=(1, 1, 1))
    options = dict(n_samples=64, segmentation=BLOCKS, details=True, batch_size=7) | (dict(alpha=1e-6) if f is lime else {})
    one, zero = (f(model, X, c, **options)[1]['weights'] for c in (1, 0))
    effect = ((X - 1)*model.net.weight.detach().view(1, 3, 48, 72)).sum(1)
    for i in range(3):
        truth = torch.stack([effect[i][BLOCKS[i] == s].sum() for s in range(6)])
        torch.testing.assert_close(one[i], truth, rtol=1e-3, atol=1e-3*truth.abs().max().item())
        torch.testing.assert_close(one[i], -zero[i], rtol=1e-4, atol=1e-5*truth.abs().max().item())


@pytest.mark.parametrize('f', METHODS)
def test_options_are_refused_before_any_pass(f):
    model, passed = build('small_cnn', width=.1), []
    model.register_forward_hook(lambda *a: passed.append(1))
    for bad in (dict(n_samples=1), dict(segmentation='quick'), dict(hide='black'), dict(baseline='grey')):
        with pytest.raises(ValueError): f(model, X, 1, **bad)
    assert not passed


def test_one_segmentation_serves_its_own_images():
    "Groups of two take their share of the labels; a stale group would take the first two."
    model, labels = build('small_cnn', width=.1), torch.stack([BLOCKS[0], BLOCKS[0]//2, BLOCKS[0]//3])
    for size in (1, 2, 50):
        info = lime(model, X, 1, segmentation=labels, n_samples=20, batch_size=size, details=True)[1]
        assert [len(w) for w in info['weights']] == [6, 3, 2]


def test_nobody_waits_for_the_device(monkeypatch):
    "Between the first pass and the last one, no tensor of the device is read."
    model, reads, passes = build('small_cnn', width=.1), [], []
    model.register_forward_hook(lambda *a: passes.append(len(reads)))
    for name in ('cpu', 'item', 'tolist', 'numpy'):
        usual = getattr(torch.Tensor, name)
        def spy(t, *a, usual=usual, name=name, **k):
            if t.is_floating_point(): reads.append(name)   # scores and images; labels and masks never leave the processor
            return usual(t, *a, **k)
        monkeypatch.setattr(torch.Tensor, name, spy)
    q = Question(model, X, 1, batch_size=8)
    passes.clear()
    lime.on(q, n_samples=20, segmentation=BLOCKS)
    assert len(passes) > 6 and len(set(passes)) == 1, 'the scores of one image were read before the next was asked'


def test_superpixels_are_numbered_without_gaps():
    smooth = nn.functional.interpolate(X[:, :, ::8, ::8], scale_factor=8, mode='bicubic').clamp(0, 1)
    for method in SEGMENTATIONS:
        for l in segments(smooth, method): assert l.unique().tolist() == list(range(int(l.max()) + 1))
    as_bytes = (smooth.permute(0, 2, 3, 1)*255).round().byte().numpy(force=True)
    assert torch.equal(segments(torch.from_numpy(as_bytes).permute(0, 3, 1, 2)/255.), segments(as_bytes))


@pytest.mark.parametrize('call, said', [
    (lambda: segments((X - .7)/.2), 'undo the normalisation'), (lambda: segments(X, 'watershed'), 'slic, quickshift, felzenszwalb'),
    (lambda: segments(X, 'slic', k=3), 'n_segments')])
def test_segments_says_what_is_wrong(call, said):
    with pytest.raises(ValueError, match=said): call()


def test_paint():
    toy = torch.tensor([[[0, 0, 1], [2, 2, 1]]])
    assert paint([[.5, -1, 3]], toy)[0].tolist() == [[.5, .5, -1], [3, 3, -1]]
    with pytest.raises(ValueError, match=r'expected \(3,\)'): paint([[.5, -1]], toy)
    with pytest.raises(ValueError, match='one for each'): paint([], toy)


@pytest.mark.parametrize('alpha', [1e-6, 1., 30.])
def test_ridge_is_that_of_scikit_learn(alpha):
    from sklearn.linear_model import Ridge
    rng = np.random.default_rng(0)
    masks = lime_masks(20, 150)
    y, w = masks @ rng.normal(size=20) + rng.normal(size=150), cosine_kernel(masks)
    b, b0, r2 = weighted_ridge(masks, y, w, alpha)
    theirs = Ridge(alpha=alpha).fit(masks, y, sample_weight=w)
    assert np.abs(b - theirs.coef_).max() < 1e-8 and abs(b0 - theirs.intercept_) < 1e-8
    assert abs(r2 - theirs.score(masks, y, sample_weight=w)) < 1e-8


def test_kernel_and_masks():
    "The full picture weighs 1 and most; one long run answers for all shorter ones; a fair coin."
    masks = lime_masks(36, 1000)
    kernel = cosine_kernel(masks)
    assert masks[0].all() and kernel[0] == 1 and (kernel[1:] < 1).all() and abs(masks[1:].mean() - .5) < .01
    assert np.allclose(cosine_kernel([[1]*4, [1, 1, 0, 0], [1, 0, 0, 0]]), [1, math.exp(-8*(1 - .5**.5)**2), math.exp(-2)])
    assert np.array_equal(lime_masks(7, 50, seed=3), lime_masks(7, 800, seed=3)[:50])


class Additive(nn.Module):
    "Logits (0, w·x)."
    def __init__(self, w):
        super().__init__(); self.w = nn.Parameter(w)
    def forward(self, x): return torch.stack([0*x.sum((1, 2, 3)), (x*self.w).sum((1, 2, 3))], 1)


@pytest.mark.parametrize('f', METHODS)
def test_a_sum_over_superpixels_is_found_exactly(f):
    "From sampled masks too: hiding a superpixel takes away the same, whatever else is visible."
    w = torch.randn(3, 48, 72, generator=torch.Generator().manual_seed(0))
    model, cut = Classifier(Additive(w), mean=(0, 0, 0), std=(1, 1, 1)), segments(X, n_segments=12, sigma=3)
    assert cut.max() > 6   # more than 64 masks
    own = dict(alpha=1e-6) if f is lime else {}
    info = f(model, X, 1, segmentation=cut, n_samples=100, details=True, **own)[1]
    effect = (w*(X - 1)).sum(1).cpu()
    for found, l, e in zip(info['weights'], cut.cpu(), effect):
        truth = torch.bincount(l.flatten(), e.flatten().double())
        torch.testing.assert_close(found.cpu().double(), truth, rtol=0, atol=2e-3*truth.abs().max().item())
    torch.testing.assert_close(info['r2'], torch.ones(3), rtol=0, atol=1e-4)


@pytest.mark.parametrize('f', METHODS)
def test_a_score_that_never_changes_has_no_reasons(f):
    maps, info = f(Classifier(Additive(torch.zeros(3, 48, 72))), X, 1, n_samples=50, details=True)
    assert maps.abs().max() == 0 and info['r2'].isnan().all()


def test_no_r2_of_rounding():
    "Scores that differ in the last bits of 32 do not vary; a hundred times as much does."
    masks, noise = lime_masks(6, 50), np.random.default_rng(0).normal(size=50)
    r2 = lambda size: weighted_ridge(masks, 5 + size*noise, cosine_kernel(masks))[2]
    assert np.isnan(r2(1e-6)) and np.isfinite(r2(1e-4))


def test_fewer_passes_where_masks_are_equal():
    model = build('small_cnn', width=.1)
    info = lime(model, X, 1, segmentation=BLOCKS, n_samples=500, details=True)[1]
    assert (info['passes'] == len(np.unique(lime_masks(6, 500), axis=0))).all() and info['passes'][0] <= 64


def test_shapley_by_definition_and_by_captum():
    "All orders of four quarters: the definition, captum's enumeration, and our regression."
    model, S = build('small_cnn', width=.5), 4
    quarters = ((torch.arange(48)[:, None] >= 24)*2 + (torch.arange(72) >= 36)*1)[None]
    masks = np.array(list(itertools.product([False, True], repeat=S)))
    scores, back = _ask(Question(model, X[:1], 1), slice(0, 1), quarters.cpu(), torch.ones_like(X[:1]), [masks])
    value = {tuple(np.flatnonzero(z)): s for z, s in zip(masks, scores[0].double().cpu().numpy()[back[0]])}
    exact = np.zeros(S)
    for s in range(S):
        for k in range(S):
            for A in itertools.combinations([t for t in range(S) if t != s], k):
                share = math.factorial(k)*math.factorial(S - k - 1)/math.factorial(S)
                exact[s] += share*(value[tuple(sorted((*A, s)))] - value[A])
    info = kernelshap(model, X[:1], 1, segmentation=quarters, n_samples=16, details=True)[1]
    near = dict(rtol=1e-3, atol=1e-4*max(1, np.abs(list(value.values())).max()))
    torch.testing.assert_close(info['weights'][0].cpu().double(), torch.from_numpy(exact).cpu(), **near)
    assert info['passes'][0] == 16 and abs(info['intercept'][0] - value[()]) < 1e-3
    def net(v): return class_score(predict(model, v).to(v.device), torch.ones(len(v), dtype=torch.long))
    theirs = captum.attr.ShapleyValues(net).attribute(X[:1], baselines=1., feature_mask=quarters[:, None])[0, 0].cpu()
    torch.testing.assert_close(paint([exact], quarters.cpu())[0].cpu(), theirs.float(), **near)


def test_preprocessing_twice_explains_another_network():
    "No error, other weights: a wrapper that normalises what the network normalises again divides them by its std."
    w = torch.randn(3, 48, 72, generator=torch.Generator().manual_seed(0))
    class Twice(nn.Module):
        def __init__(self, model): super().__init__(); self.model = model
        def forward(self, x): return self.model((x - .5)/.2)
    right = Classifier(Additive(w), mean=(0, 0, 0), std=(1, 1, 1))
    once, twice = (kernelshap(m, X, 1, segmentation=BLOCKS, n_samples=64) for m in
                   (right, Classifier(Twice(right), mean=(0, 0, 0), std=(1, 1, 1))))
    torch.testing.assert_close(twice, 5*once, rtol=1e-3, atol=1e-3*twice.abs().max().item())
    assert ((predict(Classifier(Twice(right), mean=(0, 0, 0), std=(1, 1, 1)), X) - predict(right, X)).abs() > 1).any()


@pytest.mark.parametrize('wrong, said', [
    (dict(n_samples=1), 'n_samples is 1'), (dict(segmentation='watershed'), 'slic, quickshift'),
    (dict(segmentation=BLOCKS[:1]), r'\(3, 48, 72\)'), (dict(hide='grey'), "'superpixel'"), (dict(baseline='grey'), 'white, black')])
@pytest.mark.parametrize('f', METHODS)
def test_options_say_what_is_wrong(f, wrong, said):
    with pytest.raises(ValueError, match=said): f(build('small_cnn', width=.1), X, 1, **dict(n_samples=10) | wrong)


def test_more_that_is_refused():
    model = build('small_cnn', width=.1)
    for wrong, said in ((dict(kernel_width=0), 'kernel_width'), (dict(alpha=-1), 'alpha')):
        with pytest.raises(ValueError, match=said): lime(model, X, 1, **wrong)
    for f in METHODS:
        with pytest.raises(ValueError, match=r'x\[None\]'): f(model, X[0], 1)


@pytest.mark.parametrize('f', METHODS)
def test_another_seed_is_another_map_inside_the_crop(f):
    model = build('small_cnn', width=.1, geometry=dict(crop=32)).requires_grad_(False)
    a, b = f(model, X, 1, n_samples=40), f(model, X, 1, n_samples=40, seed=1)
    torch.testing.assert_close(a, f(model, X, 1, n_samples=40), rtol=1e-3, atol=1e-5)
    assert a[:, :8].abs().max() == 0 and (a - b).abs().max() > 1e-3*a.abs().max() > 0
