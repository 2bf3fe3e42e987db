"What 07_lime cannot show: many classes, other shapes, a transformer, images without structure, the library's own segmentation."
import numpy as np
import pytest
import torch
from torch import nn

from pcam_tp.models import Classifier, build, class_score, predict
from pcam_tp.passes import BASELINES
from pcam_tp.superpixels import SEGMENTATIONS, _coalitions, cosine_kernel, kernelshap, lime, lime_masks, paint, segments, weighted_ridge

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
    options = dict(n_samples=64, segmentation=BLOCKS, hide='black', score='logit', details=True) | (dict(alpha=1e-6) if f is lime else {})
    for target in (None, 3, [0, 2, 4]):
        maps, info = f(areas(), X, target, **options)
        assert maps.shape == X.shape[:1] + X.shape[2:] and maps.dtype == torch.float32 and len(info['weights']) == 3
        t = predict(areas(), X).argmax(1) if target is None else torch.as_tensor(target).expand(3)
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
    for batch_size in (1, 2, 7): torch.testing.assert_close(f(model, X, n_samples=50, batch_size=batch_size), maps, rtol=1e-4, atol=1e-5)
    for i in range(3): torch.testing.assert_close(f(model, X[i:i + 1], n_samples=50), maps[i:i + 1], rtol=1e-4, atol=1e-5)
    given = f(model, X, n_samples=50, segmentation=info['segments'], batch_size=2, hide='superpixel')
    torch.testing.assert_close(given, maps, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('f', METHODS)
def test_every_hide(f):
    model = build('small_cnn', width=.1)
    images = X.flip(0)
    for hide in ('superpixel', *BASELINES, torch.tensor([.8, .6, .8]), images[0], images):
        maps, info = f(model, X, 1, n_samples=20, batch_size=2, hide=hide, details=True)
        assert maps.isfinite().all()
        if f is kernelshap:
            gain = class_score(predict(model, X), torch.ones(3, dtype=torch.long)) - info['intercept']
            torch.testing.assert_close(torch.stack([w.sum() for w in info['weights']]), gain, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(f(model, X, 1, n_samples=20, hide=images)[2], f(model, X[2:], 1, n_samples=20, hide=images[2])[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('f', METHODS)
def test_transformer(f):
    x = torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(1))
    n = 20 if f is lime else 6
    maps, info = f(build('vit_b_16'), x, n_samples=n, batch_size=10, details=True)
    assert maps.shape == (1, 96, 96) and maps.isfinite().all() and info['passes'][0] <= n


@pytest.mark.parametrize('f', METHODS)
def test_images_without_structure(f):
    "One superpixel: hidden by its own colour nothing changes, so the map is zero; hidden black it has one weight."
    grey, model = torch.full((2, 3, 48, 48), .5), build('small_cnn', width=.1)
    assert segments(grey, 'felzenszwalb').max() == 0
    maps, info = f(model, grey, 1, segmentation='felzenszwalb', n_samples=30, details=True)
    assert maps.abs().max() < 1e-5 and info['r2'].isnan().all() and (info['passes'] <= 2).all()
    black, info = f(model, grey, 1, segmentation='felzenszwalb', n_samples=30, hide='black', details=True)
    assert (black == black[0, 0, 0]).all() and len(info['weights'][0]) == 1
    for method in SEGMENTATIONS: assert f(model, grey, 1, segmentation=method, n_samples=20).isfinite().all()


def test_quickshift_is_that_of_lime():
    from lime.wrappers.scikit_image import SegmentationAlgorithm
    theirs = SegmentationAlgorithm('quickshift', kernel_size=4, max_dist=200, ratio=.2, random_seed=5)(X[0].permute(1, 2, 0).numpy())
    assert np.array_equal(segments(X[:1], 'quickshift')[0].numpy(), np.unique(theirs, return_inverse=True)[1].reshape(48, 72))


def test_hide_color_and_masks_are_those_of_lime():
    import lime.lime_image as lime_image
    lime_image.tqdm = lambda it: it
    model, labels = build('small_cnn', width=.1), segments(X[:1])
    def classifier(batch): return predict(model, torch.from_numpy(batch).permute(0, 3, 1, 2).float()).softmax(1).double().numpy()
    for hide, color in (('superpixel', None), ('black', 0)):
        exp = lime_image.LimeImageExplainer(random_state=11).explain_instance(X[0].permute(1, 2, 0).numpy(), classifier, labels=(1,), top_labels=None,
                                                                               num_samples=150, hide_color=color, segmentation_fn=lambda _: labels[0].numpy())
        w, info = lime(model, X[:1], 1, segmentation=labels, hide=hide, n_samples=150, seed=11, score='probability', details=True)
        theirs = np.array([v for _, v in sorted(exp.local_exp[1])])
        assert np.abs(info['weights'][0].numpy() - theirs).max() < 1e-4*np.abs(theirs).max() + 1e-8
        assert abs(info['intercept'][0] - exp.intercept[1]) < 1e-5


def test_coalitions():
    for S in range(1, 8):
        z, w = _coalitions(S, 128, 0)
        assert len(z) == 2**S == len(np.unique(z, axis=0)) and z[0].all() and not z[1].any()
        for k in range(1, S): assert np.isclose(w[z.sum(1) == k].sum(), (S - 1)/(k*(S - k)))   # the kernel's weight of a size
    z, w = _coalitions(40, 2000, 3)
    assert len(z) <= 2000 and (z[2:].sum(1) > 0).all() and (z[2:].sum(1) < 40).all()
    expected = 1/(np.arange(1, 40)*(40 - np.arange(1, 40)))
    found = np.bincount(z[2:].sum(1), minlength=40)[1:]/len(z[2:])
    assert np.abs(found - expected/expected.sum()).max() < .03


def test_more_superpixels_than_samples():
    model = build('small_cnn', width=.1)
    labels = torch.arange(48*72).view(1, 48, 72)//48   # 72 rows of 48 pixels
    for f in METHODS:
        maps, info = f(model, X[:1], 1, segmentation=labels, hide='black', n_samples=20, details=True)
        assert maps.isfinite().all() and len(info['weights'][0]) == 72
    assert lime_masks(72, 20).shape == (20, 72) and cosine_kernel(lime_masks(72, 20))[0] == 1
    assert np.isfinite(weighted_ridge(lime_masks(72, 20), np.arange(20.), np.ones(20), 0)[0]).all()


def test_labels_with_gaps_and_bad_input():
    model = build('small_cnn', width=.1)
    torch.testing.assert_close(lime(model, X, 1, segmentation=BLOCKS*7 + 3, n_samples=30), lime(model, X, 1, segmentation=BLOCKS, n_samples=30))
    for f in METHODS:
        for bad in (dict(segmentation=None), dict(segmentation=BLOCKS[:, :10]), dict(segmentation='quick'), dict(hide='grey'), dict(n_samples=1), dict(score='z')):
            with pytest.raises(ValueError): f(model, X, 1, **dict(n_samples=10) | bad)
        with pytest.raises(ValueError): f(model, 255*X, n_samples=10)
