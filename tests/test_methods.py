"What 08_all_methods cannot show: every method on every network, many classes, odd shapes; adapters on others' networks; threads."
import threading
import warnings

import captum.attr
import numpy as np
import pytest
import pytorch_grad_cam
import torch
from torch import nn
from torch.testing import assert_close

from conftest import settled
from pcam_tp.classifier import SCORES, Classifier, class_score, predict
from pcam_tp.controls import untrained
from pcam_tp.maps import chance_iou, is_blank, random_maps, rank_correlation
from pcam_tp.methods import METHODS, _ClassScores, agreement, choose, explain, from_captum, from_gradcam, precision_table
from pcam_tp.models import MODELS, build

X = torch.nn.functional.interpolate(torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(0)), (96, 96), mode='bicubic').clamp(0, 1)
CHEAP = {k: METHODS[k].using(**o) for k, o in dict(
    hirescam={}, layercam={}, gradcam={}, gradcam_pp={}, saliency={}, input_x_gradient={}, smoothgrad=dict(n_samples=2), integrated_gradients=dict(n_steps=2),
    occlusion=dict(window=48, stride=48), rise=dict(n_masks=4), lime=dict(n_samples=12), kernelshap=dict(n_samples=12)).items()}


def state(m):
    return ([p.training for p in m.modules()], [(p.requires_grad, p.grad) for p in m.parameters()],
            [len(k._forward_hooks) + len(k._forward_pre_hooks) + len(k._backward_hooks) for k in m.modules()], [p.sum().item() for p in m.parameters()])


ADAPTED = dict(ig=from_captum(captum.attr.IntegratedGradients, n_steps=2), lrp=from_captum(captum.attr.LRP, space='network'),
               shap=from_captum(captum.attr.GradientShap, n_samples=2, stdevs=.1),
               cam=from_captum(captum.attr.LayerGradientXActivation, layer='last'),
               score_cam=from_gradcam(pytorch_grad_cam.ScoreCAM), gradcam=from_gradcam(pytorch_grad_cam.GradCAM))


@pytest.mark.parametrize('name', ['ig', 'score_cam'])
def test_adapters_under_somebody_elses_autocast(name):
    "They say that they run in 32 bits, whatever the caller has switched on."
    model = build('small_cnn', width=.1)
    plain = ADAPTED[name](model, X, 1)
    with torch.autocast(X.device.type, torch.bfloat16): assert_close(ADAPTED[name](model, X, 1), plain, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('name', MODELS)
def test_every_method_on_every_network(name):
    model, before_x = build(name), X.clone()
    before, maps = state(model), explain(model, X[:1], methods=CHEAP)
    for k, v in maps.items():
        assert v.shape == (1, 96, 96) and v.dtype == torch.float32 and v.isfinite().all(), k
    assert state(model) == before and torch.equal(X, before_x)


@pytest.mark.parametrize('k, shape', [(5, (64, 96)), (3, (50, 41))])
def test_classes_and_shapes(k, shape):
    model, x = build('small_cnn', n_classes=k, width=.2), torch.rand(2, 3, *shape)
    maps = explain(model, x, [k - 1, 0], CHEAP | dict(occlusion=METHODS['occlusion'].using(window=16, stride=16)))
    for name, v in maps.items(): assert v.shape == (2, *shape) and v.isfinite().all(), name


def test_one_image_is_a_batch_of_one():
    model = build('small_cnn', width=.2)
    both, target = explain(model, X, methods=CHEAP, batch_size=3), predict(model, X).argmax(1)
    alone = explain(model, X[1:], target[1:], CHEAP)
    for k in CHEAP: torch.testing.assert_close(both[k][1:], alone[k], rtol=1e-3, atol=1e-5, msg=lambda m: f'{k}: {m}')


def test_inside_other_modes():
    "no_grad, inference mode and a frozen network change nothing."
    model = build('small_cnn', width=.2)
    free = explain(model, X, methods=CHEAP)
    with torch.no_grad(): a = explain(model, X, methods=CHEAP)
    with torch.inference_mode(): b = explain(model, X.clone(), methods=CHEAP)
    c = explain(model.requires_grad_(False), X, methods=CHEAP)
    for k in CHEAP:
        for other in (a, b, c): torch.testing.assert_close(free[k], other[k], msg=lambda m: f'{k}: {m}')


def test_adapters_stay_inside_a_crop():
    for options in (dict(crop=64), dict(crop=64, size=48)):
        cropped = build('small_cnn', width=.2, geometry=options)
        for m in (from_gradcam(pytorch_grad_cam.HiResCAM), from_captum(captum.attr.DeepLift, space='network'),
                  from_captum(captum.attr.Saliency), from_captum(captum.attr.LayerGradCam, layer='last')):
            v = m(cropped, X)
            assert v[:, :16].count_nonzero() == v[:, 80:].count_nonzero() == 0 and v[:, 16:80, 16:80].any()


class Tokens(nn.Module):
    "Patches of 16 as tokens, a class token in front, and the same without tokens: a score that is no sum over places."
    def __init__(self, tokens=True):
        super().__init__()
        self.cut, self.norm, self.mix, self.head = nn.Conv2d(3, 8, 16, 16), nn.Identity(), nn.Linear(8, 16), nn.Linear(16, 2)
        self.tokens = tokens
    def forward(self, x):
        a = self.cut(x)
        if self.tokens:
            t = a.flatten(2).mT
            t = self.norm(torch.cat([t.mean(1, keepdim=True), t], 1))[:, 1:]
        else: t = self.norm(a).flatten(2).mT
        return self.head(self.mix(t).relu().square().mean(1))


@pytest.mark.parametrize('shape', [(96, 128), (96, 96)])
def test_adapters_know_the_true_grid_of_tokens(shape):
    "1 + 6·8 tokens of a 96×128 image are 49 = 7·7, too; a guess would fold them so."
    x = torch.rand(3, 3, *shape, generator=torch.Generator().manual_seed(1))
    grid = Classifier(Tokens(False), layers='norm')
    tokens = Classifier(Tokens(), layers='norm'); tokens.load_state_dict(grid.state_dict())
    for m in (from_gradcam(pytorch_grad_cam.HiResCAM), from_captum(captum.attr.LayerGradientXActivation, layer='last')):
        assert_close(m(tokens, x, 1), m(grid, x, 1), rtol=1e-4, atol=1e-5)
    flat = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(2), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 2))
    for m in (from_gradcam(pytorch_grad_cam.GradCAM), from_captum(captum.attr.LayerGradientXActivation, layer='last')):
        with pytest.raises(ValueError, match='no plain grid'): m(Classifier(flat, layers='1'), x, 1)


