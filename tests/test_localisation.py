"""What a student runs past in 10_localisation: Quantus' numbers, chance by enumeration, masks that judge nobody, batches, toys."""
import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import nn

from pcam_tp.classifier import Classifier
from pcam_tp.controls import shifted
from pcam_tp.localisation import *
from pcam_tp.localisation import PartStack
from pcam_tp.maps import iou, random_maps
from pcam_tp.measures import measure
from pcam_tp.methods import METHODS
from pcam_tp.models import build
from pcam_tp.questions import baseline
from pcam_tp.synthetic import Parts, patch_parts

def close(a, b, tol=1e-5):
    a, b = (torch.as_tensor(v).cpu().double() for v in (a, b))
    torch.testing.assert_close(a, b, rtol=tol, atol=tol, equal_nan=True)



def ramp(n=4, h=6, w=8):
    "Fixed maps without ties, signed, and masks: a corner, a band, one that touches all sides, an empty one."
    i = np.arange(n*h*w).reshape(n, h, w)
    maps = torch.from_numpy(np.sin(1.7*i + .3*np.sqrt(i)).astype('float32'))
    masks = torch.zeros(n, h, w, dtype=torch.bool)
    masks[0, :2, :3], masks[1, 3:5], masks[2, 1:, 1:] = True, True, True
    return maps, masks


class Nothing(nn.Module):
    "Localisation asks the network nothing."
    def forward(self, x): raise AssertionError('the network was asked')


@pytest.fixture
def model(): return build('small_cnn', width=.1)


def told(f, maps, masks, **options):
    "Values and details without any question to a network."
    from pcam_tp.questions import Question
    net = Classifier(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)))
    q = Question(net, torch.zeros(len(maps), 3, *maps.shape[1:], device=net.device), 0)
    q.model = Classifier(Nothing())
    return f.on(q, maps.to(q.device), masks.to(q.device), **options)


# quantus 0.6.0 on `ramp`: PointingGame(abs=False, normalise=False), RelevanceMassAccuracy(abs=False, normalise=False) of the
# maps' positive part, RelevanceRankAccuracy(abs=False, normalise=False), AUC(abs=False, normalise=False)
QUANTUS = dict(
    pointing_game=[False, True, False, True],
    relevance_mass=[0.12449235, 0.30041027, 0.71922898, float('nan')],
    rank_accuracy=[0.16666667, 0.25, 0.74285714, float('nan')],
    localisation_auc=[0.50793651, 0.46875, 0.47252747, float('nan')])


def test_quantus():
    "The same numbers where Quantus is right; its empty mask is a hit."
    maps, masks = ramp()
    known = {k: told(f, maps, masks, details=True) for k, f in LOCALISATION.items()}
    judged = slice(3)   # the last mask is empty
    close(known['pointing_game'][1]['hit'][judged], torch.tensor(QUANTUS['pointing_game'])[judged].float())
    assert QUANTUS['pointing_game'][3] is True and known['pointing_game'][1]['hit'][3].isnan()
    close(known['relevance_mass'][1]['inside'][judged], torch.tensor(QUANTUS['relevance_mass'][judged]))
    close(known['rank_accuracy'][1]['inside'][judged], torch.tensor(QUANTUS['rank_accuracy'][judged]))
    close(known['localisation_auc'][0], torch.tensor(QUANTUS['localisation_auc']))


def test_quantus_ties():
    "quantus 0.6.0: any tied maximum may hit, so that PointingGame gives a constant map True; ours draws one pixel."
    masks = torch.zeros(600, 6, 8, dtype=torch.bool)
    masks[:, :2, :3] = True
    maps = torch.zeros(600, 6, 8)   # all alike, as those of an untrained network often are: each has a draw of its own
    hit = told(pointing_game, maps, masks, details=True)[1]['hit']
    assert abs(hit.mean() - 6/48) < .05   # standard error .0135
    inside = told(rank_accuracy, maps, masks, details=True)[1]['inside']
    assert abs(inside.mean() - 6/48) < .03


