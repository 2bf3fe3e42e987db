"""What a student runs past in 09_faithfulness: known answers in the declared direction, plain loops, Quantus, ties, units,
many classes, wrapped outputs, crops, threads, side effects."""
import math
import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from conftest import settled
from pcam_tp.classifier import Classifier, evaluating, predict
from pcam_tp.controls import random_map
from pcam_tp.faithfulness import FAITHFULNESS, aopc, deletion, insertion, srg
from pcam_tp.measures import area, measure, squares
from pcam_tp.models import build, small_cnn
from pcam_tp.questions import baseline
from pcam_tp.saliency import saliency
from pcam_tp.superpixels import segments

X = torch.rand(3, 3, 24, 24, generator=torch.Generator().manual_seed(0))
MAPS = torch.randn(3, 24, 24, generator=torch.Generator().manual_seed(1))
NEAR = dict(rtol=1e-3, atol=1e-4)
every = pytest.mark.parametrize('name', FAITHFULNESS)
quick = dict(insertion=dict(steps=8), deletion=dict(steps=8), srg=dict(steps=8), aopc=dict(unit=6))


def plain(net): return Classifier(net, mean=(0, 0, 0), std=(1, 1, 1))


class Additive(nn.Module):
    "The logit of class 1 is the sum of w·x over the pixels, that of class 0 minus it."
    def __init__(self, w):
        super().__init__()
        self.w = nn.Parameter(w)
    def forward(self, x):
        s = (x*self.w).sum((1, 2, 3))
        return torch.stack([-s/2, s/2], 1)


def planted():
    "A bright 8×8 square decides: the network, three images, the square, the credit of each pixel."
    mask = torch.zeros(24, 24, dtype=torch.bool)
    mask[8:16, 8:16] = True
    model = plain(Additive(mask.float().expand(3, -1, -1)/64))
    x = .2*X + .8*mask
    return model, x, mask.expand(3, -1, -1), (x*mask).sum(1)


def convolution(n_classes=2):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 5, 2), nn.ReLU(), nn.Flatten(), nn.Linear(400, n_classes))
    return plain(net)


# Known answers, in the direction that the metric declares (break a sign, and these fail)

@every
@pytest.mark.parametrize('unit', [1, 4, 'superpixels'])
@pytest.mark.parametrize('kind', ['black', 'noise'])
def test_the_truth_beats_dice_and_dice_beat_its_inverse(name, unit, kind):
    model, x, mask, _ = planted()
    f = FAITHFULNESS[name]
    if unit == 'superpixels': unit = squares(4, 24, 24).expand(3, -1, -1) + 100   # regions whose numbers have a gap
    options = dict(score='log_odds', baseline=.1 if kind == 'black' else 'noise', unit=unit)
    truth, dice, inverse = (f(model, x, m, 1, **options) for m in (mask.float(), random_map, -mask.float()))
    sign = 1 if f.higher else -1
    assert (sign*(truth - dice) > 0).all() and (sign*(dice - inverse) > 0).all()


def test_curves_of_an_additive_network():
    "What has been hidden is missing, what has been shown is there; both ends; the trapezoidal rule."
    w = torch.randn(3, 24, 24, generator=torch.Generator().manual_seed(2))
    model, credit = plain(Additive(w)), (X*w).sum(1)
    v = credit.flatten(1).sort(1, descending=True).values
    total, first = v.sum(1, keepdim=True), torch.cat([0*v[:, :1], v.view(3, 16, 36).sum(2).cumsum(1)], 1)
    options = dict(steps=16, score='log_odds', baseline='black', details=True)
    (a, of_a), (b, of_b), (g, of_g) = (f(model, X, credit, 1, **options) for f in (insertion, deletion, srg))
    assert_close(of_a['curve'].cpu(), first.cpu(), **NEAR)
    assert_close(of_b['curve'].cpu(), (total - first).cpu(), **NEAR)
    assert_close(a, area(first).cpu(), **NEAR)
    assert_close(b, area(total - first).cpu(), **NEAR)
    assert_close(g, a - b, **NEAR)
    assert_close(of_g['insertion'], of_a['curve'], **NEAR)
    assert_close(of_g['deletion'], of_b['curve'], **NEAR)


