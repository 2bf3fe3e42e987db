"""What 10b_detective cannot show in its story: chance by hand, missing values, slides, a plain function, no trace, devices."""
import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from pcam_tp import detective
from pcam_tp.classifier import Classifier, class_score, predict
from pcam_tp.controls import edge_map, untrained
from pcam_tp.data import open_split
from pcam_tp.detective import Marked, Pair, detection, false_alarm, likeness, mark_effect, mark_excess, marked_patches
from pcam_tp.maps import mask_excess
from pcam_tp.saliency import saliency
from pcam_tp.synthetic import synthetic_folder

N = 24


class Reader(nn.Module):
    "Logits of tumour: a weight times how dark the patch is; without weights it reads nothing."
    def __init__(self, weight):
        super().__init__()
        self.net = nn.Conv2d(3, 2, 1)
        with torch.no_grad():
            self.net.weight[:] = torch.tensor([0., -weight]).view(2, 1, 1, 1)
            self.net.bias[:] = 0

    def forward(self, x): return self.net(x).mean((2, 3))


def reader(weight): return Classifier(Reader(weight), mean=(0, 0, 0), std=(1, 1, 1)).eval()


@pytest.fixture(scope='module')
def pairs(): return {s: Pair(reader(0.), reader(5. + s)) for s in range(3)}


@pytest.fixture(scope='module')
def marked():
    made = marked_patches('ink', N)
    device = next(reader(0.).parameters()).device   # the simulated one, where the tests run on it
    return made._replace(x=made.x.to(device), plain=made.plain.to(device))


def planted_ones(pairs): return [p.planted for p in pairs.values()]


def points(pairs, masks, elsewhere):
    "A detective: these maps for planted networks, others for all else."
    return lambda model, x, target: masks*1. if any(model is p for p in planted_ones(pairs)) else elsewhere*1.


def table(clean, planted, twin, slides=None):
    "A table of `mark_excess` from arrays (seeds, patches)."
    rows = []
    for network, of in dict(clean=clean, planted=planted, untrained=twin).items():
        for s, e in enumerate(np.asarray(of, float)):
            rows.append(pd.DataFrame(dict(method='m', network=network, seed=s, patch=range(len(e)), slide=slides, y=0,
                                          excess=e)))
    return pd.concat(rows, ignore_index=True)


def test_direction(pairs, marked):
    "Reference: the mark, nothing, all but the mark; and the numbers go down in this order."
    flat = torch.ones(marked.masks.shape)
    asked = dict(mark=points(pairs, marked.masks, flat), flat=points(pairs, flat, flat),
                 inverse=points(pairs, ~marked.masks, flat), always=points(pairs, marked.masks, marked.masks),
                 blames=points(pairs, flat, marked.masks))
    found = mark_excess(asked, pairs, marked)
    d, a = (f(found).set_index('method') for f in (detection, false_alarm))
    assert d.estimate[['mark', 'flat', 'inverse', 'always', 'blames']].tolist() == [1, .5, 0, .5, 0]
    rest = 1 - marked.masks.float().mean().item()
    np.testing.assert_allclose(a.estimate[['mark', 'flat', 'inverse', 'always', 'blames']], [0, 0, 0, rest, rest], atol=1e-5)
    np.testing.assert_allclose(a.difference, 0, atol=1e-6)   # none of them looks at the weights


def test_chance_by_hand():
    "Random excess: each pair counted by a loop; the mean is near a half."
    rng = np.random.default_rng(0)
    clean, planted, twin = rng.normal(size=(3, 3, 40))
    slides = np.repeat([f's{i}' for i in range(8)], 5)
    row = detection(table(clean, planted, twin, slides)).iloc[0]
    by_hand = np.mean([[planted[s, i] > clean[s, i] for i in range(40)] for s in range(3)])
    assert row.estimate == pytest.approx(by_hand) and row.low < .5 < row.high and (row.n, row['by']) == (8, 'slide')
    seeds = (planted > clean).mean(1)
    assert (row.lowest, row.highest, row.seeds) == (pytest.approx(seeds.min()), pytest.approx(seeds.max()), 3)
    alarm = false_alarm(table(clean, planted, twin, slides)).iloc[0]
    assert alarm.estimate == pytest.approx(clean.mean()) and alarm.difference == pytest.approx((clean - twin).mean())
    assert alarm.low < clean.mean() < alarm.high and alarm.difference_low < alarm.difference < alarm.difference_high


