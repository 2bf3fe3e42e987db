"""What a student runs past in 09b_removal: known answers, libraries, odd shapes, batches, what does not fit."""
from itertools import permutations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pcam_tp.classifier import Classifier, class_score, evaluating
from pcam_tp.maps import gini
from pcam_tp.models import build
from pcam_tp.occlusion import occlusion
from pcam_tp.questions import Question
from pcam_tp.removal import (PIECES, average_drop, beside_sparsity, imputed, increase_in_confidence, infidelity,
                             normalised_aopc, road)

dice = torch.Generator().manual_seed(0)
X = torch.rand(4, 3, 24, 24, generator=dice)
MAPS = torch.randn(4, 24, 24, generator=dice)
ALL = dict(road=road, normalised_aopc=normalised_aopc.using(regions=3), infidelity=infidelity, average_drop=average_drop,
           increase_in_confidence=increase_in_confidence)
each_metric = pytest.mark.parametrize('name', ALL)
near = lambda a, b, tol=1e-4: torch.testing.assert_close(a.cpu().float(), b.cpu().float(), rtol=tol, atol=tol)


class Sum(nn.Module):
    "Additive: the log-odds of class 1 are the sum of the pixels of the first channel, less a constant."
    def __init__(self, less=0.):
        super().__init__()
        self.less, self.one = less, nn.Parameter(torch.ones(()))
    def forward(self, x):
        s = self.one*x[:, 0].sum((1, 2)) - self.less
        return torch.stack([-s/2, s/2], 1)


def additive(**options): return Classifier(Sum(**options), mean=(0, 0, 0), std=(1, 1, 1))


def network(): return build('small_cnn', n_classes=3, width=.1)


# What all metrics share

@each_metric
def test_a_value_does_not_depend_on_its_batch(name):
    model, f = network(), dict(ALL, road=road.using(shares=(.2, .5)))[name]
    whole = f(model, X, MAPS, 1)
    for size in (1, 3, 100): near(f(model, X, MAPS, 1, batch_size=size), whole, 1e-3)
    near(f(model, X[:2], MAPS[:2], 1), whole[:2], 1e-3)   # nor on the images beside it


@each_metric
def test_a_seed_is_a_draw(name):
    model, f = network(), ALL[name]
    torch.manual_seed(1)
    first = f(model, X, MAPS, 1, seed=3)
    torch.manual_seed(2)
    assert torch.equal(first, f(model, X, MAPS, 1, seed=3)) or X.is_cuda
    if name in ('road', 'infidelity'): assert (first != f(model, X, MAPS, 1, seed=4)).any()


@each_metric
def test_nothing_is_left_behind(name):
    model, x, maps, state = network().train(), X.clone(), MAPS.clone(), torch.get_rng_state()
    ALL[name](model, x, maps, 1)
    assert torch.equal(x, X) and torch.equal(maps, MAPS) and torch.equal(torch.get_rng_state(), state)
    assert all(m.training for m in model.modules()) and all(p.grad is None for p in model.parameters())


@each_metric
def test_passes_are_counted(name):
    "As many images go through the network as `passes` says; where the limits are searched, for the first map."
    model, f = network(), ALL[name]
    for options in {'normalised_aopc': [{}, dict(regions=4, beam=3), dict(beam=None)], 'road': [{}, dict(shares=(.5,))],
                    'infidelity': [{}, dict(n_samples=9)]}.get(name, [{}]):
        f(model, X, MAPS, 1, **options)
        seen = []
        handle = model.net.register_forward_hook(lambda m, i, o: seen.append(len(o)))
        f(model, X, MAPS, 1, **options)
        handle.remove()
        assert sum(seen) == len(X)*f.passes((24, 24), **options)


@each_metric
def test_precision_and_inference_mode(name):
    model, f = network(), ALL[name]
    with torch.inference_mode(): plain = f(model, X, MAPS, 1)
    with torch.autocast(X.device.type, torch.bfloat16): near(f(model, X, MAPS, 1), plain, 1e-3)
    assert f(model, X, MAPS, 1, precision='bf16').isfinite().all()


@pytest.mark.parametrize('shape', [(24, 31), (17, 20)])
@each_metric
def test_odd_shapes(name, shape):
    x, maps = torch.rand(2, 3, *shape), torch.rand(2, *shape)
    assert ALL[name](network(), x, maps, 2).isfinite().all()