@every
def test_a_constant_score(name):
    "The area below it is its value, nothing is gained, nothing falls."
    model = plain(Additive(torch.zeros(3, 24, 24)))
    expected = dict(insertion=.5, deletion=.5, srg=0., aopc=0.)[name]
    assert_close(FAITHFULNESS[name](model, X, MAPS, 1), torch.full((3,), expected).cpu())


def test_ends_are_the_image_and_the_baseline():
    model = convolution()
    for kind in ('white', 'blur', X.flip(0)):
        p = predict(model, X).softmax(1)[:, 1].cpu()
        b = predict(model, baseline(X, kind)).softmax(1)[:, 1].cpu()
        _, known = srg(model, X, MAPS, 1, steps=5, baseline=kind, details=True)
        for curve, ends in ((known['deletion'], (p, b)), (known['insertion'], (b, p))):
            for k, end in zip((0, -1), ends): assert_close(curve[:, k].cpu(), end, **NEAR)


def test_a_reversed_map_reads_the_curves_backwards():
    "del(S) from the right is ins(−S) with one baseline, so SRG changes its sign and no more."
    model = convolution()
    back = insertion(model, X, -MAPS, 1, steps=16, details=True)[1]['curve'].flip(1)
    assert_close(deletion(model, X, MAPS, 1, steps=16, details=True)[1]['curve'], back, **NEAR)
    assert_close(srg(model, X, MAPS, 1, steps=16), -srg(model, X, -MAPS, 1, steps=16), **NEAR)


@pytest.mark.parametrize('unit, steps', [(8, 4), (8, 2), (24, 5), (9, 50)])
def test_half_a_unit_is_rounded_alike(unit, steps):
    "What insertion shows at a share is what deletion leaves at the rest, for odd numbers of units too: chance stays 0."
    model = convolution()
    options = dict(unit=unit, steps=steps, details=True)
    back = insertion(model, X, -MAPS, 1, **options)[1]['curve'].flip(1)
    assert_close(deletion(model, X, MAPS, 1, **options)[1]['curve'], back, **NEAR)


def test_dice_gain_nothing():
    "On average over orders, for any network: chance of SRG is 0."
    model, x = convolution(), X[:1].expand(300, -1, -1, -1)
    found = srg(model, x, random_map, 1, steps=8)
    assert srg.chance == 0 and abs(found.mean()) < 4*found.std()/math.sqrt(300) and found.std() > 1e-4


def test_a_constant_map_is_in_random_order():
    "Not in raster order: over seeds its area is that of dice; the square in the middle is not found too late or early."
    model, x, _, credit = planted()
    found = torch.stack([deletion(model, x, torch.zeros_like(credit), 1, score='log_odds', baseline='black', seed=s)
                         for s in range(60)]).mean(0)
    full = predict(model, x)[:, 1].cpu()*2
    assert_close(found, full/2, rtol=.08, atol=0)


# Plain loops

def loop(model, x, m, target, steps, insert=False, colour=1.):
    "The RISE code's way, one image, batches of 1, the area as (Σ − half of both ends)/n."
    order, portion = m.flatten().argsort(descending=True), m.numel()//steps
    now, goal = (torch.full_like(x, colour), x) if insert else (x.clone(), torch.full_like(x, colour))
    scores = []
    with torch.no_grad(), evaluating(model):
        for k in range(steps + 1):
            scores.append(model(now[None]).softmax(1)[0, target].item())
            some = order[k*portion:(k + 1)*portion]
            now.view(3, -1)[:, some] = goal.reshape(3, -1)[:, some]
    s = np.array(scores)
    return (s.sum() - s[0]/2 - s[-1]/2)/steps


def thresholds(model, x, m, target, steps, colour=1.):
    "System T's loop in its right form: hide all pixels at or above a quantile of the map."
    scores = []
    levels = m.flatten().sort(descending=True).values
    with torch.no_grad(), evaluating(model):
        for k in range(steps + 1):
            n = k*m.numel()//steps
            hidden = m >= levels[n - 1] if n else torch.zeros_like(m, dtype=torch.bool)
            scores.append(model(torch.where(hidden, torch.full_like(x, colour), x)[None]).softmax(1)[0, target].item())
    return (sum(scores) - scores[0]/2 - scores[-1]/2)/steps


