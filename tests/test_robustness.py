"""What a reader of 09c_robustness runs past: real layers, many classes, seeds and batches, no trace, Quantus' numbers,
cut runs, holes of one explainer that are no other's, splits with slides."""
from dataclasses import replace
from pathlib import Path

import captum.attr
import numpy as np
import pandas as pd
import pytest
import torch
from captum.metrics import sensitivity_max
from torch import nn

from conftest import settled
from pcam_tp import recipe
from pcam_tp.cam import gradcam
from pcam_tp.classifier import Classifier, predict
from pcam_tp.controls import centre_map, random_map, untrained
from pcam_tp.data import Split
from pcam_tp.leaderboard import as_explainer
from pcam_tp.measures import measure, remaker
from pcam_tp.methods import from_captum
from pcam_tp.models import build
from pcam_tp.questions import Question, explainer
from pcam_tp.robustness import (_hole_grid, _without, haas, haas_controls, haas_gain, haas_table, highlighted, linf_noise,
                                max_sensitivity, roar, roar_splits, unit_maps)
from pcam_tp.saliency import input_x_gradient, saliency, smoothed, smoothgrad

X = torch.rand(5, 3, 48, 48, generator=torch.Generator().manual_seed(0))
NEAR = dict(rtol=1e-3, atol=1e-5)   # norms of 2,304 differences in 32 bits
close = lambda a, b: torch.testing.assert_close(a.cpu(), b.cpu(), **NEAR)


@pytest.fixture
def model(): return settled(build('small_cnn', width=.2, n_classes=3), X)


# Max-Sensitivity