@pytest.mark.parametrize('f, options, said', [
    (road, dict(shares=(0, .5)), 'shares is'), (road, dict(shares=(.5, 1)), 'shares is'), (road, dict(shares=()), 'shares is'),
    (normalised_aopc, dict(regions=1), 'regions is 1'), (normalised_aopc, dict(regions=8), 'regions is 8'),
    (normalised_aopc, dict(beam=None), 'at most 12'), (normalised_aopc, dict(beam=0), 'beam is 0'),
    (normalised_aopc, dict(regions=torch.full((24, 24), 3)), 'the same 2 to 62'),
    (infidelity, dict(pieces='circles'), 'squares, subsets'), (infidelity, dict(n_samples=1), 'n_samples is 1'),
    (average_drop, dict(score='logit'), 'of a probability only'), (road, dict(noisy=1), 'has no option noisy')])
def test_errors_name_the_argument(f, options, said):
    with pytest.raises(ValueError, match=said): f(additive(), X, MAPS, 1, **options)


def test_directions():
    "A bright square on black is all that an additive network sees: its mask, then noise, then its inverse."
    x, mask = torch.zeros(6, 3, 48, 48), torch.zeros(6, 48, 48)
    for n in range(6): mask[n, 4*n:4*n + 12, 12:24] = 1   # on a grid of 4×4 squares, or across its lines
    x += mask[:, None]
    noise = torch.rand(6, 48, 48, generator=dice)*(torch.rand(6, 48, 48, generator=dice) < .2)
    for name, f in ALL.items():
        if name == 'increase_in_confidence': continue   # nothing can rise here
        truth, luck, turned = (f(additive(less=20), x, m, 1, baseline='black') for m in (mask, noise, 1 - mask))
        if not f.higher: truth, luck, turned = -truth, -luck, -turned
        assert truth.mean() > luck.mean() > turned.mean(), name


def test_directions_of_an_increase():
    "Hiding what speaks against the class raises the score; hiding what speaks for it does not."
    x, evidence = torch.zeros(2, 3, 24, 24), torch.zeros(2, 24, 24)
    evidence[:, :12], evidence[:, 12:] = 1, -1
    x[:, 0] = torch.linspace(.2, .9, 24)
    class Halves(Sum):
        def forward(self, x):
            s = self.one*(x[:, 0]*evidence[:1]).sum((1, 2))/50
            return torch.stack([-s/2, s/2], 1)
    model = Classifier(Halves(), mean=(0, 0, 0), std=(1, 1, 1))
    values = [increase_in_confidence(model, x, m, 1, baseline='black') for m in (evidence, -evidence)]
    assert values[0].tolist() == [1, 1] and values[1].tolist() == [0, 0]
    assert increase_in_confidence.higher


# Imputation

def by_hand(x, visible):
    "The system of every image, pixel by pixel, in float64."
    h, w = visible.shape[1:]
    out = []
    for image, v in zip(x.double().cpu(), visible.cpu()):
        A, b = torch.eye(h*w, dtype=torch.float64).cpu(), (image*v).flatten(1).T
        for r, c in (~v).nonzero().tolist():
            near_ = [(r + a, c + d, 1/6 if a*d == 0 else 1/12) for a in (-1, 0, 1) for d in (-1, 0, 1) if a or d]
            near_ = [(i*w + j, k) for i, j, k in near_ if 0 <= i < h and 0 <= j < w]
            for at, k in near_: A[r*w + c, at] = -k/sum(k for _, k in near_)
        out.append(torch.linalg.solve(A, b).T.view(3, h, w).float())
    return torch.stack(out)


