"The leaderboard: known winners, directions, who gets a rank, what is kept; the certificate: who fails what."
from types import SimpleNamespace

import captum.attr
import numpy as np
import pandas as pd
import pytest
import pytorch_grad_cam
import torch
from torch import nn

from pcam_tp import leaderboard as board
from pcam_tp.classifier import Classifier, predict
from pcam_tp.controls import CONTROL_KINDS, CONTROLS, edge_map, other, shifted, with_controls
from pcam_tp.leaderboard import (METRICS, as_explainer, as_markdown, board_summary, certify, choose_metrics, leaderboard,
                                 metric_agreement, plan, plot_leaderboard, save_leaderboard)
from pcam_tp.measures import metric
from pcam_tp.methods import METHODS, from_captum, from_gradcam
from pcam_tp.models import build
from pcam_tp.questions import answers, explainer
from pcam_tp.stats import holm, interval, paired_test

N = 12


def planted():
    "Grey images, each with a bright 8×8 square at a place of its own, and where it is."
    dice = torch.Generator().manual_seed(0)
    x, masks = .3 + .1*torch.rand(N, 3, 48, 48, generator=dice), torch.zeros(N, 48, 48) > 0
    for i in range(N):
        r, c = 4*(i % 4) + 12*(i//4), (7*i) % 40
        x[i, :, r:r + 8, c:c + 8] += .5
        masks[i, r:r + 8, c:c + 8] = True
    return x, masks


X, MASKS = planted()


class Bright(nn.Module):
    "The logit of class 1 is the sum of what is brighter than .5; other weights see something else."
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 1, 1, bias=False)
        nn.init.constant_(self.conv.weight, 1/3)
    def evidence(self, x): return (self.conv(x)[:, 0] - .5).relu()
    def forward(self, x):
        z = self.evidence(x).sum((1, 2))/4 - 2
        return torch.stack([-z/2, z/2], 1)


@pytest.fixture
def model(): return Classifier(Bright(), mean=(0, 0, 0), std=(1, 1, 1)).eval()


@explainer(signed=True, source='the truth')
def truth(q):
    with torch.no_grad(): return q.model.net.evidence(q.x)


@explainer(signed=True, source='the truth, upside down')
def inverse(q): return -truth.on(q)[0]


@explainer(signed=True, source='one map for all')
def constant(q): return torch.ones_like(q.x[:, 0])


@metric(higher=True, source='a test', needs='masks', chance=0.)
def inside(q, maps, masks):
    "Mean on the region less the mean elsewhere; NaN without a region."
    area = masks.flatten(1).float().mean(1)
    return ((maps*masks).flatten(1).mean(1)/area - maps.flatten(1).mean(1)).where(area > 0, torch.nan)


@metric(higher=False, source='a test', score=None, needs='remake', passes=lambda draws, **_: draws)
def moves(q, maps, remake, *, draws:int=1):
    return (remake(q.x + .01) - maps).flatten(1).norm(dim=1)


PANEL = dict(insertion=METRICS['insertion'].using(steps=12), deletion=METRICS['deletion'].using(steps=12), inside=inside)
METHODS_OF = dict(truth=truth, inverse=inverse)


def made(model, methods=METHODS_OF, metrics=PANEL, **options):
    options = dict(masks=MASKS, keep=False, target=1, baseline='black') | options
    return leaderboard(model, X, methods=methods, metrics=metrics, **options)


def own(table, group='all'): return table[(table.group == group) & (table.control == 'none')].set_index(['metric', 'method'])


def test_the_truth_wins_by_every_metric(model):
    "Whatever the direction: true map before its inverse, better than each control; the inverse better than none."
    table = made(model)
    found = own(table)
    for m in PANEL:
        assert found['rank'][m].to_dict() == dict(truth=1, inverse=2), m
        assert found.better[m].to_dict() == dict(truth=True, inverse=False), m
    against = table[(table.method == 'truth') & table.control.isin(CONTROL_KINDS)]
    assert (against.difference_lo > 0).all() and (against.p_holm < .05).all() and against.better.all() and len(against) == 9
    worse = table[(table.method == 'inverse') & table.control.isin(('other', 'shifted'))]
    assert (worse.difference < 0).all() and not worse.better.any()
    assert set(table.score) == {'probability'} and set(table.baseline) == {'black'}


