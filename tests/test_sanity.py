"""What 12_sanity_checks cannot show: every kind of network, known answers, Quantus, constant maps, no trace."""
import copy

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models import VisionTransformer

from pcam_tp.classifier import Classifier
from pcam_tp.controls import edge_map, random_map, untrained
from pcam_tp.models import build
from pcam_tp.questions import explainer
from pcam_tp.saliency import input_x_gradient, saliency
from pcam_tp.sanity import (SIMILARITIES, depth_table, map_similarity, memorised, randomised, randomised_maps,
                            sanity_check, sanity_score, sanity_table, stages)

X = torch.rand(6, 3, 48, 48, generator=torch.Generator().manual_seed(0))
weights = lambda net: {n: p for n, p in net.named_parameters() if p.ndim > 1}


@pytest.fixture
def small(): return build('small_cnn', width=.125).eval()


def plain(seed=7):
    "Two convolutions and a linear layer on 8×8 pixels, without batch statistics."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(),
                             nn.Flatten(), nn.Linear(4*64, 2))


def as_it_is(net): return Classifier(net, mean=(0, 0, 0), std=(1, 1, 1)).eval()


@pytest.mark.parametrize('name', ['resnet18', 'densenet121', 'vit_b_16', 'convnext_tiny', 'inception_v3', 'vgg11'])
def test_every_network_is_cut_without_rest(name):
    model = build(name)
    found = stages(model)
    every = [n for names in found.values() for n in names]
    assert len(every) == len(set(every)) and set(every) == set(sum(stages(model, 'each').values(), [])) - {'net'} | (set(every) & {''})
    assert len(found) > 1 and model.head.startswith(list(found)[-1].split('.')[0])
    below = {n for n, _ in model.net.named_parameters()}
    owned = {n for n in below if any(n.rpartition('.')[0] == o for o in every)}
    assert owned == below, 'weights that no stage draws'


def small_vit():
    net = VisionTransformer(image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=48, mlp_dim=64, num_classes=2)
    nn.init.normal_(net.class_token)   # zeros at first
    return Classifier(net, size=32)


@pytest.mark.parametrize('make', [lambda: build('resnet18', seed=3), small_vit])
def test_nothing_is_left_of_the_network_nor_of_its_start(make):
    model = make().eval()
    *_, (_, last) = randomised(model, seed=3)
    for n, p in weights(model.net).items():
        q = last.net.get_parameter(n)
        assert (p != q).float().mean() > .9 or p.numel() < 2000 and (p != q).any(), n   # a shuffled token may keep some
        if p.numel() > 500 and p.std() > 0: assert abs(torch.corrcoef(torch.stack([p.flatten(), q.flatten()]))[0, 1]) < .2, n
    shapes = {}
    for n, p in weights(last.net).items():   # no two layers share their dice
        assert not any(torch.equal(p, q) for q in shapes.setdefault(p.shape, [])), n
        shapes[p.shape].append(p)


@pytest.mark.parametrize('norm', [nn.utils.weight_norm, nn.utils.spectral_norm,
                                  nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
@pytest.mark.filterwarnings('ignore:.*weight_norm.*is deprecated')
def test_weights_that_are_made_of_others_are_new_too(norm):
    "The own rule of such a layer fills `weight`, which the next pass makes of its parameters again."
    net = plain()
    for k in (0, 2): norm(net[k])
    with torch.no_grad(): net.train()(torch.rand(2, 3, 8, 8, device='cpu'))   # the spectral norm of the weights becomes known
    model = as_it_is(net)
    *_, (_, last) = randomised(model)
    for fresh in (untrained(model), last):
        found = fresh(X[:, :, :8, :8])
        assert found.isfinite().all() and .01 < found.std()/model(X[:, :, :8, :8]).std() < 100
        for k in (0, 2):
            a, b = (m.net[k].weight.flatten().cpu() for m in (model, fresh))
            assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < .4 and (a != b).float().mean() > .9, k


def test_what_one_layer_keeps_moves_no_other_layers_dice():
    "A scale of 1 that is 1 again is shuffled last, so that networks draw what they always drew."
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 2))
    trained = copy.deepcopy(net)
    nn.init.normal_(trained[1].weight); nn.init.normal_(trained[1].bias)
    for a, b in zip(*(untrained(as_it_is(n)).parameters() for n in (net, trained))): assert torch.equal(a, b)