def test_ties_count_half_and_missing_maps_not_at_all():
    nan = np.nan
    row = detection(table([[0, 0, 0, nan]], [[0, .5, 1e-9, 1]], [[0]*4])).iloc[0]
    assert row.estimate == pytest.approx((.5 + 1 + .5)/3) and row.judged == .75 and (row.n, row['by']) == (3, 'patch')
    one_seed = detection(table([[0, 0], [nan, 0]], [[1, -1], [1, 1]], [[0, 0]]*2)).iloc[0]
    assert one_seed.estimate == pytest.approx((1 + .5)/2) and one_seed.judged == .75
    alarm = false_alarm(table([[.3, nan, .1]], [[0]*3], [[.1, .2, nan]])).iloc[0]
    assert alarm.estimate == pytest.approx(.3) and alarm.of_control == pytest.approx(.1) and alarm.judged == pytest.approx(1/3)
    nothing = detection(table([[nan, nan]], [[1, 1]], [[0, 0]])).iloc[0]
    assert np.isnan(nothing.estimate) and nothing.judged == 0 and nothing.n == 0


def test_few_slides_give_no_interval():
    rng = np.random.default_rng(1)
    found = table(*rng.normal(size=(3, 2, 20)), np.repeat(list('abcd'), 5))
    for row in (detection(found).iloc[0], false_alarm(found).iloc[0]):
        assert np.isnan([row.low, row.high]).all() and np.isfinite(row.estimate) and row.n == 4


def test_excess_is_that_of_each_network(pairs, marked):
    "The rows are those of `mask_excess`, for an explainer and for a plain function alike."
    found = mark_excess(dict(explainer=saliency, function=lambda m, x, t: saliency(m, x, t)), pairs, marked)
    for seed, pair in pairs.items():
        for name, model in (pair._asdict() | dict(untrained=untrained(pair.clean, seed))).items():
            expected = mask_excess(saliency(model, marked.x, 1), marked.masks).numpy()
            for method in ('explainer', 'function'):
                got = found.query('method == @method and network == @name and seed == @seed').excess
                np.testing.assert_allclose(got, expected, atol=1e-5)


def test_effect_is_exact(pairs, marked):
    "Planted networks weigh darkness, so the mark's effect is the weight times what it took; the clean ones see nothing."
    found = mark_effect(pairs, marked)
    dark = (marked.plain - marked.x).cpu().double().mean((2, 3)).sum(1).numpy()
    for seed in pairs:
        got = found.query('network == "planted" and seed == @seed').effect
        np.testing.assert_allclose(got, (5 + seed)*dark, rtol=1e-3, atol=1e-4)
    assert (found.query('network == "clean"').effect == 0).all() and (dark > 0).all()


def test_likeness(pairs, marked):
    masks = marked.masks*1.
    noise = torch.rand(masks.shape, generator=torch.Generator().manual_seed(0))
    noise = noise.cpu() if torch.is_tensor(noise) else noise
    asked = dict(same=lambda *_: noise, other=points(pairs, 1 - noise, noise), edges=edge_map)
    t = likeness(asked, pairs, marked.plain, marked.slides).set_index('method')
    np.testing.assert_allclose(t.estimate[['same', 'other', 'edges']], [1, -1, 1], atol=1e-5)
    np.testing.assert_allclose(t.of_control, 1, atol=1e-5)
    assert t.difference_high['other'] < 0 and t.seeds['other'] == 6   # ordered couples of three seeds


@pytest.mark.parametrize('kind', ['ink', 'border'])
def test_marks(kind):
    "Every patch has its mark, outside the centre, and nothing else changed; slides and classes take turns."
    m = marked_patches(kind, N)
    changed = (m.x != m.plain).any(1).cpu()
    assert isinstance(m, Marked) and torch.equal(changed, m.masks.cpu()) and m.masks.any((1, 2)).all()
    assert not m.masks[:, 32:64, 32:64].any() and m.y.mean() == .5 and len(set(m.slides)) == 12
    assert torch.equal(marked_patches(kind, N).x, m.x) and not torch.equal(marked_patches(kind, N, seed=1).x, m.x)