def test_numbers_are_those_of_the_metric(model):
    table, slides = made(model, by=np.repeat(np.arange(6), 2)), np.repeat(np.arange(6), 2)
    one = lambda m, e: PANEL[m](model, X, e, 1, masks=MASKS, baseline='black').double().numpy()
    for m in PANEL:
        row, i = own(table).loc[(m, 'truth')], interval(one(m, truth), slides, bounded=False)
        np.testing.assert_allclose([row['mean'], row.lo, row.hi], i[:3], rtol=1e-4, atol=1e-6)
        assert (row.n, row.patches, row.by) == (6, 12, 'slide')
    row = table[(table.metric == 'deletion') & (table.method == 'truth') & (table.control == 'other')].iloc[0]
    maps = truth(model, X, 1)
    t = paired_test(one('deletion', other(maps)), one('deletion', maps), slides)   # control − method: lower is better
    np.testing.assert_allclose([row.difference, row.difference_lo, row.difference_hi, row.p], t[:4], rtol=1e-4)


def test_every_method_stands_beside_random_numbers(model):
    "Is it better than a random map? Difference, interval and p in one row; no row where standing still would win."
    table = made(model, metrics=PANEL | dict(moves=moves))
    row = table[(table.group == 'all') & (table.metric == 'deletion') & (table.method == 'truth') & (table.control == 'random')]
    of = lambda e: PANEL['deletion'](model, X, e, 1, baseline='black').double().numpy()
    t = paired_test(of(CONTROLS['random']), of(truth))   # random − method: lower is better
    np.testing.assert_allclose(row[['difference', 'difference_lo', 'difference_hi', 'p']].iloc[0].astype(float), t[:4], rtol=1e-3)
    assert row.better.item() and not len(table[(table.metric == 'moves') & (table.control == 'random') & (table.method == 'truth')])


@pytest.mark.parametrize('ties, better', [((), True), (('shifted',), True), (('other',), False), (('untrained',), False)])
@pytest.mark.parametrize('m, sign', [(PANEL['insertion'], 1), (PANEL['deletion'], -1)], ids=['higher', 'lower'])
def test_better_than_those_that_decide(ties, better, m, sign):
    own = np.random.default_rng(0).normal(size=N)
    values = {'a': own} | {f'a, {c}': own - sign*(0 if c in ties else 1 + .1*own) for c in CONTROL_KINDS}
    table = board._metric_rows(values, m, set(), None, 0).set_index('control')
    assert table.better.to_dict() == dict(none=better) | {c: c not in ties for c in CONTROL_KINDS}


def test_one_region_for_all(model):
    "A map of another image fits it as well, so `other` cannot decide; it is told all the same."
    x = X[:1] + .01*torch.rand(N, 1, 48, 48, generator=torch.Generator().manual_seed(2))
    options = dict(methods=dict(truth=truth), masks=MASKS[0], keep=False, target=1, baseline='black')
    table = leaderboard(model, x, metrics=dict(inside=inside, deletion=PANEL['deletion']), **options).set_index(['metric', 'control'])
    assert not table.better['inside', 'other'] and table.better['inside', 'untrained'] and table.better['inside', 'none']
    assert not table.better['deletion', 'other'] and not table.better['deletion', 'none']


def test_holm_in_each_metric_and_group(model):
    table = made(model, y=np.arange(N) % 2)
    for _, t in table.groupby(['group', 'metric']):
        np.testing.assert_allclose(t.p_holm, holm(t.p))
        assert t.p.notna().sum() == 2*len([*CONTROL_KINDS, 'random'])