class Hooked(nn.Module):
    "As in tutorials: `forward` hangs a hook on its activations and keeps them; flattened by `view`; one logit, squeezed."
    def __init__(self):
        super().__init__()
        self.body, self.act, self.head = nn.Conv2d(3, 4, 8, 8), nn.ReLU(), nn.Linear(4*12*12, 1)
    def forward(self, x):
        self.kept = self.act(self.body(x))
        self.kept.register_hook(lambda g: setattr(self, 'gradient', g))
        return self.head(self.kept.view(x.size(0), -1)).squeeze()


def test_networks_of_others():
    "All that `explain` offers, adapters too, on a network with a hook in `forward`, `view`, one logit and kept activations."
    model = Classifier(Hooked(), layers='act')
    plain = Classifier(nn.Sequential(model.net.body, model.net.act, nn.Flatten(), model.net.head), layers='1')
    chosen = {k: e for k, e in (CHEAP | ADAPTED).items() if k != 'lrp'}   # LRP: no kept activations in its way
    predict(model, X)   # leaves activations behind
    maps = explain(model, X, 1, chosen, controls='untrained', batch_size=2)
    for k, v in explain(plain, X, 1, chosen).items():
        assert_close(maps[k], v, rtol=1e-3, atol=1e-3*v.abs().max().item() + 1e-6, msg=lambda m: f'{k}: {m}')
    twice = explain(model, X[:1], [1], chosen)   # a squeezed last batch of one
    for k in CHEAP: assert_close(twice[k], maps[k][:1], rtol=1e-3, atol=1e-3*maps[k].abs().max().item() + 1e-6)


def test_targets_are_one_for_each_image_or_refused():
    model, x = build('small_cnn', width=.2), X.repeat(2, 1, 1, 1)
    for target in ([0, 1], 1.7, [.9, .8, .1, .2], 2):
        for m in ('gradcam', ['saliency', 'random'], ADAPTED['ig']):
            with pytest.raises(ValueError, match='target'): explain(model, x, target, m, batch_size=2)
    a = explain(model, x, [0, 1, 0, 1], ['saliency', 'gradcam'], batch_size=3)
    for i, c in enumerate([0, 1, 0, 1]):
        for k, v in a.items(): assert_close(METHODS[k](model, x[i:i + 1], c)[0], v[i], rtol=1e-3, atol=1e-5)