@pytest.mark.parametrize('shape', [(16, 16), (13, 18), (5, 4), (1, 9)])
def test_imputed_is_the_system(shape):
    "Scattered pixels, one pixel that is left, one that is missing, a border, a blob."
    x, seen = torch.rand(6, 3, *shape, generator=dice), torch.zeros(6, *shape, dtype=torch.bool)
    seen[0] = torch.rand(shape, generator=dice) > .5
    seen[1, -1, 0] = seen[2, 0, -1] = seen[2, shape[0]//2, 0] = True
    seen[3:] = True
    seen[3, 0, 0] = False
    seen[4, :, :shape[1]//2 + 1] = False
    seen[5, shape[0]//4:, 1:-1] = False
    seen[0, 0, 0] = seen[5, 0, 0] = True
    found = imputed(x, seen, tolerance=1e-6)
    near(found, by_hand(x, seen), 2e-5)
    assert found.shape == x.shape and found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(found[seen[:, None].expand_as(x)], x[seen[:, None].expand_as(x)])   # what is visible stays


def test_imputed_with_noise():
    seen = torch.rand(4, 24, 24, generator=dice) > .3
    noise = torch.ones_like(X)
    near(imputed(X, seen, noise) - imputed(X, seen), (~seen)[:, None].expand_as(X).float(), 1e-6)
    with pytest.raises(ValueError, match='expected some pixels'): imputed(X, seen & (torch.arange(4) > 0)[:, None, None])


def holes(side=96):
    "What maps remove: scattered pixels, smooth lumps, everything but a corner, everything but one pixel."
    smooth = F.interpolate(torch.rand(1, 1, 6, 6, generator=dice), (side, side), mode='bilinear')[0, 0]
    noise, one = torch.rand(side, side, generator=dice), torch.zeros(side, side, dtype=torch.bool)
    one[side//3, side//5] = True
    ramp = torch.arange(side*side).view(side, side)
    return torch.stack([m > m.flatten().quantile(s) for m in (smooth, noise) for s in (.1, .5, .9)] + [ramp < side, one])


def test_large_holes_in_a_few_steps():
    "Multigrid: each step gains more than a factor of 2, whatever the hole."
    from pcam_tp import removal
    seen, steps, rest = holes(), [], removal._Hole.rest
    x = F.interpolate(torch.rand(1, 3, 30, 30, generator=dice), (96, 96), mode='bilinear').expand(len(seen), -1, -1, -1)
    fine = imputed(x, seen, tolerance=1e-6)
    assert (imputed(x, seen) - fine).abs().max() < .2/255
    def counted(self, r, u):
        steps.append(u.shape[2])
        return rest(self, r, u)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(removal._Hole, 'rest', counted)
        imputed(x, seen)
    assert steps.count(96) <= 2 + 2*16


def test_imputer_of_the_authors():
    from pytorch_grad_cam.metrics.road import NoisyLinearImputer
    seen = holes()[:7]
    x = torch.rand(1, 3, 96, 96, generator=dice).expand(len(seen), -1, -1, -1)
    theirs = torch.stack([NoisyLinearImputer(noise=0)(a.cpu(), v.float().cpu()) for a, v in zip(x, seen)])
    near(imputed(x, seen), theirs, .2/255)   # a fifth of a grey level


# ROAD

def silent(monkeypatch):
    "grad-cam's imputer without noise, and without its seedless draws."
    from pytorch_grad_cam.metrics import road as of_gradcam
    monkeypatch.setattr(of_gradcam.NoisyLinearImputer.__init__, '__defaults__', (0., of_gradcam.neighbors_weights))
    return of_gradcam.ROADCombined


def test_gradcam_agrees(monkeypatch):
    "On maps without equal values; the counts of removed pixels may differ by one, so the percentiles are those that fit."
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputSoftmaxTarget
    Combined, model = silent(monkeypatch), Classifier(network().net.cpu(), classes=('a', 'b', 'c'), mean=(0, 0, 0), std=(1, 1, 1))
    x, percentiles = torch.rand(2, 3, 48, 48, generator=dice), [10, 30, 50, 70, 90]
    ranks = torch.stack([torch.randperm(48*48, generator=dice.manual_seed(s)).view(48, 48) for s in (1, 2)]).to(x)
    maps = (ranks + .5)/(48*48)
    with evaluating(model), torch.no_grad():
        theirs = Combined(percentiles)(x, maps.cpu().numpy(), [ClassifierOutputSoftmaxTarget(1)]*2, model)
    ours = road(model, x, maps, 1, shares=tuple(1 - p/100 for p in percentiles), noise=0.)
    near(ours, torch.as_tensor(theirs), 2e-4)


def test_gradcam_removes_all_equal_values_or_none():
    "A map that is 0 on 60 %: asked to keep 40 %, it keeps nothing. Ours draws an order among equals."
    from pytorch_grad_cam.metrics.road import RemoveMostRelevantFirst
    half = torch.zeros(24, 24)
    half.view(-1)[:230] = torch.rand(230, generator=dice)
    assert RemoveMostRelevantFirst(40, lambda image, kept: kept)(X[0], half.cpu()).sum() == 0
    value, info = road(additive(), X[:1], half[None], 1, shares=(.6,), noise=0., details=True)
    assert value.isfinite().all() and info['morf'].isfinite().all()


def test_road_of_a_spot():
    "Remove it, and black is imputed; remove all else, and it is painted over the image. The inverse map: the reverse."
    mask = torch.zeros(2, 24, 24)
    mask[0, 8:16, 8:16] = mask[1, :8, :8] = 1
    x, f = mask[:, None].expand(-1, 3, -1, -1), road.using(shares=(8/9,), noise=0.)
    near(f(additive(), x, mask, 1, score='log_odds'), torch.full((2,), 288.), 1e-3)
    near(f(additive(), x, -mask, 1, score='log_odds'), torch.full((2,), -288.), 1e-3)
    near(f(additive(), x, mask, 0, score='log_odds'), torch.full((2,), -288.), 1e-3)   # the other class


def test_road_takes_units():
    "Squares of 8: their values are means, so noise inside does not matter; one unit alone cannot be judged."
    blocks = torch.rand(4, 3, 3, generator=dice)
    maps = blocks.repeat_interleave(8, 1).repeat_interleave(8, 2)
    one = road(network(), X, maps, 1, unit=8)
    near(road(network(), X, maps + .01*(MAPS - F.avg_pool2d(MAPS, 8).repeat_interleave(8, 1).repeat_interleave(8, 2)), 1, unit=8),
         one, 1e-3)
    assert road(network(), X, maps, 1, unit=24).isnan().all()


def test_road_takes_regions_of_every_image():
    "Each batch gets those of its own images, as arrays too; half a pixel is no side."
    regions = (torch.arange(24)//8).expand(len(X), 24, 24) + torch.arange(len(X))[:, None, None] % 2
    whole = road(network(), X, MAPS, 1, unit=regions)
    near(road(network(), X, MAPS, 1, unit=regions.cpu().numpy(), batch_size=3), whole, 1e-3)
    with pytest.raises(ValueError, match='unit is 2.5'): road(network(), X, MAPS, 1, unit=2.5)


# Normalised AOPC

@pytest.mark.parametrize('kind', ['additive', 'network'])
def test_limits_are_those_of_all_orders(kind):
    "Six regions, 720 orders, every score asked by itself."
    model = additive() if kind == 'additive' else network()
    x, maps, grid = X[:2], MAPS[:2], torch.arange(2)[:, None].repeat_interleave(12, 0)*3 + torch.arange(3).repeat_interleave(8)
    values, info = normalised_aopc(model, x, maps, 1, regions=grid, beam=None, baseline='black', details=True)
    with evaluating(model), torch.no_grad():
        ask = lambda image: class_score(model(image[None]).float(), torch.tensor([1]), 'log_odds').item()
        for n in range(2):
            hidden = lambda s: x[n]*~torch.isin(grid, torch.tensor(sorted(s), dtype=torch.long))
            falls = {s: ask(x[n]) - ask(hidden(s)) for s in {frozenset(o[:k]) for o in permutations(range(6)) for k in range(7)}}
            aopc = lambda order: sum(falls[frozenset(order[:k])] for k in range(7))/7
            every = [aopc(o) for o in permutations(range(6))]
            means = [maps[n][grid == k].mean().item() for k in range(6)]
            own = aopc(sorted(range(6), key=lambda k: -means[k]))
            near(torch.tensor([info['low'][n], info['up'][n], info['aopc'][n]]), torch.tensor([min(every), max(every), own]), 1e-3)
            near(values[n], torch.tensor((own - min(every))/(max(every) - min(every))), 5e-3)


def test_a_search_is_exact_where_evidence_adds_up():
    "Sorted orders: the true map has 1, its inverse 0; a wider beam changes nothing; a random order has ½ on average."
    truth = X[:, 0]
    for beam in (1, 3):
        f = normalised_aopc.using(beam=beam, baseline='black')
        near(f(additive(), X, truth, 1), torch.ones(4))
        near(f(additive(), X, -truth, 1), torch.zeros(4))
        near(f(additive(), X, MAPS, 1) + f(additive(), X, -MAPS, 1), torch.ones(4))


def test_a_wider_beam_finds_no_less():
    "And none finds more than all sets have."
    grid = torch.arange(2)[:, None].repeat_interleave(12, 0)*3 + torch.arange(3).repeat_interleave(8)
    limits = lambda beam: normalised_aopc(network(), X, MAPS, 1, regions=grid, beam=beam, details=True)[1]
    exact, greedy, wide = (limits(b) for b in (None, 1, 20))   # 20: every set of six regions
    for side, sign in (('up', 1), ('low', -1)):
        assert (sign*(exact[side] - greedy[side]) > -1e-5).all()
        near(wide[side], exact[side], 1e-4)


def test_limits_are_asked_once():
    from pcam_tp.measures import measure
    model, seen = network(), []
    normalised_aopc(model, X, MAPS, 1)
    handle = model.net.register_forward_hook(lambda m, i, o: seen.append(len(o)))
    both = measure(dict(a=normalised_aopc), model, X, dict(one=MAPS, two=-MAPS), 1)['a']
    handle.remove()
    assert sum(seen) == 4*(normalised_aopc.passes() + 17)
    near(both['two'], normalised_aopc(model, X, -MAPS, 1), 1e-4)


def test_a_network_that_never_changes_cannot_be_judged():
    class Constant(Sum):
        def forward(self, x): return super().forward(x*0)
    assert normalised_aopc(Classifier(Constant(), mean=(0, 0, 0), std=(1, 1, 1)), X, MAPS, 1).isnan().all()


# Infidelity

@pytest.mark.parametrize('pieces', PIECES)
@pytest.mark.parametrize('kind', ['black', X.flip(0)])
def test_infidelity_of_the_true_map_is_zero(pieces, kind):
    "What each pixel adds, x − baseline: at β = 1 as it is, at β = ½ for twice the map."
    black = kind == 'black'
    truth = (X - (0 if black else kind))[:, 0]
    f = infidelity.using(pieces=pieces, baseline=kind)
    near(f(additive(), X, truth, 1, fitted=False), torch.zeros(4), 1e-3)
    value, info = f(additive(), X, 2*truth, 1, details=True)
    near(value, torch.zeros(4), 1e-3)
    near(info['scale'], torch.full((4,), .5), 1e-3)
    near(f(additive(), X, 2*truth, 1, fitted=False), info['falls'].square().mean(1), 1e-3)   # twice the fall: off by the fall
    near(f(additive(), X, -truth, 1, relative=True), torch.ones(4))
    near(f(additive(), X, 0*truth, 1, relative=True), torch.ones(4))
    near(f(additive(), X, truth, 0), info['falls'].square().mean(1), 1e-3)   # the other class: β would be −1


@pytest.mark.parametrize('normalize', [False, True])
def test_captum_agrees(normalize):
    "The same pieces. Its β may be negative; ours then is 0, and what captum has comes from the details."
    from captum.metrics import infidelity as of_captum, infidelity_perturb_func_decorator as counted
    model, k, x = network().eval(), 10, X*.99
    maps = torch.stack([*occlusion(model, x[:2], 1, window=8, stride=4).to(X), *MAPS[2:]])
    gone = PIECES['squares'](Question(model, x, 1), k)(torch.arange(4).repeat_interleave(k), torch.arange(k).repeat(4))
    hide = counted(multiply_by_inputs=True)(lambda images, white: torch.where(gone[:, None], white, images))
    odds = lambda images: class_score(model(images), torch.ones(len(images), dtype=torch.long), 'log_odds')
    thirds = (maps[:, None]/3).expand(-1, 3, -1, -1)
    theirs = of_captum(odds, hide, x, thirds, baselines=torch.ones_like(x), n_perturb_samples=k, normalize=normalize)
    ours, info = infidelity(model, x, maps, 1, n_samples=k, fitted=normalize, details=True)
    if normalize: ours = (info['scale'][:, None]*info['sums'] - info['falls']).square().mean(1)
    scale = theirs.abs().max().item()
    torch.testing.assert_close(ours.float().cpu(), theirs.cpu(), rtol=1e-3, atol=1e-4*scale)


def test_quantus_accumulates():
    """Its squares stay hidden when the next one is, its 'black' is the image's smallest value, and it multiplies the map
    by x − x': quantus 0.6.0, Infidelity(perturb_patch_sizes=[2], n_perturb_samples=1), gradient × input: 0.0059194565."""
    w, x = ((torch.arange(16) % 5 - 2)/4).view(4, 4), ((torch.arange(16) + 1)/16).view(4, 4)
    def of_quantus(map, accumulate):
        now, errors = x.clone(), []
        for r, c in ((0, 0), (0, 2), (2, 0), (2, 2)):
            now = now.clone() if accumulate else x.clone()
            now[r:r + 2, c:c + 2] = x.min()
            errors.append(((w*(x - now)).sum() - (map*(x - now)).sum())**2)
        return torch.stack(errors).mean().item()
    assert of_quantus(w*x, True) == pytest.approx(.0059194565, rel=1e-5)
    assert of_quantus(w*x, False) > 2*.0059   # one square at a time: another number
    class Weighted(Sum):
        def forward(self, x): return super().forward(x*w)
    model = Classifier(Weighted(), mean=(0, 0, 0), std=(1, 1, 1))
    truth = w*(x - x.min())   # what each pixel adds to the baseline: exact, and ours says so
    near(infidelity(model, x.expand(1, 3, 4, 4), truth[None], 1, baseline=x.min().item(), fitted=False), torch.zeros(1), 1e-6)


def test_pieces():
    q = Question(additive(), torch.rand(8, 3, 48, 60, generator=dice), 1)
    pairs = torch.arange(8).repeat_interleave(50), torch.arange(50).repeat(8)
    square, subset = (PIECES[k](q, 50)(*pairs) for k in ('squares', 'subsets'))
    rows, cols = square.any(2).sum(1), square.any(1).sum(1)
    assert torch.equal(rows, cols) and torch.equal(square.sum((1, 2)), rows*cols)   # whole squares, inside
    assert (rows.min(), rows.max()) == (4, 16)
    assert abs(subset.float().mean().item() - .5) < .05 and subset.float().mean((1, 2)).std() > .25
    near(square.float().mean(0)[20:28, 26:34].mean(), square.float().mean(0)[20:28].mean(), .1)


# Average drop, increase in confidence

def test_gradcam_multiplies_the_normalised_tensor():
    "That is a blend to the mean colour, in pixels; its drop is not divided by the score."
    from pytorch_grad_cam.metrics.cam_mult_image import DropInConfidence, IncreaseInConfidence
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputSoftmaxTarget
    model, cams = network().eval(), torch.rand(4, 24, 24, generator=dice)
    cams = cams/cams.amax((1, 2), keepdim=True)
    call = lambda C: torch.as_tensor(C()(model.preprocess(X), cams.cpu().numpy(), [ClassifierOutputSoftmaxTarget(1)]*4, model.net))
    mean = model.mean.flatten()
    value, info = average_drop(model, X, cams, 1, baseline=mean, details=True)
    near(value*info['before'].cpu(), call(DropInConfidence))
    near(increase_in_confidence(model, X, cams, 1, baseline=mean), call(IncreaseInConfidence))


def test_only_positive_values_show():
    "The scale of a map and its negative values do not matter; without a positive one nothing can be judged."
    model, m = network(), MAPS
    for f in (average_drop, increase_in_confidence):
        near(f(model, X, 9*m, 1), f(model, X, m.relu(), 1))
        assert f(model, X, -m.abs(), 1).isnan().all() and f(model, X, 0*m, 1).isnan().all()
    near(average_drop(model, X, torch.ones_like(m), 1), torch.zeros(4))   # the flat map loses nothing


# Sparsity

def test_beside_sparsity():
    maps = {k: torch.rand(9, 12, 12, generator=dice)**k for k in (1, 2, 4, 8)}
    unknown = {k: torch.full((9,), torch.nan) for k in maps}
    t = beside_sparsity(dict(same={k: gini(m) for k, m in maps.items()}, turned={k: -gini(m) for k, m in maps.items()},
                             unknown=unknown), maps).set_index(['metric', 'sparsity'])
    assert t.loc[('same', 'gini'), 'images'] == pytest.approx(1) and t.loc[('turned', 'gini'), 'methods'] == pytest.approx(-1)
    assert t.loc['unknown'][['images', 'methods']].isna().all(axis=None) and (t.n_images == 9).all()
