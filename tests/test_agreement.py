"""What 11_agreement cannot show: known answers, scipy and scikit-learn, ties, conditions, few slides, odd input."""
from math import comb

import numpy as np
import pytest
import torch
from scipy.spatial.distance import braycurtis
from sklearn.metrics import jaccard_score

from pcam_tp.agreement import (MEASURES, conditions, matched_pairs, model_agreement, plot_model_agreement, specificity,
                               top_iou, weighted_iou)
from pcam_tp.agreement import _pairwise_weighted, _shares
from pcam_tp.maps import chance_iou, random_maps, rank_correlation, top_mask

g = torch.Generator().manual_seed(0)
A, B = torch.randn(2, 12, 40, 36, generator=g)


def test_weighted_against_scipy():
    "Ruzicka = (1 − d)/(1 + d) for the Bray–Curtis distance d of maps of one sum."
    for a, b, found in zip(_shares(A), _shares(B), weighted_iou(A, B)):
        d = braycurtis(a.cpu().flatten(), b.cpu().flatten())
        assert found.item() == pytest.approx((1 - d)/(1 + d), abs=1e-9)


def test_weighted_known_answers():
    a = torch.zeros(1, 4, 4); a[0, 0] = torch.tensor([3., 1, 0, 0])
    b = torch.zeros(1, 4, 4); b[0, 0] = torch.tensor([1., 1, 2, 0])
    assert weighted_iou(a, b).item() == pytest.approx(2/6)   # shares (3, 1, 0)/4 and (1, 1, 2)/4: min 2, max 6
    assert weighted_iou(10*a, b).item() == pytest.approx(2/6) and weighted_iou(b, a).item() == pytest.approx(2/6)
    assert weighted_iou(a - 5*(a == 0), b).item() == pytest.approx(2/6)   # evidence against the class does not count
    assert weighted_iou(a, a).item() == 1 and weighted_iou(a, a.flip(1)).item() == 0
    found = weighted_iou(torch.cat([a, -a, 0*a]), torch.cat([b, b, b]))
    assert found.isnan().tolist() == [False, True, True]


def test_chance_of_the_weighted_overlap_is_not_that_of_the_thresholded():
    u = torch.rand(2, 50, 64, 64, generator=g)
    assert weighted_iou(*u).mean().item() == pytest.approx(.5, abs=.01)   # E min/E max of two uniform numbers: (1/3)/(2/3)
    assert top_iou(*u).mean().item() == pytest.approx(chance_iou(.25), abs=.005)


@pytest.mark.parametrize('q', [.05, .1, .25, .5])
def test_thresholded_against_scikit_learn(q):
    for a, b, found in zip(top_mask(A, q), top_mask(B, q), top_iou(A, B, q)):
        assert found.item() == pytest.approx(jaccard_score(a.flatten().numpy(force=True), b.flatten().numpy(force=True)))


@pytest.mark.parametrize('grid, chance, spread', [(3, .180, .152), (6, .158, .066), (12, .154, .031)])
def test_smooth_maps_have_a_chance_of_their_own(grid, chance, spread):
    "Simulated with 20,000 pairs, bilinear: mean and spread of the top quarter's IoU of unrelated maps."
    maps = [random_maps(300, (grid, grid), seed=s) for s in (0, 1)]
    found = top_iou(*maps)
    assert found.mean().item() == pytest.approx(chance, abs=4*spread/300**.5) and found.std().item() == pytest.approx(spread, rel=.2)
    table = model_agreement(dict(a=maps[0][:100], b=maps[1][:100]), measures=['top_iou']).iloc[0]
    for null in ('other', 'shifted'): assert table[null] == pytest.approx(chance, abs=5*spread/100**.5)   # what the formula misses


def test_ties_keep_the_area():
    "Nine superpixels: at or above the quantile a third is kept, and unrelated maps seem to agree."
    cells = torch.stack([torch.stack([torch.randperm(9, generator=g).view(3, 3) for _ in range(3000)]) for _ in range(2)])
    maps = cells.float().repeat_interleave(8, -1).repeat_interleave(8, -2)
    loose = maps >= maps.flatten(2).quantile(.75, 2)[..., None, None]
    assert loose.float().mean().item() == pytest.approx(1/3)
    kept = sum(comb(3, k)*comb(6, 3 - k)/comb(9, 3)*k/(6 - k) for k in range(4))   # by hand: .226
    both = (loose[0] & loose[1]).sum((1, 2))/(loose[0] | loose[1]).sum((1, 2))
    assert both.mean().item() == pytest.approx(kept, abs=.02)
    assert (top_mask(maps[0]).sum((1, 2)) == 144).all() and top_iou(*maps[:, :400]).mean() < kept - .02


def test_pairs_of_all_images():
    square = _pairwise_weighted(_shares(A), _shares(B))
    for i, j in ((0, 0), (3, 7), (11, 2)):
        assert square[i, j].item() == pytest.approx(weighted_iou(A[i:i + 1], B[j:j + 1]).item(), abs=1e-9)
    table = model_agreement(dict(a=A, b=B)).set_index('measure')
    means = dict(weighted_iou=weighted_iou(A, B).mean(), top_iou=top_iou(A, B).mean(), rank_correlation=rank_correlation(A, B).mean())
    for m in MEASURES:
        assert table.estimate[m] == pytest.approx(float(means[m]), abs=1e-6)
        others = [float(v) for i in range(12) for j in range(12) if i != j for v in [
            dict(weighted_iou=weighted_iou, top_iou=top_iou, rank_correlation=rank_correlation)[m](A[i:i + 1], B[j:j + 1])[0]]]
        assert table.other[m] == pytest.approx(np.mean(others), abs=1e-6)
        assert table.difference[m] == pytest.approx(table.estimate[m] - table.other[m], abs=1e-9)