def test_what_does_not_fit_is_found_before_anything_is_computed():
    model, passed = build('convnext_tiny'), []
    model.register_forward_hook(lambda *a: passed.append(1))
    for chosen, word in ((('occlusion', 'guided_backprop'), 'GELU'), (('occlusion', from_gradcam(pytorch_grad_cam.GradCAM, layer='x')), "'x'"),
                         (dict(a='occlusion', b=METHODS['lime'].using(n_samples=1)), 'n_samples'), (dict(a=nn.ReLU()), '@explainer'),
                         (['occlusion', 'occlusion'], 'two methods')):
        with pytest.raises(ValueError, match=word): explain(model, X, methods=chosen)
    with pytest.raises(ValueError, match='mirrored'): explain(model, X, controls=['mirrored'])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        chosen = choose(None, model)
    assert list(chosen) == [k for k in METHODS if k != 'guided_backprop'] and not passed
    assert len(said) == 1 and 'guided_backprop' in str(said[0].message) and 'GELU' in str(said[0].message)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        unnamed = choose(None, Classifier(nn.Sequential(nn.Conv2d(3, 2, 9), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())))
    assert len(said) == 1 and not {'gradcam', 'layercam'} & set(unnamed) and 'guided_backprop' in unnamed


def test_one_question_serves_all_methods():
    "The class is predicted once, and four class activation maps take one pass."
    model, passed = build('small_cnn', width=.2), []
    predict(model, X)
    hook = model.register_forward_hook(lambda m, i, out: passed.append(len(out)))
    explain(model, X, methods=['gradcam', 'hirescam', 'gradcam_pp', 'layercam', 'saliency'])
    hook.remove()
    assert sum(passed) == len(X)*(1 + 1 + 1), passed


def test_one_baseline_for_all_methods():
    "Ours, and captum's from the question's baseline."
    model, ig = build('small_cnn', width=.2), METHODS['integrated_gradients'].using(n_steps=2)
    for b in ('white', 'black', X.flip(0)):
        maps = explain(model, X, 1, dict(ours=ig, theirs=ADAPTED['ig'], lime=CHEAP['lime']), baseline=b, batch_size=1)
        assert (maps['theirs'] - maps['ours']).norm() < .005*maps['ours'].norm()   # of all pixels: rounding turns ReLUs
        lime = CHEAP['lime'](model, X, 1, baseline=b)
        assert_close(maps['lime'], lime, rtol=1e-3, atol=1e-3*lime.abs().max().item())