def test_controls_and_constant_maps_have_no_rank(model):
    table = made(model, METHODS_OF | dict(constant=constant), PANEL | dict(moves=moves))
    assert set(CONTROLS) <= set(table.method)
    assert table[table.method.isin(CONTROLS) | (table.control != 'none') | (table.method == 'constant')]['rank'].isna().all()
    assert not table[table.method.isin([*CONTROLS, 'constant'])].better.any()
    still = table[(table.metric == 'moves') & (table.method == 'constant')]
    assert still['mean'].isna().all() and (still.patches == 0).all()   # no prize for standing still
    assert set(table[table.metric == 'moves'].control) == {'none', 'untrained', *CONTROLS}   # nobody remakes a shifted map
    assert own(table)['rank']['moves'].notna().sum() == 2


def test_patches_without_a_value_are_left_out_pairwise(model):
    masks = MASKS.clone()
    masks[:4] = False
    table = made(model, masks=masks)
    t = table[table.metric == 'inside']
    assert (t.patches == 8).all() and (t.n == 8).all() and (table[table.metric == 'deletion'].patches == 12).all()
    values = {k: inside(model, X, maps, 1, masks=masks).numpy()[4:] for k, maps in
              dict(own=truth(model, X, 1), moved=shifted(truth(model, X, 1))).items()}
    p = t[(t.method == 'truth') & (t.control == 'shifted')].p.item()
    assert abs(p - paired_test(values['own'], values['moved']).p) < 1e-6
    none = made(model, metrics=dict(inside=inside), masks=~MASKS & False)
    assert (none.patches == 0).all() and none['mean'].isna().all() and none['rank'].isna().all() and not none.better.any()


def test_few_slides_have_no_interval(model):
    table = made(model, by=np.arange(N) % 5)
    assert table[['lo', 'hi', 'difference_lo']].isna().all(axis=None) and table['mean'].notna().all()
    one = made(model, by=np.zeros(N))
    assert one.p.isna().all() and not one.better.any() and own(one)['rank'].notna().all()


def test_groups(model):
    y = torch.arange(N) % 2
    labels = made(model, y=y.cpu().numpy())
    assert set(labels.group) == {'all', 'right', 'wrong'}   # one class is predicted for all
    assert (labels[labels.group == 'right'].patches == 6).all()
    small = build('small_cnn', width=.1).eval()
    x = torch.rand(N, 3, 96, 96, generator=torch.Generator().manual_seed(1))
    z = small(x).detach()
    [m for m in small.modules() if isinstance(m, nn.Linear)][-1].bias.data[1] -= (z[:, 1] - z[:, 0]).median()
    table = leaderboard(small, x, methods='saliency', metrics=dict(srg=METRICS['srg'].using(steps=2)), keep=False)
    assert {'predicted normal', 'predicted tumour'} <= set(table.group)
    parts = [own(table, g).patches.iloc[0] for g in ('predicted normal', 'predicted tumour')]
    assert sum(parts) == N and min(parts) > 1


def test_the_batch_does_not_matter(model):
    metrics = PANEL if X.device.type == 'cpu' else dict(inside=inside)   # ties are drawn from the map's bytes
    a, b = made(model, metrics=metrics), made(model, metrics=metrics, batch_size=5)
    pd.testing.assert_frame_equal(a, b, rtol=1e-3, atol=1e-5)


def passes(model, work):
    count = [0]
    hook = model.register_forward_pre_hook(lambda m, i: count.__setitem__(0, count[0] + len(i[0])))
    try: return work(), count[0]
    finally: hook.remove()


def test_what_was_measured_is_kept(model, tmp_path, monkeypatch):
    predict(model, X)   # the first use asks more, and the hook's count belongs to what the network is
    first, n = passes(model, lambda: made(model, keep=tmp_path))
    again, m = passes(model, lambda: made(model, keep=tmp_path))
    pd.testing.assert_frame_equal(first, again)
    files = {p: p.stat().st_mtime_ns for p in tmp_path.glob('*.csv')}
    assert len(files) == 5*len(PANEL) and m < n/3   # two methods and three controls
    model.net.conv.weight.data *= 1.1   # another network, other files
    made(model, keep=tmp_path)
    assert len(list(tmp_path.glob('*.csv'))) == 10*len(PANEL)
    assert all(p.stat().st_mtime_ns == t for p, t in files.items())
    made(model, keep=tmp_path, metrics=dict(inside=inside, deletion=PANEL['deletion'].using(steps=3)))
    assert len(list(tmp_path.glob('*.csv'))) == 10*len(PANEL) + 5