def test_chance_by_enumeration():
    "Over every single-pixel map the pointing game is 0 on average, for any tolerance; so is mass over all shifts of a map."
    masks = torch.zeros(1, 6, 8, dtype=torch.bool)
    masks[0, 1:3, 2:5] = True
    every = torch.eye(48).view(48, 6, 8)
    for tolerance in (0, 1, 1.5, 2):
        close(told(pointing_game, every, masks.expand(48, -1, -1), tolerance=tolerance)[0].mean(), 0., 1e-6)
    m = torch.rand(6, 8)
    moves = torch.stack([m.roll((i, j), (0, 1)) for i in range(6) for j in range(8)])
    close(told(relevance_mass, moves, masks.expand(48, -1, -1))[0].mean(), 0., 1e-6)
    close(told(rank_accuracy, moves, masks.expand(48, -1, -1))[0].mean(), 0., 1e-6)
    close(told(localisation_auc, moves, masks.expand(48, -1, -1))[0].mean(), .5, 1e-6)


def test_tolerance():
    maps, masks = torch.zeros(2, 9, 9), torch.zeros(2, 9, 9, dtype=torch.bool)
    masks[:, 4, 4] = True
    maps[0, 4, 6], maps[1, 6, 6] = 1, 1   # two pixels away, and √8
    hits = lambda r: told(pointing_game, maps, masks, tolerance=r, details=True)[1]
    assert hits(0)['hit'].tolist() == [0, 0] and hits(2)['hit'].tolist() == [1, 0] and hits(3)['hit'].tolist() == [1, 1]
    close(hits(2)['share'], torch.full((2,), 13/81))   # the pixels of a disc of radius 2
    with pytest.raises(ValueError, match='tolerance is -1'): told(pointing_game, maps, masks, tolerance=-1)


def test_auc_is_scikit_learns():
    maps = torch.randn(5, 12, 10).round(decimals=1)   # ties
    masks = torch.rand(5, 12, 10) > .7
    expected = [roc_auc_score(k.flatten().cpu(), m.flatten().cpu()) for m, k in zip(maps, masks)]
    close(told(localisation_auc, maps, masks)[0], torch.tensor(expected), 1e-6)


@pytest.mark.parametrize('name', LOCALISATION)
def test_what_cannot_be_judged(name):
    "Empty and full masks are NaN, among others too, and change nobody's value."
    maps, masks = torch.randn(4, 10, 10), torch.rand(4, 10, 10) > .6
    alone = told(LOCALISATION[name], maps, masks)[0]
    masks[1], masks[2] = False, True
    values = told(LOCALISATION[name], maps, masks)[0]
    assert values[1:3].isnan().all()
    close(values[[0, 3]], alone[[0, 3]], 1e-6)


@pytest.mark.parametrize('name', LOCALISATION)
def test_direction(name):
    "True mask > noise > inverse in the declared direction, for the map of a network that reads the planted spot alone."
    class Spot(nn.Module):
        def forward(self, x): z = x[:, :, 8:16, 4:12].sum((1, 2, 3)); return torch.stack([-z, z], 1)
    g = torch.Generator().manual_seed(0)
    spot, x = Classifier(Spot(), mean=(0, 0, 0), std=(1, 1, 1)), torch.rand(60, 3, 24, 24, generator=g)
    mask = torch.zeros(24, 24, dtype=torch.bool)
    mask[8:16, 4:12] = True
    gradient = METHODS['saliency'](spot, x, 1)
    maps = dict(true=gradient, noise=torch.rand(60, 24, 24, generator=g))
    maps['inverse'] = gradient.max() - gradient + .01*maps['noise']
    v = {k: t.mean() for k, t in measure({'m': LOCALISATION[name]}, spot, x, maps, 1, masks=mask)['m'].items()}
    sign = 1 if LOCALISATION[name].higher else -1
    assert sign*v['true'] > sign*v['noise'] > sign*v['inverse']


@pytest.mark.parametrize('name', LOCALISATION)
def test_one_image_does_not_change_another(model, name):
    "Any batch, any place in it, any device of the maps; nothing is left behind."
    x, maps = torch.rand(5, 3, 24, 24), torch.randn(5, 24, 24).round(decimals=1)
    masks = torch.rand(5, 24, 24) > .7
    before, mode = [v.clone() for v in (x, maps, masks)], model.train().training
    f = LOCALISATION[name]
    whole = f(model, x, maps, 1, masks=masks)
    close(f(model, x, maps, 1, masks=masks, batch_size=2), whole, 1e-6)
    clear = torch.randn(5, 24, 24)   # among equal values the number of the image draws
    close(f(model, x.flip(0), clear.flip(0), 1, masks=masks.flip(0)).flip(0), f(model, x, clear, 1, masks=masks), 1e-6)
    close(f(model, x, maps.cpu(), 1, masks=masks.cpu()), whole, 1e-6)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, maps, masks))) and model.training == mode
    assert all(p.grad is None for p in model.parameters())


