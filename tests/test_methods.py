"What 08_all_methods cannot show: every method on every network, with many classes and odd shapes; adapters on a transformer."
import captum.attr
import numpy as np
import pytest
import pytorch_grad_cam
import torch

from pcam_tp.methods import METHODS, agreement, explain, from_captum, from_gradcam, untrained
from pcam_tp.models import MODELS, build, predict

X = torch.nn.functional.interpolate(torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(0)), (96, 96), mode='bicubic').clamp(0, 1)
CHEAP = {k: METHODS[k].using(**o) for k, o in dict(
    hirescam={}, layercam={}, gradcam={}, gradcam_pp={}, saliency={}, input_x_gradient={}, smoothgrad=dict(n_samples=2), integrated_gradients=dict(n_steps=2),
    occlusion=dict(window=48, stride=48), rise=dict(n_masks=4), lime=dict(n_samples=12), kernelshap=dict(n_samples=12)).items()}


def state(m):
    return ([p.training for p in m.modules()], [(p.requires_grad, p.grad) for p in m.parameters()],
            [len(k._forward_hooks) + len(k._forward_pre_hooks) + len(k._backward_hooks) for k in m.modules()], [p.sum().item() for p in m.parameters()])


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


def test_adapters_on_a_transformer_and_a_crop():
    "Tokens become a grid; what lies outside the crop stays 0."
    vit = build('vit_b_16')
    assert from_gradcam(pytorch_grad_cam.GradCAM)(vit, X[:1]).shape == (1, 96, 96)
    assert from_captum(captum.attr.LayerGradientXActivation, layer='last')(vit, X[:1]).shape == (1, 96, 96)
    cropped = build('small_cnn', width=.2, geometry=dict(crop=64))
    for m in (from_gradcam(pytorch_grad_cam.HiResCAM), from_captum(captum.attr.DeepLift, space='network'), from_captum(captum.attr.Saliency)):
        v = m(cropped, X)
        assert v[:, :16].abs().max() == 0 and v[:, 16:80, 16:80].abs().max() > 0


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
