"What every explainer owes: the outputs, ranges, targets, crops, threads, layouts and baselines of other people."
import threading
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from pcam_tp.classifier import Classifier
from pcam_tp.integrated_gradients import integrated_gradients
from pcam_tp.models import build, small_cnn
from pcam_tp.occlusion import occlusion, rise
from pcam_tp.superpixels import kernelshap, lime

CHEAP = dict(occlusion=occlusion.using(window=48, stride=48), rise=rise.using(n_masks=6),
             integrated_gradients=integrated_gradients.using(n_steps=2),
             lime=lime.using(n_samples=12), kernelshap=kernelshap.using(n_samples=12))
X = torch.rand(4, 3, 96, 96, generator=torch.Generator().manual_seed(0))
NEAR = dict(rtol=1e-3, atol=1e-5)   # sums and differences of scores near 1, in 32 bits
every = pytest.mark.parametrize('method', CHEAP.values(), ids=CHEAP)


@pytest.fixture
def model(): return build('small_cnn', width=.1)


@pytest.fixture
def training():
    "A network whose answers and statistics change with every pass, unless it is in evaluation mode."
    net = nn.Sequential(nn.Conv2d(3, 8, 5, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(),
                        nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, 2))
    return Classifier(net).train()


@every
@pytest.mark.parametrize('crop, options', [(64, {}), (40, dict(size=48))])
def test_exactly_nothing_outside_a_crop(method, crop, options):
    inside = torch.zeros(96, 96, dtype=torch.bool)
    inside[48 - crop//2:48 + crop//2, 48 - crop//2:48 + crop//2] = True
    maps = method(Classifier(small_cnn(width=.1), crop=crop, **options), X, 1)
    assert (maps[:, ~inside] == 0).all() and maps[:, inside].any()


def test_windows_that_do_not_align_with_a_crop():
    maps = occlusion(Classifier(small_cnn(width=.1), crop=64), X, 1, window=20, stride=12)
    assert maps[:, 16:80, 16:80].any() and maps.count_nonzero() == maps[:, 16:80, 16:80].count_nonzero()


@every
@pytest.mark.parametrize('squeezed', [False, True])
def test_one_logit(method, squeezed):
    "The map of one class is minus that of the other, with or without a last axis, and in a last batch of one."
    net = small_cnn(n_classes=1, width=.1)
    if squeezed: net = nn.Sequential(net, nn.Flatten(0))
    one, other = (method(Classifier(net), X[:3], c, batch_size=2) for c in (1, 0))
    assert one.isfinite().all() and one.any()
    assert_close(one, -other, **NEAR)


class Says(nn.Module):
    "A network that wraps its logits."
    def __init__(self, wrap):
        super().__init__()
        self.net, self.wrap = small_cnn(width=.1), wrap
    def forward(self, x): return self.wrap(self.net(x))


@every
def test_wrapped_outputs(method):
    net = Says(lambda z: (0, z))
    plain = method(Classifier(net.net), X, 1)
    assert_close(method(Classifier(net, output=1), X, 1), plain, **NEAR)
    with pytest.raises(ValueError, match='output=…'): method(Classifier(net), X, 1)
    with pytest.warns(UserWarning, match='softmax'): method(Classifier(Says(lambda z: z.softmax(1))), X, 1)


@every
def test_images_of_other_types(method, model):
    expected = method(model, X, 1)
    assert_close(method(model, X.double(), 1), expected, **NEAR)
    assert_close(method(model, X.half(), 1), method(model, X.half().float(), 1), **NEAR)
    double = build('small_cnn', width=.1).double()
    double.load_state_dict(model.state_dict())
    assert_close(method(double, X.double(), 1), expected, **NEAR)


@every
@pytest.mark.parametrize('wrong', [255*X, 4*X - 2, X/X*torch.nan], ids=['255', 'normalised', 'nan'])
def test_values_that_are_no_images(method, model, wrong):
    with pytest.raises(ValueError, match=r'in \[0, 1\]'): method(model, wrong, 1)


@every
@pytest.mark.parametrize('target, said', [
    ([0, 1], 'each of the 4 images'), ([.9, .8, .1, .2], 'whole numbers'), (1.7, 'whole numbers'),
    (2, 'classes 0 to 1')])
def test_targets_that_do_not_fit(method, model, target, said):
    with pytest.raises(ValueError, match=said): method(model, X, target, batch_size=2)


@every
def test_threads_with_one_network_in_training_mode(method, training):
    state, found = {k: v.clone() for k, v in training.state_dict().items()}, []
    expected = method(training, X, 1)
    work = lambda: found.extend(method(training, X, 1, batch_size=2) for _ in range(6))
    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert len(found) == 24
    for maps in found: assert_close(maps, expected, **NEAR)
    assert all(torch.equal(v, state[k]) for k, v in training.state_dict().items())
    assert all(m.training for m in training.modules())


class Views(nn.Module):
    "As most students write it."
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 4, 8, 8), nn.Linear(4*12*12, 2)
    def forward(self, x):
        h = self.body(x).relu()
        return self.head(h.view(h.size(0), -1))