def test_a_layer_draws_the_same_in_every_order(small):
    first = {o: dict(randomised(small, order=o)) for o in ('cascading', 'independent')}
    for stage in stages(small):
        a, b = (weights(first[o][stage].net.get_submodule(stage)) for o in first)
        for n in a: torch.testing.assert_close(a[n], b[n], rtol=0, atol=0)
    moved = lambda m: {n.split('.')[0] for n, p in weights(m.net).items() if (p != small.net.get_parameter(n)).any()}
    assert [len(moved(m)) for m in first['cascading'].values()] == [1, 2, 3, 4, 5]
    assert [moved(m) for m in first['independent'].values()] == [{s} for s in first['independent']]
    other = dict(randomised(small, seed=1))['conv1']
    assert (weights(other.net)['conv1.0.weight'] != weights(first['cascading']['conv1'].net)['conv1.0.weight']).any()
    finest = list(randomised(small, 'each'))[-1][1]   # the whole network: its cut does not matter
    torch.testing.assert_close(dict(finest.named_parameters()), dict(first['cascading']['conv1'].named_parameters()), rtol=0, atol=0)


def test_batch_statistics_start_again(small):
    small.train()(X); small.eval()
    assert small.net.conv1[1].running_mean.abs().sum() > 0
    steps = dict(randomised(small))
    assert steps['conv1'].net.conv1[1].running_mean.abs().sum() == 0 and steps['conv2'].net.conv1[1].running_mean.abs().sum() > 0


def test_no_trace(small):
    small.train(); small.net.conv1[0].requires_grad_(False)
    state = lambda: {k: v.clone() for k, v in small.state_dict().items()}
    facts = lambda: ([m.training for m in small.modules()], [(p.requires_grad, p.grad) for p in small.parameters()],
                     sum(len(m._forward_hooks) for m in small.modules()), torch.get_rng_state().tolist(), np.random.get_state()[1].tolist())
    x, before = X[:3], (state(), facts())
    kept = x.clone()
    sanity_score(saliency, small, x)
    torch.testing.assert_close(state(), before[0], rtol=0, atol=0)
    assert facts() == before[1] and (x == kept).all()


@pytest.mark.parametrize('kind', SIMILARITIES)
def test_the_edge_map_does_not_notice(small, kind):
    "Reference F 12: similarity 1 at every depth."
    maps = randomised_maps([edge_map, input_x_gradient], small, X)
    table = depth_table(maps, kind=kind)
    edges = table[table.method == 'edge_map']
    np.testing.assert_allclose(edges[['estimate', 'low', 'high']], 1, atol=1e-6)
    assert (table[table.method == 'input_x_gradient'].estimate < .95).all()
    assert edges.depth.tolist() == [1, 2, 3, 4, 5] and edges.layer.tolist() == ['head', 'conv4', 'conv3', 'conv2', 'conv1']


def test_a_linear_network_forgets_everything():
    "The gradient is the weights: fresh ones share nothing with them but chance, 1/√(H·W) = .02."
    model = as_it_is(nn.Sequential(nn.Flatten(), nn.Linear(3*48*48, 2)))
    x = X
    for kind in ('spearman', 'spearman_abs'):
        assert sanity_score(saliency, model, x, 1, kind).abs().max() < .08
        np.testing.assert_allclose(sanity_score(edge_map, model, x, 1, kind), 1, atol=1e-6)
    seen = sanity_table(randomised_maps(dict(edges=edge_map, noise=random_map, gradient=saliency), model, x, 1))
    seen = seen.set_index(['method', 'control'])
    assert seen.loc[('gradient', 'edges'), 'difference'] < -.9 and abs(seen.loc[('gradient', 'other'), 'difference']) < .05
    assert seen.loc[('noise', 'edges'), 'estimate'] == pytest.approx(1)   # the same dice for any model: no explainer of it


def test_the_order_is_edges_then_gradient_then_dice(small):
    "Reference F 14, for this check: a map that ignores the network is worst, one that knows nothing else is best."
    calls = iter(range(100))
    fresh = explainer(signed=False, source='a test')(
        lambda q: torch.rand(q.x.shape[0], *q.x.shape[2:], generator=torch.Generator().manual_seed(next(calls))))
    score = [sanity_score(e, small, X, 1).mean() for e in (edge_map, saliency, fresh)]
    assert score[0] > score[1] + .1 and abs(score[2]) < .05


def test_the_trained_network_is_no_data_point(small):
    x = X
    maps = randomised_maps(saliency, small, x)
    by_hand = np.mean([map_similarity(maps['trained']['saliency'], maps[l]['saliency']) for l in list(maps)[1:]], axis=0)
    np.testing.assert_allclose(sanity_score(saliency, small, x), by_hand, atol=1e-5)


# quantus 0.6.0, MPRT(layer_order=…), |gradient|, largest over channels; its own dice: torch.manual_seed(43) before each layer
QUANTUS = dict(top_down={'5': [.3240, .2428, -.0545], '2': [.0727, .1864, .1058], '0': [.1390, .0238, .2431]},
               independent={'0': [.3103, .0435, .1526], '2': [.3859, .1087, -.1546], '5': [.3240, .2428, -.0545]})
QUANTUS_AVERAGE = [.3839, .3632, .3236]   # MPRT(return_average_correlation=True): (1 + Σ)/(layers + 1)


