"Networks, callers and arguments that once gave a wrong number in silence, or an error in somebody else's words."
import threading
import warnings

import captum.attr
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from pcam_tp.classifier import PCAM_MEAN, Classifier, Resize, copied, predict
from pcam_tp.controls import seeded, untrained
from pcam_tp.integrated_gradients import integrated_gradients
from pcam_tp.leaderboard import as_explainer, leaderboard
from pcam_tp.methods import METHODS, explain, from_captum
from pcam_tp.occlusion import occlusion
from pcam_tp.questions import baseline
from pcam_tp.sanity import sanity_check

X = torch.rand(3, 3, 48, 48, generator=torch.Generator().manual_seed(0))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 5, 2), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(8, 2))


def model(**options): return Classifier(net(), layers=('2',), **options)


class Around(nn.Module):
    "The network with a forward of its own."
    def __init__(self, forward):
        super().__init__()
        self.net, self.own, self.kept = net(), forward, []
    def forward(self, x): return self.own(self, x)


def words(f, *args, **kw):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter('always')
        f(*args, **kw)
    return ' '.join(str(w.message) for w in found)


class AcrossTheBatch(nn.Module):
    "As it is written when batch_first is forgotten."
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.cut, self.head = nn.Conv2d(3, 32, 8, 8), nn.Linear(32, 2)
        self.mix = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64), 3, enable_nested_tensor=False)
    def forward(self, x): return self.head(self.mix(self.cut(x).flatten(2).mT).mean(1))


@pytest.mark.parametrize('stranger, word', [
    (AcrossTheBatch, 'other images'), (lambda: Around(lambda m, x: m.net((x - x.mean())/x.std())), 'other images'),
    (lambda: Around(lambda m, x: m.net[6](F.dropout(m.net[:6](x)))), 'chance'), (net, ''), (lambda: net().half(), ''),
    (lambda: net().double(), '')])
def test_an_answer_that_hangs_on_others_or_on_chance(stranger, word):
    "Said once, at first use; a network that answers for each image alone is left in peace, in 16 bits, too."
    m = Classifier(stranger().eval())
    said = words(predict, m, X)
    assert word in said and bool(said) == bool(word) and not words(predict, m, X)


def test_a_classifier_is_not_wrapped_again():
    with pytest.raises(ValueError, match='normalises by itself'): Classifier(model())
    with pytest.raises(ValueError, match='normalises by itself'): Classifier(nn.Sequential(model()), mean=(0, 0, 0))
    whole = Classifier(nn.Sequential(model()), mean=(0, 0, 0), std=(1, 1, 1))
    assert_close(predict(whole, X), predict(model(), X))


def test_where_the_logits_are():
    with pytest.raises(ValueError, match='one tensor'): predict(model(output=0), X[:2])
    assert_close(predict(Classifier(Around(lambda m, x: (m.net(x), 0)), output=0), X), predict(model(), X))


def test_a_tuple_of_three_numbers_is_a_colour():
    "A list is several baselines, and only integrated gradients take one."
    m, colour = model(), torch.tensor(PCAM_MEAN)
    for method in (integrated_gradients, occlusion.using(window=16, stride=16)):
        assert_close(method(m, X, 1, baseline=PCAM_MEAN), method(m, X, 1, baseline=colour))
    assert_close(baseline(X, PCAM_MEAN), baseline(X, colour))
    three = integrated_gradients(m, X, 1, baseline=list(PCAM_MEAN))
    assert not torch.allclose(three, integrated_gradients(m, X, 1, baseline=colour), atol=1e-4)
    with pytest.raises(ValueError, match='only integrated gradients'): occlusion(m, X, 1, baseline=[.1, .2, .3])


def test_hooks_that_are_not_called():
    "A compiled network calls none that came later: guided backpropagation would be the plain gradient."
    if X.is_cuda: pytest.skip('nothing is compiled on the simulated device')
    m = Classifier(torch.compile(net(), backend='eager'))
    predict(m, X), METHODS['saliency'](m, X, 1)
    with pytest.raises(ValueError, match='compiled'): METHODS['guided_backprop'](m, X, 1)


def test_no_way_back_to_the_pixels():
    def forward(m, x):
        with torch.no_grad(): h = m.net[:6](x)
        return m.net[6](h)
    with pytest.raises(ValueError, match='under no_grad'): METHODS['saliency'](Classifier(Around(forward)), X, 1)


def test_twins_in_inference_mode():
    m = model()
    with torch.inference_mode():
        maps = explain(m, X, 1, ['saliency'], controls=['untrained'])
        sanity_check(['saliency'], m, X, 1)
    assert all(v.isfinite().all() for v in maps.values())
    assert not any(p.is_inference() for p in untrained(m).parameters())


def test_activations_kept_in_a_list():
    def forward(m, x):
        m.kept.append(dict(h=m.net[:4](x)))
        return m.net[4:](m.kept[-1]['h'])
    m = Classifier(Around(forward))
    METHODS['saliency'](m, X, 1)
    assert_close(predict(copied(m), X), predict(m, X))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('size', [64, Resize(56, 48), Resize(56, 48, 'bicubic')])
def test_16_bits_and_another_size(dtype, size):
    half, whole = Classifier(net().to(dtype), size=size), Classifier(net(), size=size)
    assert_close(predict(half, X), predict(whole, X), rtol=.05, atol=.01)
    assert METHODS['saliency'](half, X, 1).isfinite().all()


def test_default_of_64_bits():
    plain = METHODS['gradcam'](model(size=Resize(56, 48)), X, 1)
    torch.set_default_dtype(torch.float64)
    try:
        found = METHODS['gradcam'](Classifier(net().float(), layers=('2',), size=Resize(56, 48)), X, 1)
        assert found.dtype == plain.dtype and found.isfinite().all()
    finally: torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize('name', ['gradcam', 'layercam', 'saliency'])
def test_somebody_elses_autocast(name):
    m = model()
    plain, z = METHODS[name](m, X, 1), predict(m, X)
    with torch.autocast(X.device.type, torch.bfloat16):
        assert_close(METHODS[name](m, X, 1), plain, rtol=1e-4, atol=1e-6)
        assert_close(predict(m, X), z, rtol=1e-4, atol=1e-6)


def test_lime_of_noisy_images():
    "Max-Sensitivity's noise leaves [0, 1] a little: superpixels are cut all the same."
    table = leaderboard(model(), X[:2], methods=dict(lime=METHODS['lime'].using(n_samples=20)), metrics='max_sensitivity', keep=False,
                        controls=())
    assert table['mean'].notna().all()


def test_two_threads_two_kinds_of_method():
    "One takes the dice and then the network, so the other must, too: both end."
    m, done = model(), []
    def loop(method):
        for _ in range(150): method(m, X, 1)
        done.append(method)
    methods = as_explainer(lambda model, x, t: x.mean(1)), from_captum(captum.attr.Saliency)
    threads = [threading.Thread(target=loop, args=(f,), daemon=True) for f in methods]
    for t in threads: t.start()
    for t in threads: t.join(60)
    assert len(done) == 2, 'they wait for each other'


def test_dice_of_others_stand_still():
    "A GPU's too, whoever asks for the processor's."
    def drawn():
        torch.manual_seed(5)
        first = torch.rand(2, device=X.device)
        with seeded(0): torch.rand(1)
        return first, torch.rand(2, device=X.device)
    first, second = drawn()
    torch.manual_seed(5)
    assert_close(first, torch.rand(2, device=X.device)), assert_close(second, torch.rand(2, device=X.device))