def test_patches_of_a_split_without_slides():
    from dataclasses import replace
    split = open_split('test', synthetic_folder(dict(test=512)))
    unknown = replace(split, meta=None)
    m = marked_patches('ink', 8, unknown)
    assert m.slides is None and m.y.mean() == .5
    row = detection(mark_excess(dict(edges=edge_map), {0: Pair(reader(0.), reader(1.))}, m._replace(x=m.x))).iloc[0]
    assert (row['by'], row.n, row.estimate) == ('patch', 8, .5)


def test_what_does_not_fit():
    with pytest.raises(ValueError, match='has no place'): marked_patches('stain_shift', 4)
    with pytest.raises(ValueError, match='halo'): marked_patches('halo', 4)
    with pytest.raises(ValueError, match='has no option'): mark_excess(dict(s=saliency), {0: Pair(reader(0.), reader(1.))},
                                                                       marked_patches(n=2), window=3)


def test_no_trace(pairs, marked):
    before = [p.clone() for m in planted_ones(pairs) for p in m.parameters()], marked.x.clone(), marked.masks.clone()
    mark_excess(dict(s=saliency), pairs, marked); likeness(dict(s=saliency), pairs, marked.plain)
    after = [p for m in planted_ones(pairs) for p in m.parameters()], marked.x, marked.masks
    assert all(torch.equal(a, b) for a, b in zip(before[0], after[0])) and torch.equal(before[1], after[1])
    assert torch.equal(before[2], after[2]) and all(p.grad is None for p in after[0])


def test_one_call(pairs, marked, monkeypatch):
    "`shortcut_test` is the two tables of its pairs; options reach the explainer."
    monkeypatch.setattr(detective, 'shortcut_pair', lambda kind, seed, device: pairs[seed])
    monkeypatch.setattr(detective, 'marked_patches', lambda kind, n, device: marked)
    one = detective.shortcut_test(saliency, seeds=(0, 2), score='logit')
    found = mark_excess(dict(m=saliency), {s: pairs[s] for s in (0, 2)}, marked, score='logit')
    for name, f in dict(detection=detection, false_alarm=false_alarm).items():
        expected = f(found).iloc[0].to_dict() | dict(method='explainer')
        pd.testing.assert_series_equal(pd.Series(one[name]), pd.Series(expected))
    assert one['detection']['seeds'] == 2


def test_clean_and_planted_see_the_same_patches():
    "Same tissue, labels and slides; the mark is the only difference."
    from pcam_tp.shortcuts import read_shortcut, shortcut_folder
    sizes = detective._RUNS['quick']['sizes']
    clean, planted = (open_split('train', f) for f in (synthetic_folder(sizes), shortcut_folder('ink', .9, sizes=sizes)))
    present, mask = read_shortcut(planted)
    assert np.array_equal(clean.y, planted.y) and np.array_equal(clean.slides, planted.slides)
    assert np.array_equal((clean.patches() != planted.patches()).any(-1), mask)
    assert np.corrcoef(present, planted.y)[0, 1] == pytest.approx(.9, abs=.01)


def test_a_recipe_of_its_own_has_a_folder_of_its_own(tmp_path, monkeypatch):
    "`trained(recipe=…)`: another batch size is another network; no recipe is the course's."
    from pathlib import Path
    from pcam_tp import recipe
    from pcam_tp.data import subset
    monkeypatch.setattr(recipe, 'home', lambda *parts: tmp_path.joinpath(*parts))
    (tmp_path/'data'/'models').mkdir(parents=True)
    splits = [subset(open_split('test', synthetic_folder(dict(test=512))), n) for n in (128, 32)]
    made = [Path(recipe.trained('small_cnn', *splits, epochs=1, width=.05, recipe=r).card['folder']).name
            for r in (None, {}, dict(batch_size=16))]
    assert made[0] == made[1] != made[2]