def as_quantus_draws(order):
    net, layers = plain(), ['0', '2', '5']
    with torch.random.fork_rng(devices=[]):
        for name in layers[::-1] if order == 'top_down' else layers:
            if order == 'independent': net = plain()
            torch.manual_seed(43)
            net.get_submodule(name).reset_parameters()
            yield name, as_it_is(copy.deepcopy(net))   # `net` stays on the processor, whose dice these are


@pytest.mark.parametrize('order', QUANTUS)
def test_quantus_on_the_same_networks(order):
    x, y = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(1)), [0, 1, 1]
    maps_of = lambda m: saliency(m, x, y, score='logit')
    base = maps_of(as_it_is(plain()))
    found = {name: map_similarity(base, maps_of(m)) for name, m in as_quantus_draws(order)}
    for name, theirs in QUANTUS[order].items(): np.testing.assert_allclose(found[name], theirs, atol=1e-4)
    if order == 'top_down':   # its average counts the network that nobody changed
        ours = np.mean(list(found.values()), axis=0)
        np.testing.assert_allclose((1 + 3*ours)/4, QUANTUS_AVERAGE, atol=1e-4)
        assert (ours < np.array(QUANTUS_AVERAGE) - .1).all()
        maps = dict(trained=dict(it=base)) | {k: dict(it=maps_of(m)) for k, m in as_quantus_draws(order)}
        np.testing.assert_allclose(sanity_table(maps).estimate, ours.mean(), atol=1e-4)


def test_constant_maps_are_missing(small):
    "A method that is empty for the trained network on one patch, and everywhere once the head is new."
    trained = small.net.head[-1].weight.detach().clone()
    def maps(q):
        known = (q.model.net.head[-1].weight.to(trained) == trained).all()
        return q.x.sum(1)*(torch.arange(len(q.x), device=q.device) > 0)[:, None, None] if known else 0*q.x.sum(1)
    half = explainer(signed=False, source='a test')(maps)
    x = X
    assert sanity_score(half, small, x, 1).isnan().all()
    table = depth_table(randomised_maps(half, small, x, 1))
    assert (table.blank == 6).all() and (table.n == 0).all() and table.estimate.isna().all()
    alone = randomised_maps(half, small, x, 1, order='independent')
    assert torch.from_numpy(map_similarity(alone['trained']['maps'], alone['conv1']['maps'])).isnan().tolist() == [True] + [False]*5
    check = sanity_check(dict(half=half), small, x, 1, order='independent')
    check = check[check.method == 'half']
    assert (check.blank == 1).all() and (check.n == 5).all()
    np.testing.assert_allclose(check.estimate, 1)   # over the stages at which it has maps
    assert sanity_check(dict(half=half), small, x, 1)[lambda t: t.method == 'half'].n.tolist() == [0]


def test_few_slides_have_no_interval(small):
    table = sanity_check(saliency, small, X, 1, by=list('aabbcc'))
    assert table.low.isna().all() and table.estimate.notna().all() and (table.n == 3).all()
    six = sanity_check(saliency, small, X, 1, by=range(6)).query('method == "saliency"')
    assert six.low.notna().all() and six.difference_low.notna().all()


def test_one_patch_and_any_batch(small):
    x = X
    assert sanity_score(edge_map, small, x[:1]).tolist() == [1.] and sanity_score(saliency, small, x[:1]).isfinite().all()
    torch.testing.assert_close(sanity_score(saliency, small, x, 1, batch_size=2), sanity_score(saliency, small, x, 1), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(sanity_score(saliency, small, x[2:3], 1), sanity_score(saliency, small, x, 1)[2:3], rtol=1e-3, atol=1e-3)


def test_many_classes_odd_shapes_and_layers():
    model, x = build('small_cnn', n_classes=5, width=.125), X[:, :, :40, :]
    score = sanity_score(input_x_gradient, model, x, [4, 0, 2, 1, 3, 3], 'spearman', layers=['conv4', 'head'], order='independent')
    assert score.shape == (6,) and score.dtype == torch.float32 and score.device.type == 'cpu' and score.abs().max() <= 1
    bare = as_it_is(plain())   # no layers are named: its children
    assert list(stages(bare)) == ['0', '2', '5']


def test_what_does_not_fit_is_named(small):
    x = X
    with pytest.raises(ValueError, match='cascading, independent'): sanity_score(saliency, small, x, order='up')
    with pytest.raises(ValueError, match='spearman_abs, spearman, ssim'): sanity_check(saliency, small, x, kind='hog')
    with pytest.raises(ValueError, match='expected some of'): sanity_check('salience', small, x)
    with pytest.raises(ValueError, match='no weights'): sanity_score(saliency, small, x, layers=['pool1'])
    with pytest.raises(ValueError, match='not in this model'): sanity_score(saliency, small, x, layers=['layer4'])


def test_labels_by_heart():
    x, y = X, torch.tensor([0, 1, 1, 0, 0, 1])
    model = memorised(x, y, epochs=80, width=.125)
    assert model.card['known'] == 1 and not model.training
