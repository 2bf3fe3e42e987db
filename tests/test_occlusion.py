"What is too heavy or too odd for 05_occlusion: large networks, many classes, odd shapes, somebody's autocast, masks."
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pcam_tp.classifier import Classifier, class_score, evaluating
from pcam_tp.models import build, small_cnn
from pcam_tp.occlusion import _RandomMasks, occlusion, paint_windows, rise, window_starts
from pcam_tp.questions import baseline

X = torch.rand(3, 3, 96, 96, generator=torch.Generator().manual_seed(0))
close = lambda a, b, tol=1e-5: torch.testing.assert_close(a, b, rtol=tol, atol=tol*float(b.abs().max()))


def by_hand(model, x, target, window, stride, kind, score='log_odds'):
    "Maps by loops over images, windows and pixels' counts."
    maps, b, t = torch.zeros(len(x), *x.shape[2:]), baseline(x, kind), torch.as_tensor(target).expand(len(x))
    with evaluating(model), torch.no_grad():
        for n in range(len(x)):
            ask = lambda image: class_score(model(image[None]).float(), t[n:n + 1], score)[0]
            count, before = torch.zeros(x.shape[2:]), ask(x[n])
            for r in window_starts(x.shape[2:], window, stride)[0]:
                for c in window_starts(x.shape[2:], window, stride)[1]:
                    place, hidden = (slice(r, r + window[0]), slice(c, c + window[1])), x[n].clone()
                    hidden[:, place[0], place[1]] = b[n][:, place[0], place[1]]
                    maps[n][place] += before - ask(hidden); count[place] += 1
            maps[n] /= count
    return maps


@pytest.mark.parametrize('name', ['resnet18', 'densenet121', 'convnext_tiny', 'vit_b_16', 'inception_v3'])
def test_every_kind_of_network(name):
    model = build(name, n_classes=3)
    maps, info = occlusion(model, X[:1], window=48, stride=48, details=True)
    assert maps.shape == (1, 96, 96) and maps.dtype == torch.float32 and maps.isfinite().all() and maps.any()
    assert info['drops'].shape == (1, 2, 2)
    expected = by_hand(model, X[:1], info['target'], (48, 48), 48, 'white')
    torch.testing.assert_close(maps, expected, rtol=1e-3, atol=1e-3*float(expected.abs().max()) + 1e-5)   # logits of size 1
    assert all(m.training for m in model.modules()) and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize('kind', ['black', 'blur', 'noise', X[0, :, :80, :75]])
@pytest.mark.parametrize('score', ['log_odds', 'logit', 'probability'])
def test_odd_shapes_and_many_classes(kind, score):
    "Neither side, nor window, nor stride, nor the number of classes divides anything."
    model, x = build('small_cnn', n_classes=5, width=.1), X[..., :80, :75]
    options = dict(window=(30, 33), stride=(17, 20), baseline=kind, score=score)
    expected = by_hand(model, x, torch.tensor([4, 0, 2]), (30, 33), (17, 20), kind, score)
    close(occlusion(model, x, [4, 0, 2], batch_size=7, **options), expected, 1e-3)


def test_a_map_does_not_depend_on_its_batch():
    model, x = build('small_cnn', width=.1), torch.cat([X, X.flip(3)])[..., :80, :]
    for kind in ('noise', 'mean', x.flip(0)):
        one = lambda i: kind[i:i + 1] if torch.is_tensor(kind) else kind
        options = dict(window=32, stride=16, seed=3)
        alone = torch.cat([occlusion(model, x[i:i + 1], 1, baseline=one(i), **options) for i in range(len(x))])
        for size in (1, 4, 100): close(occlusion(model, x, 1, baseline=kind, batch_size=size, **options), alone, 1e-3)


@pytest.mark.parametrize('name', ['occlusion', 'rise'])
def test_somebody_elses_autocast(name):
    "Drops and painting stay in 32 bits; the network too, unless asked."
    model = build('small_cnn', width=.1)
    method = dict(occlusion=occlusion.using(window=32, stride=16), rise=rise.using(n_masks=30))[name]
    plain, half = method(model, X, 1), method(model, X, 1, precision='bf16')
    with torch.autocast(X.device.type, torch.bfloat16): close(method(model, X, 1), plain)
    assert half.dtype == torch.float32 and not torch.equal(half, plain)
    assert (half - plain).abs().max() < .2*plain.abs().max() + 1e-2


def test_painting_is_exact_for_equal_values():
    for shape, window, stride in (((96, 96), 16, 8), ((41, 97), (7, 13), (5, 13)), ((5, 5), 5, 5), ((9, 9), 1, 1)):
        r, c = map(len, window_starts(shape, window, stride))
        close(paint_windows(torch.ones(2, r, c), shape, window, stride), torch.ones(2, *shape), 1e-6)


@pytest.mark.parametrize('cells', [1, 6, 7, 100])
@pytest.mark.parametrize('shape', [(96, 96), (50, 75), (224, 224)])
def test_masks_are_the_published_ones(cells, shape):
    "A stretched grid, cut out at its shift; one cell, cells that do not divide the side, cells of one pixel."
    masks = _RandomMasks(20, cells, .3, shape, 5, X.device)
    sides = [(cells + 1)*(-(-n//cells)) for n in shape]
    full = F.interpolate(masks.grids[:, None], sides, mode='bilinear', align_corners=False)[:, 0]
    cut = torch.stack([m[a:a + shape[0], b:b + shape[1]] for m, a, b in zip(full, *(s.tolist() for s in masks.shifts))])
    torch.testing.assert_close(masks[torch.arange(20)], cut, rtol=0, atol=1e-6)
    torch.testing.assert_close(masks[torch.tensor([11, 3])], cut[[11, 3]], rtol=0, atol=1e-6)


@pytest.mark.parametrize('kind', ['white', 'blur', X.flip(0)])
def test_rise_is_its_loop(kind):
    "Each image by itself, mask by mask."
    model, b, expected = build('small_cnn', n_classes=3, width=.1), baseline(X, kind), torch.zeros(3, 96, 96)
    masks = _RandomMasks(40, 4, .4, (96, 96), 2, X.device)[torch.arange(40)]
    with evaluating(model), torch.no_grad():
        for n in range(3):
            z = torch.stack([model((X[n]*m + b[n]*(1 - m))[None])[0] for m in masks])
            s = class_score(z, torch.full((40,), n))
            for v, m in zip(s, masks): expected[n] += (v - s.mean())*m/(40*.4)
    found = rise(model, X, [0, 1, 2], n_masks=40, cells=4, p=.4, baseline=kind, seed=2, batch_size=7)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize('options, said', [
    (dict(window=(16, 97)), r'window is \(16, 97\)'), (dict(window=8, stride=(8, 9)), 'never be hidden'),
    (dict(stride=0), 'stride is 0'), (dict(window='16'), "window is '16'"),
    (dict(baseline=['white', 'black']), 'only integrated'),
    (dict(score='odds'), 'score'), (dict(precision='int8'), 'precision'), (dict(batch_size=0), 'batch_size')])
def test_errors_name_the_argument(options, said):
    with pytest.raises(ValueError, match=said): occlusion(build('small_cnn', width=.1), X, **options)


@pytest.mark.parametrize('x', [X[0], X.numpy(force=True), (255*X).byte(), X[:, :1], X[:0]])
def test_errors_name_x(x):
    with pytest.raises(ValueError, match='x is '): occlusion(build('small_cnn', width=.1), x)