def test_interrupted_and_taken_up_again(model, tmp_path, monkeypatch):
    whole, done = made(model), board._Bench.measure
    def ctrl_c(self, m, maps, remakers):
        if len(list(tmp_path.glob('*.csv'))) == 4: raise KeyboardInterrupt
        return done(self, m, maps, remakers)
    monkeypatch.setattr(board._Bench, 'measure', ctrl_c)
    with pytest.raises(KeyboardInterrupt): made(model, keep=tmp_path)
    assert len(list(tmp_path.glob('*.csv'))) == 4
    monkeypatch.setattr(board._Bench, 'measure', done)
    pd.testing.assert_frame_equal(made(model, keep=tmp_path), whole)


def test_planned_passes_are_those_that_run(model):
    panel = dict(deletion=PANEL['deletion'], moves=moves.using(draws=2))
    planned = plan(model, X, METHODS_OF, panel).set_index('what')
    measured = planned.passes[['deletion', 'moves']].sum()
    counted = []
    def counting(q, make=None, k=1, rows=slice(None), scores=board.questions.__globals__['Question'].scores):
        counted.append(len(q.x[rows])*k)
        return scores(q, make, k, rows)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(board.questions.__globals__['Question'], 'scores', counting)
        made(model, metrics=panel)
    assert planned.passes['deletion'] == sum(counted) == 13*N*(2*4 + 3)
    assert planned.passes['moves'] == 2*N*(2*2 + 3) and measured == planned.passes['deletion'] + planned.passes['moves']


def test_nothing_is_left_behind(model):
    x, state = X.clone(), {k: v.clone() for k, v in model.state_dict().items()}
    torch.manual_seed(3); before = torch.get_rng_state()
    with torch.inference_mode(): made(model.train(), metrics=dict(moves=moves, **PANEL))
    assert model.training and torch.equal(X, x) and torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize('options, said', [
    (dict(metrics='beauty'), 'expected some of'), (dict(metrics=[len]), 'expected a metric'),
    (dict(metrics=[inside], masks=None), 'needs the true regions'), (dict(metrics=[inside, inside]), 'two metrics'),
    (dict(methods='beauty'), 'expected some of'), (dict(controls='nobody'), 'expected some of'),
    (dict(by=[1, 2]), '12'), (dict(y=[0, 1]), '12'), (dict(masks=MASKS[:3]), '3')])
def test_what_does_not_fit(model, options, said):
    with pytest.raises(ValueError, match=said): made(model, **options)


def test_methods_named_with_commas_or_slashes(model):
    table = made(model, {'a, b': truth, 'c/d': inverse})
    assert set(own(table).index.get_level_values(1)) == {'a, b', 'c/d'}
    assert own(table)['rank']['deletion']['a, b'] == 1


def ranks(**orders):
    return pd.DataFrame([dict(group='all', method=m, metric=k, rank=r) for k, order in orders.items()
                         for m, r in zip('abcdef', order)])


def test_agreement_of_metrics():
    t = metric_agreement(ranks(one=[1, 2, 3, 4, 5], same=[1, 2, 3, 4, 5], reverse=[5, 4, 3, 2, 1])).set_index(['a', 'b'])
    np.testing.assert_allclose(t.tau, [1, -1, -1])
    np.testing.assert_allclose(t.p, 2/120)
    np.testing.assert_allclose(t.p_holm, 6/120)
    tied = metric_agreement(ranks(one=[1, 2, 3, 4, 5], two=[1, 1, 3, 4, 5])).iloc[0]
    assert .9 < tied.tau < 1 and 2/120 < tied.p < .1
    gone = metric_agreement(ranks(one=[1, 2, np.nan, 3], two=[1, 2, 3, 4])).iloc[0]
    assert gone.n == 3 and gone.tau > .999
    assert np.isnan(metric_agreement(ranks(one=[1, 2], two=[1, 2])).tau[0])
    assert list(metric_agreement(ranks(one=[1, 2, 3]))) == ['a', 'b', 'tau', 'n', 'p', 'p_holm']


