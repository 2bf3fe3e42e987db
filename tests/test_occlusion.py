"""What a student runs past in 05_occlusion: known answers, captum, large networks, many classes, odd shapes, masks."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conftest import settled
from pcam_tp.classifier import Classifier, class_score, evaluating
from pcam_tp.data import Split, open_splits, subset
from pcam_tp.maps import centre_mask, rank_correlation
from pcam_tp.models import build, small_cnn
from pcam_tp.occlusion import _RandomMasks, occlusion, paint_windows, rise, tumour_patches, window_starts
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


# Where windows lie, and how they are painted

def test_window_starts():
    "Every stride, and once more flush with a border that would be left over."
    assert window_starts((96, 96)) == ([*range(0, 81, 8)],)*2
    assert window_starts((50, 96), window=(20, 32), stride=(12, 32)) == ([0, 12, 24, 30], [0, 32, 64])
    assert (occlusion.passes(), occlusion.passes(window=24, stride=12)) == (122, 50)


@pytest.mark.parametrize('bad', [0, 8., (16,), (4, -1), None, 97])
def test_windows_that_do_not_fit(bad):
    with pytest.raises(ValueError, match='window is'): window_starts((96, 96), bad)


def test_painting_is_fold():
    "PyTorch adds up overlapping blocks; a mean divides by how many there are."
    values = torch.randn(3, 9, 5)
    blocks = lambda v: F.fold(v.flatten(1)[:, None].expand(-1, 12*10, -1), (60, 34), (12, 10), stride=6)[:, 0]
    torch.testing.assert_close(paint_windows(values, (60, 34), (12, 10), 6), blocks(values)/blocks(torch.ones_like(values)))
    with pytest.raises(ValueError, match=r'\(N, 11, 11\)'): paint_windows(values, (96, 96))


# Known answers

def linear():
    net = nn.Sequential(nn.Flatten(), nn.Linear(3*96*96, 2))
    return Classifier(net, mean=(0, 0, 0), std=(1, 1, 1))


class Spots(nn.Module):
    "Logits (0, z), where z combines the mean brightness of 8×8 spots by 'mean', 'amax' or 'amin'."
    def __init__(self, *corners, combine='mean'):
        super().__init__()
        self.corners, self.combine, self.weight = corners, combine, nn.Parameter(torch.ones(()))
    def forward(self, x):
        spots = torch.stack([x[:, :, r:r + 8, c:c + 8].mean((1, 2, 3)) for r, c in self.corners], 1)
        z = self.weight*getattr(spots, self.combine)(1)
        return torch.stack([0*z, z], 1)


def reads(*corners, **options): return Classifier(Spots(*corners, **options), mean=(0, 0, 0), std=(1, 1, 1))


def test_drops_of_a_linear_network_are_sums():
    "Of w·(x − b) inside the window; those of tiles add up to the drop of hiding everything."
    model, b = linear(), baseline(X, 'blur')
    w = model.net[1].weight.detach().view(2, 3, 96, 96)
    credit = ((w[1] - w[0])*(X - b)).sum(1, keepdim=True)
    found = occlusion(model, X, 1, baseline='blur', details=True)[1]['drops']
    torch.testing.assert_close(found, 256*F.avg_pool2d(credit, 16, 8)[:, 0], rtol=0, atol=1e-4)
    tiles = occlusion(model, X, 1, baseline='blur', stride=16, details=True)[1]
    at_once = tiles['score'] - class_score(model(b), torch.ones(3, dtype=torch.long)).detach()
    torch.testing.assert_close(tiles['drops'].sum((1, 2)), at_once, rtol=0, atol=1e-3)   # 37 scores near 1


def test_one_spot():
    "Above 0 wherever a window touches it, 0 elsewhere, and centred on it."
    m = occlusion(reads((44, 20)), torch.ones(1, 3, 96, 96), 1, baseline='black')[0]
    touched = torch.zeros(96, 96, dtype=torch.bool)
    touched[32:64, 8:40] = True
    assert (m[touched] > .01).all()
    torch.testing.assert_close(m[~touched], torch.zeros(96*96 - 32*32), rtol=0, atol=1e-6)
    at = torch.arange(96, dtype=torch.float32)
    torch.testing.assert_close(torch.stack([m.sum(1) @ at, m.sum(0) @ at])/m.sum(), torch.tensor([47.5, 23.5]))


@pytest.mark.parametrize('combine, expected', [('amax', (0., 0.)), ('amin', (1., 1.)), ('mean', (.5, .5))])
def test_two_spots(combine, expected):
    model = reads((16, 16), (72, 72), combine=combine)
    d = occlusion(model, torch.ones(1, 3, 96, 96), 1, baseline='black', details=True)[1]['drops'][0]
    torch.testing.assert_close(torch.stack([d[2, 2], d[9, 9]]), torch.tensor(expected))


def test_a_crop_of_images_that_are_not_square():
    model = build('small_cnn', width=.1, geometry=dict(crop=64)).requires_grad_(False)
    maps = occlusion(model, X[..., :88], window=20, stride=12)   # the crop is rows 16–79 and columns 12–75
    assert maps.shape == (3, 96, 88) and maps[:, 16:80, 12:76].any()
    assert maps.count_nonzero() == maps[:, 16:80, 12:76].count_nonzero()


# captum

def of_captum(model, x, target, window=16, stride=8):
    from captum.attr import Occlusion
    shapes = dict(sliding_window_shapes=(3, window, window), strides=(3, stride, stride))
    with torch.no_grad(), evaluating(model):
        maps = Occlusion(model).attribute(x, target=target, baselines=baseline(x), perturbations_per_eval=8, **shapes)
    return maps.mean(1).float()


@pytest.mark.parametrize('name', ['small_cnn', 'resnet18'])
def test_captum_agrees(name):
    model, target = settled(build(name, **dict(width=.2) if name == 'small_cnn' else {})), torch.tensor([0, 1, 1])
    ours = occlusion(model, X, target, window=24, stride=12, score='logit')
    theirs = of_captum(model, X, target, 24, 12)
    assert (ours - theirs).norm() < 1e-3*theirs.norm() and rank_correlation(ours, theirs).min() > .999


def test_captum_cuts_the_last_window():
    "It hangs over the border there; ours is moved back until it fits. Before it, at pixel 76, the maps are equal."
    model = linear()
    ours, theirs = occlusion(model, X, 1, window=20, stride=12, score='logit'), of_captum(model, X, 1, 20, 12)
    torch.testing.assert_close(ours[:, :76, :76], theirs[:, :76, :76], rtol=0, atol=1e-4)
    assert (ours - theirs)[:, 76:].abs().max() > 1e-3


# RISE

def test_masks_favour_no_place():
    masks = _RandomMasks(400, 6, .5, (90, 96), 0, X.device)[torch.arange(400)]
    assert abs(masks.mean().item() - .5) < .02 and masks.mean(0).std() < .05


def spline(d):
    "The cubic B-spline: the overlap of two bilinear weights under a random shift, d cells apart."
    d = d.abs()
    return torch.where(d < 1, 2/3 - d**2 + d**3/2, (2 - d).clamp(min=0)**3/6)


def test_rise_of_one_spot():
    "The covariance of two mask values, the pixel's and the spot's, divided by p: (1 − p)·B(rows)·B(columns)."
    at = torch.arange(96, dtype=torch.float32)
    line = lambda first: spline((at[:, None] - torch.arange(first, first + 8))/16).mean(1)   # the spot has 8 pixels
    found = rise(reads((28, 60)), torch.ones(1, 3, 96, 96), 1, baseline='black', n_masks=4000)[0]
    expected = .5*line(28)[:, None]*line(60)
    torch.testing.assert_close(found, expected, rtol=0, atol=.05)
    assert (found - expected).square().mean().sqrt() < .015


def test_rise_of_a_constant_score_is_zero():
    nothing = rise(reads((28, 60)), torch.ones(1, 3, 96, 96), 1, n_masks=50)   # white on white
    torch.testing.assert_close(nothing, torch.zeros_like(nothing), rtol=0, atol=1e-5)


@pytest.mark.parametrize('options, said', [
    (dict(n_masks=1), 'n_masks is 1'), (dict(n_masks=2.5), 'n_masks is 2.5'), (dict(cells=0), 'cells is 0'),
    (dict(p=1.), 'p is 1.0'), (dict(p='half'), "p is 'half'"), (dict(baseline='grey'), 'white, black')])
def test_errors_of_rise(options, said):
    with pytest.raises(ValueError, match=said): rise(build('small_cnn', width=.1), X, **options)


# Which patches a lab asks about

class Always(nn.Module):
    "Says tumour, whatever it sees."
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
    def forward(self, x): return torch.stack([0*x.mean((1, 2, 3)), 5*self.weight + 0*x.mean((1, 2, 3))], 1)


def test_tumour_patches(monkeypatch):
    "In turn from every slide, with the region where it is known and does not fill the patch; else the centre box."
    split, model = subset(open_splits()[1], 100), Classifier(Always())
    found = tumour_patches(model, split, 8)
    assert found.x.shape == (8, 3, 96, 96) and len(set(found.by)) == min(8, len(set(split.slides[split.y == 1])))
    assert torch.equal(found.where, found.masks) and (found.masks.float().mean((1, 2)) < .9).all()
    patches = torch.from_numpy(split.patches(split.y == 1)).permute(0, 3, 1, 2)/255
    assert all((patches.cpu() - x.cpu()).abs().amax((1, 2, 3)).min() < 1e-6 for x in found.x)
    monkeypatch.setattr(Split, 'masks', lambda self, index: None)
    monkeypatch.setattr(Split, 'slides', None)
    plain = tumour_patches(model, split, 8)
    assert plain.masks is None and plain.by is None and torch.equal(plain.where, centre_mask())