@every
def test_a_network_that_flattens_with_view(method):
    net = Views()
    same = nn.Sequential(net.body, nn.ReLU(), nn.Flatten(), net.head)
    assert_close(method(Classifier(net), X, 1), method(Classifier(same), X, 1), **NEAR)


@every
@pytest.mark.parametrize('given, same', [
    (0, 'black'), (1., 'white'), (np.float32(0), 'black'), (np.ones(3), 'white'), (X[1].numpy(force=True), X[1]),
    (X.flip(0).numpy(force=True), X.flip(0))],
    ids=['0', '1.0', 'scalar', 'colour', 'image', 'images'])
def test_numbers_and_arrays_as_baseline(method, model, given, same):
    assert_close(method(model, X, 1, baseline=given, batch_size=3), method(model, X, 1, baseline=same), **NEAR)


@every
@pytest.mark.parametrize('wrong, said', [
    (255, r'expected \[0, 1\]'), (np.zeros(2), r'shape \(2,\)'), (None, 'NoneType'), ('grey', "'grey'"),
    (X[:3], 'each of the 4 images')], ids=['255', 'two', 'none', 'grey', 'three'])
def test_baselines_that_do_not_fit(method, model, wrong, said):
    with pytest.raises(ValueError, match=said): method(model, X, 1, baseline=wrong)


@every
def test_white_is_the_default(method, model):
    assert_close(method(model, X, 1), method(model, X, 1, baseline='white'), **NEAR)


@every
def test_as_many_passes_as_promised(method, model):
    seen = []
    model(X[:1]); model.seen = True   # a network that was never asked is asked for one image first
    hook = model.net.register_forward_hook(lambda m, i, out: seen.append(len(out)))
    method(model, X, 1, batch_size=3)
    hook.remove()
    assert sum(seen) == len(X)*method.passes(X.shape[2:]) and max(seen) == 3


@every
def test_a_default_type_that_somebody_changed(method, model):
    expected = method(model, X, 1)
    torch.set_default_dtype(torch.float64)
    try: found = method(model, X, 1)
    finally: torch.set_default_dtype(torch.float32)
    assert_close(found, expected, **NEAR)


@every
def test_nothing_is_left_behind(method, training):
    training.net[0].requires_grad_(False); training.net[1].eval()
    hooks = lambda: [len(m._forward_hooks) + len(m._backward_hooks) for m in training.modules()]
    parameters = lambda: [(p.requires_grad, p.grad, p._version) for p in training.parameters()]
    state = lambda: ([m.training for m in training.modules()], parameters(), [b._version for b in training.buffers()],
                     hooks(), X.requires_grad, X._version)
    before = state()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        with torch.inference_mode(): method(training, X)
        with torch.no_grad(): method(training, X, 1)
    assert state() == before


def test_norms_that_mix_the_images_of_a_batch():
    "Without running statistics batch normalisation uses those of the batch in evaluation, too; other norms never do."
    def net(norm): return Classifier(nn.Sequential(nn.Conv2d(3, 8, 5, 3), norm, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, 2)))
    mixed = net(nn.BatchNorm2d(8, track_running_stats=False))
    assert (mixed.eval()(X)[:1] - mixed(X[:1])).abs().max() > 1e-3   # why it is refused
    for f in CHEAP.values():
        with pytest.raises(ValueError, match="layer '1' has no running statistics"): f(mixed, X, 1)
    for norm in (nn.InstanceNorm2d(8), nn.GroupNorm(2, 8), nn.LayerNorm([8, 31, 31]), nn.BatchNorm2d(8)):
        assert occlusion(net(norm), X, 1, window=48, stride=48).isfinite().all()
    mixed.net[1].running_mean, mixed.net[1].running_var = torch.zeros(8), torch.ones(8)   # what the message says
    assert occlusion(mixed, X, 1, window=48, stride=48).isfinite().all()