def test_agreement_puts_directions_right(model):
    "A metric whose lower values are better agrees with one whose higher ones are."
    table = made(model, METHODS_OF | dict(saliency=METHODS['saliency'], product=METHODS['input_x_gradient']))
    t = metric_agreement(table).set_index(['a', 'b'])
    rank = own(table)['rank']
    assert rank['insertion']['inverse'] == rank['deletion']['inverse'] == 4 and t.tau[('insertion', 'deletion')] > 0


def test_figure_and_files(model, tmp_path):
    table = made(model)
    fig = plot_leaderboard(table)
    assert [ax.get_title().split()[0] for ax in fig.axes] == list(PANEL)
    assert [t.get_text() for t in fig.axes[0].get_yticklabels()] == ['truth', 'inverse', *CONTROLS]
    save_leaderboard(table, 'board', tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {'board.csv', 'board.md', 'board.png'}
    back = pd.read_csv(tmp_path/'board.csv')
    assert len(back) == len(table) and set(back.control) == set(table.control)
    text = (tmp_path/'board.md').read_text(encoding='utf-8')
    assert '| truth |' in text and 'lower is better' in text and '#1*' in text
    assert board_summary(table).method.tolist()[:2] == ['truth', 'inverse']
    assert as_markdown(pd.DataFrame(dict(a=[1., np.nan], b=['x|y', None]))).splitlines()[2:] == ['| 1.000 | x\\|y |', '|  |  |']


# --- certify


@pytest.fixture
def network(monkeypatch):
    "A small network, and no shortcut networks trained for it: their test is another notebook's."
    found = dict(detection=dict(estimate=.8, low=.6, high=.9, n=6),
                 false_alarm=dict(estimate=.1, low=np.nan, high=np.nan, of_control=.05, n=6))
    monkeypatch.setattr(board, 'shortcut_test', lambda *given, **options: found)
    return build('small_cnn', width=.1).eval()


IMAGES = torch.rand(6, 3, 96, 96, generator=torch.Generator().manual_seed(0))
ROW = dict(srg=METRICS['srg'].using(steps=2))


def report(e, network): return certify(e, network, IMAGES, metrics=ROW)
def results(table): return {(p, c): r for p, c, r in zip(table.part, table.check, table.result)}
def failed(table): return {k for k, r in results(table).items() if r == 'fail'}


def fine(model, x, target):
    "The size of the gradient, as it should be written."
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    x = x.clone().requires_grad_()
    try: g, = torch.autograd.grad(model(x).gather(1, target[:, None]).sum(), x)
    finally:
        for m, training in modes: m.training = training
    return g.abs().amax(1)


def test_a_good_function_passes(network):
    state = {k: v.clone() for k, v in network.state_dict().items()}
    table = report(fine, network)
    assert not failed(table) and set(table.result) == {'pass', 'number'}, table
    assert results(table)['oracles', 'linear: size of the gradient |w|'] == 'pass'
    assert all(torch.equal(v, state[k]) for k, v in network.state_dict().items()) and not network.training


@pytest.mark.parametrize('name, met', [
    ('saliency', 'linear: size of the gradient |w|'), ('input_x_gradient', 'linear: input × gradient w·x'),
    ('integrated_gradients', 'linear: behind white w·(x − 1)'), ('occlusion', 'linear: behind white, in squares'),
    ('gradcam', 'conv–mean–linear: Σ w·A'), ('hirescam', 'conv–mean–linear: Σ w·A'), ('layercam', 'conv–mean–linear: Σ w·A')])
def test_what_each_of_our_methods_answers(name, met, network):
    cheap = dict(integrated_gradients=dict(n_steps=8), occlusion=dict(window=16, stride=8))
    exam = board._Exam()
    e = METHODS[name].using(**cheap.get(name, {}))
    for examine in (board._form_and_determinism, board._side_effects, board._oracles): examine(exam, e, network.device)
    found = results(exam.table())
    assert 'fail' not in found.values() and found['oracles', met] == 'pass', exam.table()
    assert found['oracles', 'reads one quarter'] == 'pass'


@pytest.mark.parametrize('e, met', [
    (from_captum(captum.attr.InputXGradient), 'linear: input × gradient w·x'),
    (from_captum(captum.attr.LayerGradCam, layer='last'), 'conv–mean–linear: Σ w·A'),
    (from_gradcam(pytorch_grad_cam.GradCAM), 'conv–mean–linear: Σ w·A')], ids=['captum', 'captum layer', 'grad-cam'])
def test_methods_of_libraries(e, met, network):
    found = results(certify(e, network, IMAGES, parts=board.PARTS[:3]))
    assert found['oracles', met] == 'pass', found
    assert not [k for k, r in found.items() if r == 'fail'], found
    with pytest.raises(ValueError, match='parts'): certify(e, network, IMAGES, parts=['beauty'])


def test_a_map_of_the_picture_alone(network):
    table = report(edge_map, network)
    assert failed(table) == {('determinism', 'asks the class'), ('oracles', 'meets a known answer'),
                             ('sanity', 'notices random weights')}
    assert 'untrained' in table[table.part == 'leaderboard'].says.iloc[-1]   # compared as a method is


def changing(part):
    "The good function, and one thing that it leaves changed."
    def f(model, x, target):
        maps = fine(model, x, target)
        if part == 'images': x.data.mul_(.5)
        if part == 'modes': model.train(not model.training)
        if part == 'weights and statistics': model.net[0].weight.data += 1e-3
        if part == 'gradients': next(model.parameters()).grad = torch.zeros_like(next(model.parameters()))
        if part == 'layers and hooks': model.net[0].register_forward_hook(lambda *a: None)
        if part == 'random numbers': torch.rand(1)
        return maps
    return f


@pytest.mark.parametrize('part', ['images', 'modes', 'weights and statistics', 'gradients', 'layers and hooks',
                                  'random numbers'])
def test_each_side_effect_is_seen(part, network):
    exam = board._Exam()
    board._side_effects(exam, changing(part), network.device)
    table = exam.table().set_index('check')
    if part == 'images': assert table.result.to_dict() == {'images': 'fail', 'in evaluation mode': 'pass', 'in training mode': 'pass'}
    else:
        assert table.result.to_dict() == {'images': 'pass', 'in evaluation mode': 'fail', 'in training mode': 'fail'}
        assert table.says['in evaluation mode'] == f'changed: {part}'


def test_whoever_explains_in_training_mode(network):
    def keeps(model, x, target):
        model.train()
        x = x.clone().requires_grad_()
        model(x).gather(1, target[:, None]).sum().backward()
        return x.grad.abs().amax(1)
    found = failed(report(keeps, network))
    assert {('determinism', 'alone or in a batch'), ('side effects', 'in evaluation mode'),
            ('side effects', 'in training mode')} <= found and ('side effects', 'images') not in found


def test_a_function_without_seed(network):
    dice = np.random.default_rng(0)
    noisy = lambda model, x, target: fine(model, x, target)*torch.from_numpy(dice.random((len(x), 96, 96))).to(x.device)
    assert ('determinism', 'same seed') in failed(report(noisy, network))
    seeded = lambda model, x, target: fine(model, x, target)*torch.rand(96, 96).to(x.device)
    assert results(report(seeded, network))['determinism', 'same seed'] == 'pass'


def raising(model, x, target): raise RuntimeError('no luck\nat all')


@pytest.mark.parametrize('broken', [raising, lambda model, x, target: x[:, :, 0], lambda model, x, target: None,
                                    lambda model, x, target: fine(model, x, target)*torch.nan, lambda: 1],
                         ids=['raises', 'shape', 'none', 'nan', 'arguments'])
def test_never_a_stack_trace(broken, network):
    table = report(broken, network)
    found = failed(table)
    assert {('form', 'maps'), ('sanity', 'notices random weights'), ('leaderboard', 'measured')} <= found
    assert as_markdown(table).count('\n') == len(table) + 2


def test_the_message_is_there(network):
    assert 'RuntimeError: no luck at all' in set(report(raising, network).says)


def test_numpy_and_graphs_are_maps_too(network):
    numpy = lambda model, x, target: fine(model, x, target).double().cpu().numpy()
    assert not failed(report(numpy, network))
    e = as_explainer(numpy, 'mine')
    maps = e(network, IMAGES, 1)
    assert e.__name__ == 'mine' and maps.dtype == torch.float32
    torch.testing.assert_close(maps, fine(network, IMAGES, torch.ones(6, dtype=torch.long, device=IMAGES.device)), rtol=1e-4, atol=1e-6)
    assert as_explainer(METHODS['saliency']) is METHODS['saliency']
    with pytest.raises(ValueError, match='expected a function'): as_explainer('saliency')


def test_an_explainer_that_spoils_its_images_spoils_nobody_elses(network):
    before = IMAGES.clone()
    both = dict(spoils=as_explainer(changing('images')), saliency=METHODS['saliency'])   # of one question
    found = answers(both, network, IMAGES, 1)
    assert torch.equal(IMAGES, before)
    torch.testing.assert_close(found['saliency'][0], METHODS['saliency'](network, IMAGES, 1))


def test_far_is_far_in_both_directions():
    one = torch.ones(2, 4, 4)
    assert board._far(0*one, one) == board._far(2*one, one) == 1 and board._far(one, one) == 0


@pytest.mark.parametrize('m, sign', [(PANEL['insertion'], 1), (PANEL['deletion'], -1)], ids=['higher', 'lower'])
def test_better_is_no_worse_than_dice(m, sign):
    "Above an untrained network that is worse still, but below random numbers, or below chance: not better."
    own = np.random.default_rng(0).normal(size=N)
    def table(random, m=m):
        values = {'a': own} | {f'a, {c}': own - sign*(1 + .1*own) for c in CONTROL_KINDS} | {'a, random': own - sign*random}
        return board._metric_rows(values, m, set(), None, 0).set_index('control').better
    assert table(1 + .1*own)['none'] and table(.01*own)['none'] and not table(-1 + .1*own)['none']
    assert not table(-1 + .1*own)['random'] and table(-1 + .1*own)['untrained']
    for chance, better in ((own.mean() - sign, True), (own.mean() + sign, False)):
        assert table(1 + .1*own, SimpleNamespace(higher=m.higher, chance=chance))['none'] == better


def test_places_are_of_the_same_patches():
    "Who is blank where it is hard wins nothing, and a row's numbers are of the patches that it names."
    hard, half = np.repeat([0., 1.], 20), np.repeat([np.nan, 1.], 20)
    values = {'blank': half, 'blank, untrained': hard - 1, 'brave': hard + .1, 'brave, untrained': hard - 1}
    t = board._metric_rows(values, METRICS['insertion'], set(), None, 0).set_index(['method', 'control'])
    assert t['rank']['brave', 'none'] == 1 and t['rank']['blank', 'none'] == 2
    row = t.loc['blank', 'untrained']
    assert row.patches == row.n == 20 and row['mean'] == 0 and row.difference == 1 - row['mean']
    never = board._metric_rows(values | dict(never=hard*np.nan), METRICS['insertion'], set(), None, 0)
    assert never.set_index(['method', 'control'])['rank']['never', 'none'] != never['rank'].min() == 1


@pytest.mark.parametrize('changed', ['unit', 'baseline'])
def test_what_is_kept_knows_large_tensors(model, tmp_path, changed):
    "Two tensors that differ where torch's own text of them has dots are two settings."
    def asked(where):
        v = torch.zeros(N, 48, 48, dtype=torch.long) if changed == 'unit' else torch.zeros(3, 48, 48)
        v[..., where, 10:20] = 1
        m = METRICS['insertion'].using(steps=4, **{changed: v})
        board.measured(model, X, 'random', dict(ins=m), controls=(), keep=tmp_path)   # exact on every device
        return len(list(tmp_path.iterdir()))
    once = asked(slice(8, 14))
    assert once and asked(slice(20, 40)) == 2*once and asked(slice(8, 14)) == 2*once


class Tempered(Bright):
    "Its logits are divided by a number that is no parameter."
    def __init__(self, T): super().__init__(); self.T = T
    def forward(self, x): return super().forward(x)/self.T


class Twofold(Bright):
    "Two networks in one."
    def forward(self, x): z = super().forward(x); return z, z/3


CHANGED = [lambda t: Classifier(Tempered(1. + t), mean=(0, 0, 0), std=(1, 1, 1)),
           lambda t: Classifier(Twofold(), mean=(0, 0, 0), std=(1, 1, 1), output=t),
           lambda t: Classifier(Bright(), mean=(0, 0, 0), std=(1, 1, 1), output=(lambda z: z, lambda z: z/3)[t])]


@pytest.mark.parametrize('network', CHANGED, ids=['attribute', 'output', 'function'])
def test_what_is_kept_knows_the_network(network, tmp_path):
    "Maps, weights and target are the same; the values are not."
    keeps = lambda t, keep: made(network(t).eval(), dict(truth=truth), 'deletion', controls=(), keep=keep)['mean']
    for t in (0, 1, 0): pd.testing.assert_series_equal(keeps(t, tmp_path), keeps(t, False))
    assert len(list(tmp_path.iterdir())) == 2*4   # the method and three that know nothing


def test_what_is_kept_knows_the_metric(model, tmp_path):
    "The score that it follows, and functions and numbers that it encloses."
    def by(times, score='probability'):
        @metric(higher=True, source='a test', score=score)
        def weighed(q, maps): return times*q.scores()[:, 0]
        return weighed
    keeps = lambda m, keep: made(model, dict(truth=truth), dict(m=m), controls=(), keep=keep)['mean']
    for m in (by(1), by(2), by(1, 'logit'), by(1)): pd.testing.assert_series_equal(keeps(m, tmp_path), keeps(m, False))
    assert len(list(tmp_path.iterdir())) == 3*4


def test_what_is_kept_knows_who_is_asked_again(model, tmp_path):
    "Two explainers that agree on the clean images, and not beside them."
    def near(by):
        @explainer(signed=True, source='a test')
        def spot(q): return truth.on(q)[0]*(1 + by*((q.x - clean(q)).abs().amax((1, 2, 3), keepdim=True)[:, 0] > 0))
        return spot
    clean = lambda q: X.to(q.device)[[*q.row_numbers]]
    keeps = lambda e, keep: made(model, dict(spot=e), dict(moves=moves), controls=(), keep=keep)['mean']
    for e in (near(1), near(3), near(1)): pd.testing.assert_series_equal(keeps(e, tmp_path), keeps(e, False))


def test_what_has_no_description_is_measured_each_time(model, tmp_path):
    dice, calls = np.random.default_rng(0), []
    @metric(higher=True, source='a test')
    def drawn(q, maps): calls.append(1); return maps.flatten(1).mean(1)*float(dice.random() > 2)
    board_of = lambda: made(model, dict(truth=truth), PANEL | dict(drawn=drawn), controls=(), keep=tmp_path)
    with pytest.warns(UserWarning, match='values of drawn: computed each time'): board_of()
    files, once = {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()}, len(calls)
    assert len(files) == 3*4 and not [p for p in files if 'drawn' in p.name]
    with pytest.warns(UserWarning, match='values of drawn: computed each time'): board_of()
    assert len(calls) == 2*once and {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()} == files
    hooked = Classifier(Bright(), mean=(0, 0, 0), std=(1, 1, 1)).eval()
    hooked.net.dice = dice
    with pytest.warns(UserWarning, match='values: computed each time'): made(hooked, dict(truth=truth), keep=tmp_path/'none')
    assert not (tmp_path/'none').exists()


def test_a_name_is_no_control(model):
    two = {k: METHODS['saliency'] for k in ('IG', 'IG, black')}
    for f in (lambda: leaderboard(model, X, methods=two, metrics='srg', keep=False), lambda: with_controls(two, model, X)):
        with pytest.raises(ValueError, match='named .*IG, black.*, as controls of others would be'): f()