@pytest.mark.parametrize('target', [0, 1])
def test_plain_loops(target):
    model = convolution()
    rows = range(len(X))
    options = dict(target=target, steps=16)
    for f, insert in ((deletion, False), (insertion, True)):
        expected = torch.tensor([loop(model, X[i], MAPS[i], target, 16, insert) for i in rows]).float().cpu()
        assert_close(f(model, X, MAPS, batch_size=7, **options), expected, **NEAR)
    expected = torch.tensor([thresholds(model, X[i], MAPS[i], target, 16) for i in rows]).float().cpu()
    assert_close(deletion(model, X, MAPS, **options), expected, **NEAR)


def test_aopc_loop():
    "Samek's sum, region by region."
    model, expected = convolution(), []
    cells = squares(7, 24, 24).to(X.device)   # 16 regions, cut at the edges
    for x, m in zip(X, MAPS):
        means = torch.stack([m[cells == k].mean() for k in range(16)])
        now, drops = x.clone(), [0.]
        with torch.no_grad(), evaluating(model):
            p = lambda v: model(v[None]).softmax(1)[0, 1].item()
            for k in means.argsort(descending=True)[:10].tolist():
                now[:, cells == k] = 1.
                drops.append(p(x) - p(now))
        expected.append(sum(drops)/11)
    assert_close(aopc(model, X, MAPS, 1, unit=7, regions=10), torch.tensor(expected).float().cpu(), **NEAR)


# Quantus 0.6.0: numbers that it gave for this network, so that nobody needs it installed

def fixed():
    "A network, images and maps from formulas: 12×12 pixels, two images."
    at = torch.arange(2*3*12*12).float()
    x, m = ((at*7) % 17/16).view(2, 3, 12, 12), ((torch.arange(2*144).float()*37) % 151).view(2, 12, 12)
    w = torch.sin(torch.arange(3*12*12).float()).view(3, 12, 12)/4
    return plain(Additive(w)), x, m


QUANTUS = dict(   # PixelFlipping(features_in_step=36) and RegionPerturbation(patch_size=4, regions_evaluation=9), white
    flips=[[.748977, .697899, .704375, .746799, .645532, .707793, .765202, .769518, .751912, .734381, .728951, .585806],
           [.455571, .414159, .307689, .307837, .31347, .301356, .292159, .204694, .333676, .269042, .337314, .414193]],
    regions=[[.294724, -.250484, -.161149, .316574, .476642, .163662, -.242365, .172813, .0089],
             [.448104, .517588, .433517, .301403, .331855, .494769, .400432, .180154, .11646]])


def quantus_numbers():
    "What Quantus says; see QUANTUS."
    quantus = pytest.importorskip('quantus', reason='Quantus is no requirement; its numbers stand in QUANTUS')
    model, x, m = fixed()
    given = dict(model=model.cpu().eval(), x_batch=x.cpu().numpy(), y_batch=np.array([1, 0]), a_batch=m[:, None].cpu().numpy(),
                 channel_first=True, device='cpu')
    quiet = dict(disable_warnings=True, perturb_baseline='white')
    flips = quantus.PixelFlipping(features_in_step=3*12, **quiet)(**given)
    regions = quantus.RegionPerturbation(patch_size=4, order='morf', regions_evaluation=9, **quiet)(**given)
    return dict(flips=np.asarray(flips, float), regions=np.asarray(regions, float).reshape(2, -1))


def test_the_numbers_are_those_of_quantus():
    for k, v in quantus_numbers().items(): np.testing.assert_allclose(QUANTUS[k], v, atol=1e-5)


def test_pixel_flipping_of_quantus():
    "Its curve lacks the image itself; 36 channel-elements are 12 pixels."
    model, x, m = fixed()
    curve = deletion(model, x, m, [1, 0], steps=12, details=True)[1]['curve'].cpu()
    assert_close(curve[:, 1:], torch.as_tensor(QUANTUS['flips'], dtype=torch.float32).cpu(), **NEAR)


def test_region_perturbation_of_quantus():
    "It lists falls without that of k = 0; its direction tag says lower, though falls are better when higher."
    model, x, m = fixed()
    falls = torch.as_tensor(QUANTUS['regions'], dtype=torch.float32).cpu()
    found, info = aopc(model, x, m, [1, 0], unit=4, details=True)
    assert_close(info['curve'].cpu()[:, :1] - info['curve'].cpu()[:, 1:], falls, **NEAR)
    assert_close(found, falls.sum(1)/10, **NEAR)
    assert aopc.higher


# Units