def test_a_shared_signal_is_found_and_an_unrelated_one_is_not():
    "Models a and b share a patch's map, c has its own; in the declared direction: a, b above a, c."
    shared, own = random_maps(24, (12, 12), seed=3), random_maps(24, (12, 12), seed=4)
    noise = lambda s: .2*random_maps(24, (24, 24), seed=s)
    table = model_agreement(dict(a=shared + noise(5), b=shared + noise(6), c=own + noise(7))).set_index(['measure', 'a', 'b'])
    for m in MEASURES:
        assert table.difference[m, 'a', 'b'] > .1 and table.p_holm[m, 'a', 'b'] < .01
        assert abs(table.difference[m, 'a', 'c']) < .06 and table.estimate[m, 'a', 'b'] > table.estimate[m, 'a', 'c'] + .1
    assert (table.p_holm >= table.p).all()


def test_groups_of_images():
    found = conditions([0, 1, 2, 1, 0], [0, 1, 1, 2, 1], [0, 2, 2, 1, 2])   # three classes
    assert {k: v.tolist() for k, v in found.items()} == {
        'all': [True]*5, 'same prediction': [True, True, False, False, False], 'other prediction': [False, False, True, True, True],
        'both right': [True, False, False, False, False], 'both wrong alike': [False, True, False, False, False]}
    assert list(conditions([0], [0])) == ['all', 'same prediction', 'other prediction']


def test_conditions_take_their_images():
    pred, y = dict(a=np.array([0, 1]*6), b=np.array([0, 1, 1, 1]*3)), np.array([0, 1, 1, 0]*3)
    table = model_agreement(dict(a=A, b=B), pred=pred, y=y).set_index(['measure', 'condition'])
    right = conditions(pred['a'], pred['b'], y)['both right']
    alone = model_agreement(dict(a=A[right], b=B[right])).set_index('measure')
    for m in MEASURES:
        assert table.images[m, 'both right'] == right.sum() == table.n[m, 'both right']
        np.testing.assert_allclose(float(table.estimate[m, 'both right']), alone.estimate[m], rtol=1e-6)
        np.testing.assert_allclose(float(table.other[m, 'both right']), alone.other[m], rtol=1e-6)
    some = model_agreement(dict(a=A, b=B), pred=pred, only=['same prediction'], measures=['top_iou'])
    assert some.condition.tolist() == ['same prediction'] and some.estimate[0] == pytest.approx(table.estimate['top_iou', 'same prediction'])


def test_maps_that_cannot_be_judged_are_left_out():
    a = A.clone(); a[0], a[1] = 0, -a[1].abs() - 1   # constant; nothing positive
    table = model_agreement(dict(a=a, b=B)).set_index('measure')
    assert table.images.to_dict() == dict(weighted_iou=10, top_iou=11, rank_correlation=11)
    np.testing.assert_allclose(table.estimate['weighted_iou'], weighted_iou(A[2:], B[2:]).mean().item(), rtol=1e-6)
    empty = model_agreement(dict(a=0*A, b=B))
    assert empty.estimate.isna().all() and (empty.images == 0).all()


def test_few_slides_have_no_interval():
    by = np.repeat(list('abc'), 4)
    table = model_agreement(dict(a=A, b=B), by)
    assert table.low.isna().all() and table.estimate.notna().all() and (table.n == 3).all() and (table.images == 12).all()
    assert model_agreement(dict(a=A, b=B), np.repeat(range(6), 2)).low.notna().all()


def test_two_models_in_any_order_and_no_trace():
    kept = A.clone()
    one, two = (model_agreement(m).set_index('measure') for m in (dict(a=A, b=B), dict(b=B, a=A)))
    np.testing.assert_allclose(one.estimate, two.estimate, rtol=1e-9)
    np.testing.assert_allclose(one.other, two.other, rtol=1e-9)
    assert (A == kept).all()
    again = model_agreement(dict(a=A, b=B)).set_index('measure')
    assert again.equals(one)


def test_pointed_and_broad():
    one = torch.zeros(1, 8, 8); one[0, 2, 3] = 7
    s = specificity(torch.cat([one, torch.ones(1, 8, 8), 3*one]))
    np.testing.assert_allclose(s.maximum, [64, 1, 64]); np.testing.assert_allclose(s.spread, [63**.5, 0, 63**.5], atol=1e-12)


def test_matched_pairs():
    table = matched_pairs(dict(a=.91, b=.93, c=.80), .02 + 1e-9)
    assert table[['a', 'b', 'matched']].values.tolist() == [['a', 'b', True], ['a', 'c', False], ['b', 'c', False]]


def test_the_figure_has_a_panel_for_each_method():
    t = model_agreement(dict(a=A, b=B, c=A + B), measures=['top_iou'])
    fig = plot_model_agreement(dict(one=t, two=t), 'title')
    assert [ax.get_title() for ax in fig.axes] == ['one', 'two'] and len(fig.axes[0].texts) == 6
    assert all(c.collections[0].get_clim() == (0, 1) for c in fig.axes)


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match='pairs of maps'): weighted_iou(A, B[:, :8])
    with pytest.raises(ValueError, match=r'\(0, 1\]'): top_iou(A, B, 25)
    with pytest.raises(ValueError, match='NaN'): model_agreement(dict(a=A, b=B/0*0))
    with pytest.raises(ValueError, match='measure'): model_agreement(dict(a=A, b=B), measures=['cosine'])
    with pytest.raises(ValueError, match='images'): model_agreement(dict(a=A, b=B[:3]))
    with pytest.raises(ValueError, match='two models'): model_agreement(dict(a=A))