def test_bad_input(model):
    x, maps = torch.rand(2, 3, 24, 24), torch.rand(2, 24, 24)
    mask = torch.zeros(24, 24, dtype=torch.bool)
    mask[:5] = True
    for call, word in ((lambda: pointing_game(model, x, maps, 1), 'needs masks'),
                       (lambda: rank_accuracy(model, x, maps, 1, masks=mask.float()), 'expected bool'),
                       (lambda: relevance_mass(model, x, maps[:1], 1, masks=mask), 'maps of maps have shape'),
                       (lambda: mask_iou(model, x, maps, 1, masks=mask, threshold='median'), "expected 'otsu'"),
                       (lambda: mask_iou(model, x, maps, 1, masks=mask, threshold=1.5), 'share of pixels'),
                       (lambda: stack_parts([]), 'parts is empty')):
        with pytest.raises(ValueError, match=word): call()


def test_cuts():
    "Otsu splits two groups between them; a share keeps exactly its pixels; nothing positive gives an empty region."
    m = torch.zeros(3, 20, 20)
    m[0, :5] = 1. + .1*torch.rand(5, 20)
    m[1] = -1 - torch.rand(20, 20)
    m[2, 0, 0] = 3
    region = to_mask(m)
    assert region[0, :5].all() and not region[0, 5:].any() and not region[1].any()
    assert region[2].sum() == 1
    assert (to_mask(m, .25).flatten(1).sum(1) == 100).all()
    truth = region[[0, 0, 0]]
    excess, d = told(mask_iou, m, truth, details=True)
    close(d['iou'][0], 1.); close(d['area'][0], .25); close(d['chance'][0], .25/(2 - .25)); assert excess[1].isnan()
    shuffled = torch.stack([m[0].flatten()[torch.randperm(400, device=m.device)].view(20, 20) for _ in range(300)])
    assert abs(told(mask_iou, shuffled, truth[:1].expand(300, -1, -1))[0].mean()) < .01