def test_superpixels_of_each_image():
    "Images with different numbers of regions; AOPC is the mean over an image's own."
    model = convolution()
    cells = torch.stack([squares(s, 24, 24) for s in (4, 8, 12)]).to(X.device)   # 36, 9 and 4 regions
    for f, own in ((insertion, {}), (aopc, {})):
        at_once = f(model, X, MAPS, 1, unit=cells, batch_size=2, **own)
        alone = torch.cat([f(model, X[i:i + 1], MAPS[i:i + 1], 1, unit=s, **own) for i, s in enumerate((4, 8, 12))])
        assert_close(at_once, alone, **NEAR)
        assert_close(f(model, X, MAPS, 1, unit=cells.cpu().numpy(), **own), at_once, **NEAR)
    photos = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(3))
    cells = segments(photos.cpu(), n_segments=9)
    assert srg(build('small_cnn', width=.1), photos, random_map, 1, unit=cells, steps=4).isfinite().all()


def test_noise_is_drawn_again():
    "AOPC under noise is the mean over its draws; the first is the baseline of the seed; another baseline has one."
    model, options = convolution(), dict(unit=8, baseline='noise')
    first = aopc(model, X, MAPS, 1, unit=8, baseline=baseline(X, 'noise', 5)[0].cpu())
    assert_close(aopc(model, X, MAPS, 1, draws=1, seed=5, **options), first, **NEAR)
    four = aopc(model, X, MAPS, 1, draws=4, seed=5, **options)
    each = [aopc(model, X, MAPS, 1, draws=1, seed=5 + 1_000_003*d, **options) for d in range(4)]
    assert_close(four, torch.stack(each).mean(0), **NEAR)
    assert aopc.passes((24, 24), **options, draws=4) == 1 + 9*4 and aopc.passes((24, 24), unit=8, draws=4) == 10


# Networks of other people

class View(nn.Module):
    "Needs a contiguous image."
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3*24*24, 2)
    def forward(self, x): return self.net(x.view(len(x), -1))


@every
def test_networks_that_view_from_four_threads(name):
    f, model, found = FAITHFULNESS[name].using(**quick[name]), plain(View()), []
    expected = f(model, X, MAPS, 1)
    threads = [threading.Thread(target=lambda: found.append(f(model, X, MAPS, 1, batch_size=2))) for _ in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert len(found) == 4
    for v in found: assert_close(v, expected, **NEAR)


@every
def test_one_logit(name):
    "P(normal) = 1 − P(tumour): areas add up to 1, gains and falls change their sign."
    torch.manual_seed(0)
    model = plain(nn.Sequential(nn.Conv2d(3, 4, 5, 2), nn.ReLU(), nn.Flatten(), nn.Linear(400, 1)))
    one, other = (FAITHFULNESS[name](model, X, MAPS, c, **quick[name]) for c in (1, 0))
    assert_close(one + other, torch.full((3,), 1. if name in ('insertion', 'deletion') else 0.).cpu(), **NEAR)


@every
def test_three_classes_and_wrapped_outputs(name):
    class Says(nn.Module):
        def __init__(self, net): super().__init__(); self.net = net
        def forward(self, x): return None, self.net(x)
    f, net = FAITHFULNESS[name].using(**quick[name]), convolution(3).net
    plain_, wrapped = plain(net), Classifier(Says(net), mean=(0, 0, 0), std=(1, 1, 1), output=1)
    by_class = torch.stack([f(plain_, X, MAPS, c) for c in range(3)])
    assert_close(by_class.sum(0), torch.full((3,), 1. if name in ('insertion', 'deletion') else 0.).cpu(), **NEAR)
    called = predict(plain_, X).argmax(1).cpu()
    assert_close(f(wrapped, X, MAPS), by_class[called, torch.arange(3).cpu()], **NEAR)   # the predicted class by default


@every
def test_crops(name):
    "Pixels outside a crop, four ninths of the image here, move nothing, however a map ranks them."
    x = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(3))
    inside = torch.zeros(96, 96, dtype=torch.bool)
    inside[16:80, 16:80] = True
    maps = inside*(1 + torch.rand(2, 96, 96, generator=torch.Generator().manual_seed(4)))
    part = dict(unit=16) if name == 'aopc' else dict(steps=9)
    model = settled(Classifier(small_cnn(width=.1), crop=64), x)
    found = FAITHFULNESS[name](model, x, maps, 1, details=True, **part)[1]
    n = 16 if name == 'aopc' else 4   # regions of 36, or parts of 9, are inside
    for curve in found.values():
        assert_close(curve[:, n:], curve[:, -1:].expand(-1, curve.shape[1] - n), rtol=1e-3, atol=1e-5)
        assert (curve[:, 0] - curve[:, -1]).abs().min() > 1e-3