@pytest.mark.parametrize('chosen', [CHEAP | ADAPTED], ids=['all'])
def test_four_threads_with_one_network(chosen):
    "In training mode; what draws random numbers draws its own."
    net = nn.Sequential(nn.Conv2d(3, 8, 5, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(), nn.AdaptiveAvgPool2d(4), nn.Flatten(),
                        nn.Linear(128, 2))
    model = Classifier(net, layers='0').train()
    state, found = {k: v.clone() for k, v in model.state_dict().items()}, []
    chosen = {k: e for k, e in chosen.items() if k != 'lrp'}   # knows no rule for this network
    ask = lambda: explain(model, X, 1, chosen, controls=('untrained', 'shifted'))
    expected, threads = ask(), [threading.Thread(target=lambda: found.extend(ask() for _ in range(2))) for _ in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert len(found) == 8
    for maps in found:
        for k, v in expected.items():
            assert_close(maps[k], v, rtol=1e-3, atol=1e-3*v.abs().max().item() + 1e-6, msg=lambda m: f'{k}: {m}')
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items()) and all(m.training for m in model.modules())


def test_adapters_leave_no_trace():
    model = build('small_cnn', width=.2).train()
    loss = torch.nn.functional.cross_entropy(model(X), torch.tensor([0, 1])); loss.backward()
    grads = [p.grad.clone() for p in model.parameters()]
    for m in (from_captum(captum.attr.LRP, space='network'), from_gradcam(pytorch_grad_cam.ScoreCAM), from_gradcam(pytorch_grad_cam.GradCAM)):
        a, b = m(model, X), m(model, X)
        torch.testing.assert_close(a, b)
    assert all(torch.equal(g, p.grad) for g, p in zip(grads, model.parameters())) and model.training
    assert not any(hasattr(m, 'rule') for m in model.modules())


def test_untrained_draws_every_weight_again():
    for name in ('small_cnn', 'vit_b_16', 'convnext_tiny'):
        model = build(name)
        fresh = untrained(model, seed=1)
        same = [k for (k, a), b in zip(model.named_parameters(), fresh.parameters()) if a.unique().numel() > 1 and torch.equal(a, b)]
        assert not same, same


def test_agreement_by_slide_has_wider_intervals():
    "Patches of one slide that agree alike count as one."
    g = torch.Generator().manual_seed(0)
    a, slide = torch.randn(60, 24, 24, generator=g), np.repeat(np.arange(6), 10)
    share = torch.linspace(0, 1, 6)[slide].view(-1, 1, 1)
    pair = dict(a=a, b=share*a + (1 - share)*torch.randn(60, 24, 24, generator=g))
    width = lambda t: (t.rank_correlation_high - t.rank_correlation_low)[0]
    assert width(agreement(pair, slide)) > 1.5*width(agreement(pair))


def test_every_form_of_asking():
    "A name, an explainer, a list, a dict; controls beside each method and of the trained network's class."
    model, gradcam = build('small_cnn', width=.2), METHODS['gradcam']
    for some in ('gradcam', gradcam, [gradcam], dict(gradcam='gradcam')):
        assert list(explain(model, X, methods=some)) == ['gradcam']
    maps = explain(model, X, methods=('gradcam', 'saliency', 'random'), controls=('shifted', 'untrained'))
    assert list(maps) == ['gradcam', 'gradcam, shifted', 'gradcam, untrained',
                          'saliency', 'saliency, shifted', 'saliency, untrained', 'random']
    assert_close(maps['gradcam'], gradcam(model, X), rtol=1e-3, atol=1e-5)
    twin = gradcam(untrained(model), X, predict(model, X).argmax(1))
    assert_close(maps['gradcam, untrained'], twin, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('asked, said', [
    (dict(methods=('gradcan',)), 'gradcam, hirescam'), (dict(methods=[METHODS['gradcam']]*2), 'two methods'),
    (dict(methods=dict(a=print)), '@explainer'), (dict(methods='rise', controls='mirrored'), 'shifted')])
def test_explain_says_what_is_wrong(asked, said):
    with pytest.raises(ValueError, match=said): explain(build('small_cnn', width=.2), X, **asked)


def test_other_needs_two_images():
    with pytest.raises(ValueError, match='two images'): explain(build('small_cnn', width=.2), X[:1], methods='gradcam', controls='other')


def test_the_same_seed_gives_the_same_maps_and_nothing_changes():
    model, chosen = build('small_cnn', width=.2), CHEAP | dict(guided_backprop=METHODS['guided_backprop'])
    before, first = state(model), explain(model, X, methods=chosen)
    for k, v in explain(model, X, methods=chosen).items(): assert_close(v, first[k], rtol=1e-4, atol=1e-6, msg=lambda m: f'{k}: {m}')
    assert state(model) == before


def test_as_many_passes_as_said():
    "All methods; LIME and KernelSHAP, which ask equal masks once, say in their details how many."
    model, seen = build('small_cnn', width=.2), []
    predict(model, X)   # a network that was never asked is asked for one image first
    hook = model.register_forward_pre_hook(lambda m, inputs: seen.append(len(inputs[0])))
    for k, m in (CHEAP | dict(guided_backprop=METHODS['guided_backprop'])).items():
        seen.clear()
        if k in ('lime', 'kernelshap'): said = m(model, X[:1], 1, details=True)[1]['passes'][0].item()
        else: m(model, X[:1], 1); said = m.passes()
        assert sum(seen) == said <= m.passes(), k
    hook.remove()


@pytest.mark.parametrize('score', SCORES)
def test_scores_of_every_class_for_libraries(score):
    model, target = build('small_cnn', width=.2, n_classes=3), torch.tensor([2, 0])
    expected = class_score(model(X), target, score)
    for pixels, images in ((True, X), (False, model.preprocess(X))):
        found = _ClassScores(model, score, pixels)(images)
        assert found.shape == (2, 3)
        assert_close(found.gather(1, target[:, None])[:, 0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('b', ['white', 'black'])
def test_our_methods_are_theirs_through_the_adapters(b):
    model = settled(build('small_cnn', width=.2))
    theirs = dict(saliency=from_captum(captum.attr.Saliency, abs=False),
                  integrated_gradients=from_captum(captum.attr.IntegratedGradients, n_steps=8),
                  hirescam=from_captum(captum.attr.LayerGradientXActivation, layer='last'))
    ours = dict(saliency=METHODS['saliency'].using(channels='sum'), hirescam=METHODS['hirescam'],
                integrated_gradients=METHODS['integrated_gradients'].using(n_steps=8))
    found = explain(model, X, 1, theirs, baseline=b)
    for k, v in explain(model, X, 1, ours, baseline=b).items():   # norms: rounding may turn a ReLU
        assert v.any() and (found[k] - v).norm() < .005*v.norm(), k


def test_gradcam_of_grad_cam_is_the_positive_part_of_ours():
    model = settled(build('small_cnn', width=.2))
    maps, details = METHODS['gradcam'](model, X, details=True)
    positive = model.to_pixels(details['grid'].relu(), (96, 96))
    r = rank_correlation(from_gradcam(pytorch_grad_cam.GradCAM)(model, X), positive)
    assert np.isnan(r).all() or np.nanmin(r) > .99
    assert not np.isnan(r).any() or (positive[np.isnan(r)] == 0).all()


def test_methods_that_we_do_not_have():
    model = settled(build('small_cnn', width=.2))
    more = {k: ADAPTED[k] for k in ('lrp', 'shap', 'score_cam')} | dict(deep_lift=from_captum(captum.attr.DeepLift, space='network'))
    added = explain(model, X, 1, more)
    for k, v in added.items(): assert v.shape == (2, 96, 96) and not is_blank(v).all(), k
    again = explain(model, X, 1, more)
    with torch.no_grad(): again['lrp'] = more['lrp'](model, X, 1)
    for k, v in added.items(): assert_close(again[k], v, rtol=1e-3, atol=1e-3*v.abs().max().item(), msg=lambda m: f'{k}: {m}')


def test_adapters_say_what_is_wrong():
    model = build('small_cnn', width=.2)
    with pytest.raises(ValueError, match='fp32 only'): ADAPTED['lrp'](model, X, precision='bf16')
    with pytest.raises(ValueError, match="'network'"): from_captum(captum.attr.LRP, space='image')
    with pytest.raises(ValueError, match='conv9'): from_gradcam(pytorch_grad_cam.GradCAM, layer='conv9')(model, X)


def test_agreement_of_what_is_known():
    "Equal up to scale, opposite, independent; a constant map leaves no pair; n counts images."
    noise = random_maps(60, (48, 48), (48, 48), signed=True)
    found = agreement(dict(a=noise, b=noise*3 + 1, c=-noise, d=random_maps(60, (48, 48), (48, 48), seed=1))).set_index(['a', 'b'])
    r, ious = found.rank_correlation, found.iou
    assert np.allclose([r['a', 'b'], r['a', 'c'], r['a', 'd']], [1, -1, 0], atol=.02)
    assert np.allclose([ious['a', 'b'], ious['a', 'c'], ious['a', 'd']], [1, 0, chance_iou(.25)], atol=.02)
    for null in ('shifted', 'other'):
        assert abs(found[f'rank_correlation_{null}']['a', 'b']) < .02 and abs(found[f'iou_{null}']['a', 'b'] - chance_iou(.25)) < .02
    assert found.n['a', 'b'] == 60 and found.rank_correlation_p_holm['a', 'b'] < .01 < found.rank_correlation_p_holm['a', 'd']
    assert agreement(dict(a=noise, flat=torch.ones(60, 48, 48))).n[0] == 0


def test_two_methods_that_like_the_middle_beat_shifted_and_not_other():
    "The same spot in every image, with noise: agreement that says nothing about an image."
    g = torch.Generator().manual_seed(0)
    spot = torch.zeros(24, 24); spot[8:16, 8:16] = 3
    a, b = (spot + torch.randn(40, 24, 24, generator=g) for _ in range(2))
    t = agreement(dict(a=a, b=b)).iloc[0]
    assert t.rank_correlation > t.rank_correlation_shifted + .1 and abs(t.rank_correlation_difference) < .02
    assert t.rank_correlation_p_holm > .01 and abs(t.rank_correlation - t.rank_correlation_other - t.rank_correlation_difference) < 1e-9
    shared = torch.randn(40, 24, 24, generator=g)
    both = agreement(dict(a=a + shared, b=b + shared)).iloc[0]   # now they share something of each image
    assert both.rank_correlation_difference > .1 and both.rank_correlation_p_holm < .01 and both.iou_difference > .02


def test_nothing_is_allowed_in_16_bits_from_few_maps():
    model = build('small_cnn', width=.2)
    few, many = (precision_table(model, X.repeat(n, 1, 1, 1), methods='random').iloc[0] for n in (1, 100))
    assert min(few.percentile_5, many.percentile_5) > .9999 and (few.n, many.n) == (2, 200)
    assert not few.allowed and many.allowed