def test_a_compact_region_has_a_little_more_iou_than_pixels_drawn_at_random():
    "Over all shifts of a square that fits the mask, and of half a patch: 0 is the chance of scattered pixels alone."
    n, low = 24, {}
    for name, region in dict(square=(slice(n//2), slice(n//2)), half=(slice(n), slice(n//2))).items():
        mask = torch.zeros(1, n, n, dtype=torch.bool)
        mask[0][region] = True
        moves = torch.stack([mask[0].roll((i, j), (0, 1)) for i in range(n) for j in range(n)]).float()
        excess, d = told(LOCALISATION['matched_iou'], moves, mask.expand(n*n, -1, -1), details=True)
        low[name], a = excess.mean(), mask.float().mean().item()
        close(d['chance'].mean(), a/(2 - a))
    close(list(low.values()), [.0235, .0535], .05)
    side = np.minimum(np.arange(96), 96 - np.arange(96)) # 96×96, a square of 48: overlaps of rows times those of columns
    both = np.outer(48 - side, 48 - side)
    close((both/(2*48**2 - both)).mean(), .1645, 1e-3)   # of scattered pixels: 1/7 = .1429


def test_matched_iou_follows_from_rank_accuracy():
    maps, masks = torch.randn(6, 15, 15), torch.rand(6, 15, 15) > .6
    r = told(rank_accuracy, maps, masks, details=True)[1]['inside']
    close(told(LOCALISATION['matched_iou'], maps, masks, details=True)[1]['iou'], r/(2 - r))


# Parts

def toy(n=3, k=(4, 6, 5), side=24, seed=0):
    "Patches of noise with squares as parts; without a part its square has other noise."
    rng, out = np.random.default_rng(seed), []
    for count in k[:n]:
        x, masks = rng.integers(60, 200, (side, side, 3), dtype=np.uint8), np.zeros((count, side, side), bool)
        without = np.repeat(x[None], count, 0)
        for j in range(count):
            r, c = 8*(j//3), 8*(j % 3)
            masks[j, r:r + 6, c:c + 6] = True
            without[j, r:r + 6, c:c + 6] = rng.integers(0, 255, 3, dtype=np.uint8)
        out.append(Parts(x, [f'p{j}' for j in range(count)], masks, without, masks.any(0), 1, f's{count}'))
    return out


class Linear(nn.Module):
    "K logits, linear in the pixels."
    def __init__(self, n_classes=2, side=24):
        super().__init__()
        self.w = nn.Parameter(torch.randn(n_classes, 3, side, side, generator=torch.Generator().manual_seed(1)))
    def forward(self, x): return torch.einsum('nchw,kchw->nk', x, self.w)


def linear(n_classes=2): return Classifier(Linear(n_classes), mean=(0, 0, 0), std=(1, 1, 1), classes=[str(k) for k in range(n_classes)])


def one_by_one(model, parts, target, how):
    "Effects by loops."
    out = torch.full((len(parts), max(len(p.names) for p in parts)), torch.nan)
    as_x = lambda a: torch.from_numpy(np.ascontiguousarray(a)).permute(2, 0, 1)[None].float()/255
    f = lambda x, t: model(x)[0, t] - torch.cat([model(x)[0, :t], model(x)[0, t + 1:]]).logsumexp(0)
    with torch.no_grad():
        for i, p in enumerate(parts):
            x = as_x(p.x)
            for j in range(len(p.names)):
                gone = as_x(p.without[j])
                if how != 'rendered': gone = torch.where(torch.from_numpy(p.masks[j]), baseline(x, how), x)
                out[i, j] = f(x, target[i]) - f(gone, target[i])
    return out


@pytest.mark.parametrize('how', ['rendered', 'white', 'black', 'mean', 'blur'])
@pytest.mark.parametrize('n_classes', [2, 5])
def test_effects_by_hand(how, n_classes):
    parts, model, target = toy(), linear(n_classes), [1, 0, n_classes - 1]
    stack = stack_parts(parts, model.device)
    expected = one_by_one(model, parts, target, how)
    for size in (None, 1, 4):
        found = part_effects(model, stack, target, remove=how, batch_size=size)
        close(found, expected, 1e-3)
    assert found.isnan().sum() == 2 + 1
    close(part_effects(model, stack, remove=how), part_effects(model, stack, model(stack.x).argmax(1), remove=how), 1e-3)


def test_effects_leave_no_trace(model):
    stack = stack_parts(toy(), model.device)
    before = [v.clone() for v in stack[:3]]
    model.train()
    d = part_effects(model, stack)
    assert model.training and all(torch.equal(a, b) for a, b in zip(before, stack[:3]))
    assert all(p.grad is None for p in model.parameters())
    with torch.inference_mode(): close(part_effects(model, stack), d, 1e-4)


def test_sums_and_scores():
    stack = stack_parts(toy())
    maps = torch.randn(3, 24, 24)
    sums = part_sums(maps, stack)
    close(sums[0, 1], maps[0, :6, 8:14].sum()); assert sums.isnan().sum() == 3
    with pytest.raises(ValueError, match='maps have shape'): part_sums(maps[:2], stack)
    d = torch.tensor([[4., 1, -1, 2], [1, 1, 1, 1], [1, 2, torch.nan, torch.nan], [3, 2, 1, torch.nan]])
    a = torch.tensor([[9., 2, -3, 5], [1, 2, 3, 4], [1, 2, torch.nan, torch.nan], [1, 1, 3, torch.nan]])
    s = removal_scores(d, a)
    close(s['rho'], torch.tensor([1, torch.nan, torch.nan, -.8660254]))
    close(s['strongest'], torch.tensor([0, torch.nan, torch.nan, .75]))   # tied for places 2 and 3
    close(s['sign'], torch.tensor([1, 1, torch.nan, 1.]))
    s = removal_scores(d[:1], -a[:1])
    close(s['rho'], [-1.]); close(s['strongest'], [1.]); close(s['sign'], [0.])
    close(removal_scores(d[:1], torch.tensor([[9., -2, -3, 5]]))['sign'], [7/8])
    assert removal_scores(d[:1], torch.ones(1, 4))['rho'].isnan().all()


def test_linear_in_parts():
    "ρ = 1 for the true map, 0 ± .05 for maps of noise around 0, here 900 of each kind of grid."
    parts, model = [p for s in range(5) for p in toy(3, (6, 7, 8), seed=s)], linear()
    stack = stack_parts(parts, model.device)
    d = part_effects(model, stack, 1)
    true = torch.einsum('nk,nkhw->nhw', (d.nan_to_num(0).double()/36).to(stack.x), stack.masks.to(stack.x))
    scores = rendered_removal(model, stack, dict(true=true), 1)
    close(scores['rho']['true'], torch.ones(15)); close(scores['strongest']['true'], torch.zeros(15)); close(scores['sign']['true'], torch.ones(15))
    for grid in ((24, 24), (4, 4)):
        noise = torch.stack([removal_scores(d, part_sums(random_maps(15, grid, (24, 24), signed=True, seed=s), stack))['rho'] for s in range(60)])
        assert abs(noise.mean()) < .05   # standard error about .014
    places = torch.stack([removal_scores(d, part_sums(random_maps(15, (24, 24), (24, 24), signed=True, seed=s), stack))['strongest'] for s in range(60)])
    assert abs(places.mean() - .5) < .05


def test_distance_of_the_truth_from_itself():
    "A baseline that is the very patch drawn again has no distance; the table says what it says."
    parts = toy(2, (4, 6))
    for p in parts: p.without[:] = np.where(p.masks[..., None], 255, p.x)   # drawn again: white squares
    model = linear()
    stack = stack_parts(parts, model.device)
    d = {k: part_effects(model, stack, 1, remove=k) for k in ('rendered', 'white', 'black')}
    close(d['white'], d['rendered'], 1e-3)
    table = replacement_distance(d['rendered'], {k: d[k] for k in ('white', 'black')}, stack.by).set_index('kind')
    close(table.rho['white'], 1.); close(table.off['white'], 0., 1e-3); close(table.bias['white'], 0., 1e-3)
    black = (d['black'] - d['rendered']).nan_to_num(0)
    close(table.off['black'], (black.abs().sum(1)/torch.tensor([4, 6]).cpu()).mean(), 1e-5)
    close(table.bias['black'], (black.sum(1)/torch.tensor([4, 6]).cpu()).mean(), 1e-5)
    close(table['size'].tolist(), [d['rendered'].abs().nanmean(1).mean().item()]*2, 1e-5)
    assert table.rho_low.isna().all() and (table.n == 2).all()   # two slides: no interval


def test_paint_that_does_nothing_is_off_by_the_size():
    "Patches with three and with five parts; where paint lowers the score more than the removal, the bias is positive."
    d = torch.tensor([[3., -6, 9, torch.nan, torch.nan], [1, -1, 1, -1, 1]])
    table = replacement_distance(d, dict(nothing=0*d, more=d + 1, twice=2*d)).set_index('kind')
    for k in ('nothing', 'twice'): close(table.off[k], table['size'][k], 1e-6)
    close([table['size'].nothing, table.bias['more'], table.bias.nothing], [(6 + 1)/2, 1, -(2 + .2)/2], 1e-6)
    one = torch.full((1, 3), -1.)
    assert replacement_distance(one, dict(more=2*one)).bias[0] == -1   # paint raises the score by 2, the removal by 1


def test_distance_leaves_out_patches_with_two_parts():
    "Two parts have no order to be wrong about; the truth stays at 1."
    d = torch.tensor([[1., 2., torch.nan], [1., 2., 3.], [3., 1., 2.]])
    table = replacement_distance(d, dict(truth=d, other=d.flip(1))).set_index('kind')
    assert table.rho['truth'] == 1 and table.off['truth'] == 0 and (table.n == 2).all()
    with pytest.raises(ValueError, match='at least 3 parts'): replacement_distance(d[:1], dict(truth=d[:1]))


def test_parts_of_real_drawings(model):
    "The generator's own parts, at the network's own size."
    parts = [patch_parts(i) for i in (2, 9)]
    stack = stack_parts(parts, model.device)
    assert isinstance(stack, PartStack) and stack.masks.sum(1).max() == 1
    d = part_effects(model, stack)
    assert d.shape == stack.masks.shape[:2] and (d.isfinite().cpu() == stack.masks.flatten(2).any(2).cpu()).all()


def test_ink_is_one_part_more():
    "The same stroke over every version of a patch; without it the patch is as it was; no pixel shows two parts."
    parts = [patch_parts(i) for i in (2, 9)]
    inked = with_ink(parts)
    for p, k in zip(parts, inked):
        stroke = k.masks[-1]
        assert k.names == [*p.names, 'ink'] and k.masks.sum(0).max() == 1 and stroke.any() and not stroke[32:64, 32:64].any()
        assert (k.without[-1] == p.x).all() and (k.x[~stroke] == p.x[~stroke]).all() and (k.x != p.x).any()
        for j in range(len(p.names)):
            same = (p.without[j] == p.x).all(-1)   # where the part changed nothing, ink falls on the same pixels
            assert (k.without[j][same] == k.x[same]).all() and (k.without[j][~stroke] == p.without[j][~stroke]).all()
    assert all((a.x == b.x).all() for a, b in zip(with_ink(parts), inked)) and (with_ink(parts, 5)[0].x != inked[0].x).any()