# One image does not depend on the others, nothing is left behind, what does not fit is named

@every
@pytest.mark.parametrize('kind', ['white', 'mean', 'noise', X.flip(0)])
def test_batches(name, kind):
    f, model = FAITHFULNESS[name].using(**quick[name]), convolution()
    together = f(model, X, MAPS, 1, baseline=kind)
    for size in (1, 2, 50): assert_close(f(model, X, MAPS, 1, baseline=kind, batch_size=size), together, **NEAR)
    of = lambda i: kind[i:i + 1] if torch.is_tensor(kind) else kind
    alone = torch.cat([f(model, X[i:i + 1], MAPS[i:i + 1], 1, baseline=of(i)) for i in range(3)])
    assert_close(alone, together, **NEAR)


@every
def test_ties_are_drawn_by_the_seed_not_the_batch(name):
    f, model, m = FAITHFULNESS[name].using(**quick[name]), convolution(), (MAPS > 0).float()
    assert_close(f(model, X, m, 1, batch_size=1), f(model, X, m, 1), **NEAR)
    assert (f(model, X, m, 1, seed=1) - f(model, X, m, 1)).abs().max() > 1e-5 or name == 'aopc'   # its squares hardly tie


@every
def test_nothing_is_left_behind(name):
    f = FAITHFULNESS[name].using(**quick[name])
    model = Classifier(nn.Sequential(nn.Conv2d(3, 4, 5, 2), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(400, 2)))
    model.train()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    x, m, rng = X.clone(), MAPS.clone(), torch.get_rng_state()
    once = f(model, x, m, 1)
    assert_close(f(model, x, m, 1), once, rtol=1e-6, atol=1e-6)
    assert (x == X).all() and (m == MAPS).all() and (torch.get_rng_state() == rng).all()
    assert all((v == state[k]).all() for k, v in model.state_dict().items())
    assert model.training and all(p.grad is None for p in model.parameters())
    assert not any(mod._forward_hooks or mod._forward_pre_hooks for mod in model.modules())


@every
def test_passes_are_counted(name):
    f, model, count = FAITHFULNESS[name].using(**quick[name]), convolution(), [0]
    predict(model, X)
    model.register_forward_pre_hook(lambda m, inputs: count.__setitem__(0, count[0] + len(inputs[0])))
    f(model, X, MAPS, 1)
    assert count[0] == 3*f.passes((24, 24))


@every
def test_errors_name_the_argument(name):
    f, model = FAITHFULNESS[name], convolution()
    steps = 'regions' if name == 'aopc' else 'steps'
    for option, said in ((dict(unit=0), 'unit is 0'), (dict(unit=2.5), 'unit is 2.5'), (dict(unit=25), 'unit is 25'),
                         ({steps: 0}, f'{steps} is 0'), ({steps: 1.5}, f'{steps} is 1.5'), (dict(baseline='grey'), 'baseline'),
                         (dict(unit=torch.zeros(2, 24, 24).long()), 'unit'), (dict(score='odds'), 'score'),
                         (dict(unit=torch.zeros(24, 24)), 'unit')):
        with pytest.raises(ValueError, match=said): f(model, X, MAPS, 1, **option)
    with pytest.raises(ValueError, match='NaN'): f(model, X, MAPS*torch.nan, 1)
    with pytest.raises(ValueError, match='maps'): f(model, X, MAPS[:2], 1)


def test_all_metrics_at_once_and_an_explainer():
    model = convolution()
    found = measure({k: f.using(**quick[k]) for k, f in FAITHFULNESS.items()}, model, X, dict(ours=MAPS, gradient=saliency), 1)
    assert set(found) == set(FAITHFULNESS) == {'insertion', 'deletion', 'srg', 'aopc'}
    assert_close(found['srg']['ours'], found['insertion']['ours'] - found['deletion']['ours'], **NEAR)
    assert_close(found['deletion']['gradient'], deletion(model, X, saliency, 1, steps=8), **NEAR)
    assert {k: f.higher for k, f in FAITHFULNESS.items()} == dict(insertion=True, deletion=False, srg=True, aopc=True)