def test_captum_on_the_same_noise(model):
    "Gradient and CAM of a convolutional network, three classes; captum asks about all disturbed images at once."
    target = torch.tensor([0, 2, 1, 0, 2])
    q = Question(model, X, target)
    for e in (saliency, gradcam, input_x_gradient):
        def maps(images):
            images = images[0] if isinstance(images, tuple) else images
            many = Question(model, X.repeat_interleave(len(images)//5, 0), target.repeat_interleave(len(images)//5))
            with torch.enable_grad(): return (remaker(e)(many, images),)   # a bare tensor would be read row by row
        def same(images): return images + torch.stack([*linf_noise(q, .08, 4)], 1).flatten(0, 1)
        theirs = sensitivity_max(maps, q.x, same, n_perturb_samples=4)
        close(max_sensitivity(model, X, e, target, radius=.08, draws=4), theirs)


class Squares(nn.Module):
    "Log-odds: weighted squares of the pixels; input × gradient is 2 w x²."
    def __init__(self): super().__init__(); self.w = nn.Parameter(torch.linspace(-1, 1, 192).view(3, 8, 8))
    def forward(self, x): z = (self.w*x**2).sum((1, 2, 3)); return torch.stack([-z/2, z/2], 1)


def test_quantus_on_the_same_noise():
    "quantus 0.6.0, MaxSensitivity(nr_samples=4, lower_bound=.2, abs=False, normalise=False, perturb_func: our noise)."
    model, x = Classifier(Squares(), mean=(0, 0, 0), std=(1, 1, 1)), torch.linspace(0, 1, 576).view(3, 3, 8, 8).roll(100)
    theirs = torch.tensor([.2655022144317627, .6128365397453308, .4745843708515167])
    close(max_sensitivity(model, x, input_x_gradient, 1, radius=.2, draws=4), theirs)


def test_it_depends_on_neither_batch_nor_company(model):
    full, known = max_sensitivity(model, X, saliency, 1, details=True, seed=3)
    close(max_sensitivity(model, X, saliency, 1, batch_size=2, seed=3), full)
    close(max_sensitivity(model, torch.cat([X[:2], X[:3].flip(0)]), saliency, 1, seed=3)[:2], full[:2])
    assert (max_sensitivity(model, X, saliency, 1, seed=4) != full).all()
    close(max_sensitivity(model, X, saliency, 1, draws=4, seed=3), known['changes'][:, :4].amax(1)/known['norm'])
    assert known['changes'].shape == (5, 10)


def test_the_class_stays_fixed(model):
    "Noise that turns the prediction does not turn the class: the target is that of the clean image."
    asked = []
    @explainer(signed=True, source='a test')
    def watches(q): asked.append(q.target.cpu()); return q.x.sum(1)
    max_sensitivity(model, X, watches, radius=.5, draws=6)
    clean = predict(model, X).argmax(1).cpu()
    assert all((t.view(-1, 5) == clean).all() for t in asked) and sum(map(len, asked)) == 7*5


def test_the_noise_fills_the_ball(model):
    noise = torch.stack([*linf_noise(Question(model, X, 0), .25, 8)])
    assert noise.shape == (8, 5, 3, 48, 48) and .2499 < noise.abs().max() <= .25 and abs(float(noise.mean())) < 1e-3
    assert abs(float(noise.std()) - .5/12**.5) < 1e-3 and len(noise[:, :, 0, 0, 0].unique()) == 40


def test_controls_win(model):
    "The oracle of direction: a map of nothing but the place is calmest, one of nothing but noise the least calm."
    @explainer(signed=True, source='a test')
    def noise(q): return (q.x.flatten(1) @ torch.ones_like(q.x[0].flatten())*1e3).sin()[:, None, None].expand_as(q.x[:, 0])
    values = measure(dict(m=max_sensitivity.using(draws=3)), model, X, dict(centre=centre_map, random=random_map,
                                                                          gradient=saliency, noise=noise), 1)['m']
    assert not max_sensitivity.higher
    assert (values['centre'] == 0).all() and (values['random'] == 0).all()
    assert (values['gradient'] > 0).all() and values['noise'].mean() > values['gradient'].mean()


def test_an_untrained_twin_and_an_odd_method(model):
    "`measure` with a remaker of its own; a method with randomness of its own does not touch the noise."
    twin = untrained(model)
    maps = {'saliency, untrained': saliency(twin, X, 1)}
    found = measure(dict(m=max_sensitivity), model, X, maps, 1, remakers={'saliency, untrained': remaker(saliency, twin)})
    close(found['m']['saliency, untrained'], max_sensitivity(twin, X, saliency, 1))
    assert max_sensitivity(model, X, smoothgrad.using(n_samples=2), 1, draws=2).isfinite().all()


def test_no_trace(model):
    before, state, random = X.clone(), [p.clone() for p in model.parameters()], torch.get_rng_state()
    model.train()
    max_sensitivity(model, X, saliency, 1, draws=2)
    haas_gain(model, X, saliency(model, X, 1), 1)
    haas(model, X, predict(model, X).argmax(1), torch.zeros(5, 48, 48))
    assert model.training and (X == before).all() and torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(state, model.parameters())) and all(p.grad is None for p in model.parameters())


# HAAS

def test_the_formula_of_its_own_range():
    a = torch.rand(5, 48, 48, generator=torch.Generator().manual_seed(1))*2 - 1
    there = ((2*X - 1)*(1 + a[:, None])).clamp(-1, 1)
    close(highlighted(X, a), (there + 1)/2)
    assert (highlighted(X, torch.zeros(5, 48, 48)) == X).all() and highlighted(X, torch.ones(5, 48, 48)).max() == 1
    close(highlighted(X, -torch.ones(5, 48, 48)), torch.full_like(X, .5))


def test_unit_maps_keep_signs():
    m = torch.tensor([[[-4., 2.]], [[0., 0.]], [[1e-30, -1e-30]]])
    assert unit_maps(m).tolist() == [[[-1, .5]], [[0, 0]], [[1, -1]]]


@pytest.mark.parametrize('a, word', [(torch.full((5, 48, 48), 1.1), 'unit_maps'), (torch.zeros(5, 48), 'expected (5, 48, 48)'),
                                     (torch.full((5, 48, 48), torch.nan), 'unit_maps')])
def test_what_is_no_map(model, a, word):
    with pytest.raises(ValueError, match=word.replace('(', r'\(').replace(')', r'\)')): haas(model, X, [0]*5, a)


def test_many_classes(model):
    "Being right is the largest logit: with three classes not the sign of the log-odds."
    a, y = unit_maps(saliency(model, X, 1)), torch.tensor([0, 1, 2, 0, 1])
    after, before = ((predict(model, images).argmax(1).cpu() == y.cpu()).float() for images in (highlighted(X, a), X))
    assert (haas_gain(model, X, a, y) == after - before).all()
    assert (haas_gain(model, X, a, y, batch_size=2) == after - before).all()
    if before.any(): assert haas(model, X, y, a).estimate == pytest.approx(float(after.sum()/before.sum()))


class Halves(nn.Module):
    "Log-odds: contrast of the left half plus that of the right."
    def __init__(self): super().__init__(); self.one = nn.Parameter(torch.ones(()))
    def forward(self, x): z = self.one*(x - .5).sum((1, 2, 3)); return torch.stack([-z, z], 1)


def halves(n=240):
    dull = torch.rand(n, 2, generator=torch.Generator().manual_seed(0))*.5 + .25
    true = torch.cat([torch.ones(n, 8, 4), -torch.ones(n, 8, 4)], 2)
    model = Classifier(Halves(), mean=(0, 0, 0), std=(1, 1, 1))
    return model, dull.repeat_interleave(4, 1)[:, None, None].expand(-1, 3, 8, -1).contiguous(), (dull[:, 0] > .5).long(), true


def test_true_above_random_above_inverse():
    model, x, y, true = halves()
    noise = torch.rand(240, 8, 8, generator=torch.Generator().manual_seed(1))*2 - 1
    slides = np.arange(240) % 12
    t, r, i = (haas(model, x, y, a, slides) for a in (true, noise, -true))
    assert t.low > r.estimate > i.high and t.by == 'slide' and t.n == 12 and haas_gain.higher
    gain = [haas_gain(model, x, a, y).mean() for a in (true, noise, -true)]
    assert gain[0] > gain[1] > gain[2] and gain[0] > 0 > gain[2]


def test_the_interval_is_paired():
    "Where nothing changes it has no width, though the accuracy is uncertain; below six slides there is none."
    model, x, y, true = halves()
    assert haas(model, x, y, 0*true)[:3] == (1, 1, 1) and haas(model, x, y, 0*true, np.arange(240) % 8)[:3] == (1, 1, 1)
    few = haas(model, x, y, true, np.arange(240) % 3)
    assert np.isnan([few.low, few.high]).all() and few.estimate > 1
    table = haas_table(model, x, y, dict(a=true), np.arange(240) % 3)
    assert table.low.isna().all() and table.difference.notna().all() and table.p.notna().all()


def test_a_table_of_differences():
    model, x, y, true = halves()
    t = haas_table(model, x, y, dict(a=true, b=-true))
    assert t.name.tolist() == ['a']*3 + ['b']*3 and t.control.tolist() == ['constant', 'shuffled', 'other']*2
    torch.testing.assert_close(torch.tensor((t.estimate - t.of_control).values), torch.tensor(t.difference.values))
    assert (t.p_holm >= t.p).all() and (t.of_control[t.control == 'constant'] == 1).all(), 'a constant of 0 changes nothing'
    assert haas_controls(true, 1)['shuffled'].ne(haas_controls(true, 2)['shuffled']).any()


def test_nothing_to_divide_by():
    model, x, y, true = halves()
    with pytest.raises(ValueError, match='no denominator'): haas(model, x, y + 2, true)
    with pytest.raises(ValueError, match='a label per image'): haas(model, x, y[:3], true)


# ROAR

@explainer(signed=False, source='a test', backward=False)
def square(q): return q.x.amax(1) - q.x.amin(1)


def world(n, seed, side=16):
    "Grey patches with a coloured square somewhere: red or blue is the class."
    rng = np.random.default_rng(seed)
    y, x = rng.permutation(np.arange(n) % 2), np.repeat(rng.integers(100, 156, (n, side, side, 1), dtype=np.uint8), 3, 3)
    for p, c in zip(x, y):
        i, j = rng.integers(0, side - 4, 2)
        p[i:i + 4, j:j + 4] = ((60, 60, 230), (230, 60, 60))[c]
    meta = pd.DataFrame(dict(wsi=[f's{i % 7}' for i in range(n)]))
    return Split(Path('world'), 'toy', x, y, np.arange(n), meta, classes=('blue', 'red'))


@pytest.fixture
def splits(tmp_path, monkeypatch):
    monkeypatch.setenv('PCAM_TP_HOME', str(tmp_path))
    return tuple(world(n, i) for i, n in enumerate((192, 32, 70)))


run = dict(fractions=(1/16,), epochs=5, width=.1)


def test_removed_from_both(splits):
    "Exactly the square goes, in every split, and slides and labels stay; what remains is the mean colour of training."
    model = settled(build('small_cnn', width=.1, classes=('blue', 'red')), X)
    (m, f, parts), = roar_splits(model, splits, dict(square=square), (1/16,))
    colour = splits[0].raw.reshape(-1, 3).mean(0).round()
    for before, after in zip(splits, parts):
        x, new = before.patches(), after.patches()
        marked = np.ptp(x.astype(int), axis=3) > 0
        assert (new[marked] == colour).all() and (new[~marked] == x[~marked]).all() and marked.sum() == 16*len(x)
        assert (after.y == before.y).all() and (after.slides == before.slides).all() and len(after) == len(before)
        assert (after.patches([5, 2]) == new[[5, 2]]).all() and (after.raw[3] == new[3]).all()
        assert _hole_grid(after, 4).sum(1) == pytest.approx(np.ones(len(x))), 'a sixteenth of 16 cells'


def test_part_of_a_split(splits):
    "Rows of the file and places in the split are not the same."
    part = replace(splits[2], rows=np.array([9, 3, 60]))
    hidden = np.packbits(np.ones((3, 256), bool), axis=1)
    gone = _without(part, hidden, np.array([1, 2, 3], np.uint8))
    assert (gone.patches() == [1, 2, 3]).all() and (gone.y == splits[2].y[[9, 3, 60]]).all()
    assert gone.slides.tolist() == [splits[2].slides[i] for i in (9, 3, 60)]


def test_the_square_is_all_there_is(splits):
    "True below random: the declared direction; and the inverse, which keeps the square, is no better than random."
    @explainer(signed=True, source='a test', backward=False)
    def inverse(q): return -square.on(q)[0]
    table, found = roar('small_cnn', splits, dict(square=square, inverse=inverse), **run)
    acc = table.set_index('method').estimate
    assert acc['all pixels'] > .9 and acc['random'] > .9 and acc['inverse'] > .9 and acc['square'] < .7
    row = table.set_index('method').loc['square']
    assert row.difference < -.25 and row.difference_high < 0 and row.n == 7 and row.by == 'slide'
    assert row.difference == pytest.approx(acc['square'] - acc['random']) and .3 < row.mask_auc < .7
    assert row.auc_difference == pytest.approx(row.auc - table.set_index('method').auc['random']) and row.auc_difference < -.2
    assert [*found] == [('all pixels', 0.)] + [(m, 1/16) for m in ('random', 'square', 'inverse')]
    assert len(found['square', 1/16]) == 1 and len(found['square', 1/16][0]) == 70


def test_a_cut_run_goes_on(splits, monkeypatch):
    "Cut in its third training; the second call trains what is missing, and the table is that of a run in one piece."
    fit, calls = recipe.fit, []
    def cut(model, *args, **kwargs):
        if len(calls) == 2: raise KeyboardInterrupt
        calls.append(model)
        return fit(model, *args, **kwargs)
    monkeypatch.setattr(recipe, 'fit', cut)
    with pytest.raises(KeyboardInterrupt): roar('small_cnn', splits, dict(square=square), **run)
    def count(*args, **kwargs): calls.append(0); return fit(*args, **kwargs)
    monkeypatch.setattr(recipe, 'fit', count)
    table, _ = roar('small_cnn', splits, dict(square=square), **run)
    assert len(calls) == 3, 'two were there'
    again, _ = roar('small_cnn', splits, dict(square=square), **run)
    assert len(calls) == 3, 'nothing is trained twice'
    pd.testing.assert_frame_equal(table, again)


def holes(splits, explainers, model):
    "Where each method cuts the test patches, name → (N, H, W)."
    return {m: parts[2].raw.holes() for m, _, parts in roar_splits(model, splits, explainers, (1/16,))}


def test_each_explainer_cuts_its_own_holes(splits, tmp_path):
    "Two with the same code around them: functions, wrapped methods, adapters and their options."
    model = settled(build('small_cnn', width=.1, classes=('blue', 'red')), X)
    top, left = torch.zeros(2, 16, 16)
    top[0], left[:, 0] = 1, 1   # a sixteenth of the pixels
    marks = lambda m: as_explainer(lambda model, x, target: m.to(x.device).expand(len(x), -1, -1))
    adapted = lambda n: from_captum(captum.attr.IntegratedGradients, n_steps=n)
    found = holes(splits, dict(top=marks(top), left=marks(left), lit=as_explainer(lambda model, x, target: x.amax(1)),
                               dark=as_explainer(lambda model, x, target: -x.amax(1)), flat=smoothed(square, 2),
                               deep=smoothed(saliency, 2), two=adapted(2), six=adapted(6)), model)
    assert (found['top'] == (top > 0).numpy(force=True)).all() and (found['left'] == (left > 0).numpy(force=True)).all()
    for a, b in (('top', 'left'), ('lit', 'dark'), ('flat', 'deep'), ('two', 'six')): assert (found[a] != found[b]).any(), (a, b)
    assert len(found) == len([*(tmp_path/'data'/'roar').glob('*.h5')])


def test_each_network_cuts_its_own_holes(splits):
    "The same weights behind another normalisation, or another output."
    net = settled(build('small_cnn', width=.1), X).net
    of = lambda **how: holes(splits, dict(g=input_x_gradient), Classifier(net, **how))['g']
    kinds = [of(), of(std=(.9, .1, .3)), of(output=lambda out: out*torch.tensor([1., -2.], device=out.device))]
    assert len({h.tobytes() for h in kinds}) == 3 and (of() == kinds[0]).all()


def test_what_has_no_description_is_cut_each_time(splits, tmp_path):
    model, dice, calls = settled(build('small_cnn', width=.1, classes=('blue', 'red')), X), np.random.default_rng(0), []
    drawn, once = as_explainer(lambda model, x, target: calls.append(1) or x.amax(1)*float(dice.random())), None
    for n in (1, 2):
        with pytest.warns(UserWarning, match='holes of drawn: computed each time'): assert holes(splits, dict(drawn=drawn), model)
        once = once or len(calls)
        assert len(calls) == n*once and not [*(tmp_path/'data').rglob('*.h5')]


def test_fractions_and_seeds(splits):
    with pytest.raises(ValueError, match='expected shares'): next(roar_splits(None, splits, {}, (0, .5)))
    table, found = roar('small_cnn', splits, {}, (.5,), seeds=(0, 1), epochs=2, width=.1)
    assert table.method.tolist() == ['all pixels', 'random'] and [len(v) for v in found.values()] == [2, 2]
    right = np.mean([(p.pred == p.y).mean() for p in found['random', .5]])
    assert table.estimate[1] == pytest.approx(right) and table.difference.isna().all()
