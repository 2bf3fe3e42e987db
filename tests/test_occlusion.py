"What is too heavy or too odd for 05_occlusion: large architectures, many classes, odd shapes, somebody's autocast, how many passes are made."
import pytest
import torch
from torch import nn

from pcam_tp.models import Classifier, build, class_score, evaluating
from pcam_tp.occlusion import occlusion, paint_windows, window_starts
from pcam_tp.passes import baseline

X = torch.rand(3, 3, 96, 96, generator=torch.Generator().manual_seed(0))
close = lambda a, b, tol=1e-5: torch.testing.assert_close(a, b, rtol=tol, atol=tol*float(b.abs().max()))


def by_hand(model, x, target, window, stride, kind, score='log_odds'):
    "Maps by loops over images, windows and pixels' counts."
    maps, b, t = torch.zeros(len(x), *x.shape[2:]), baseline(x, kind), torch.as_tensor(target).expand(len(x))
    with evaluating(model), torch.no_grad():
        for n in range(len(x)):
            ask = lambda image: class_score(model(image[None]).float(), t[n:n + 1], score)[0]
            count, before = torch.zeros(x.shape[2:]), ask(x[n])
            for r in window_starts(x.shape[2:], window, stride)[0]:
                for c in window_starts(x.shape[2:], window, stride)[1]:
                    place, hidden = (slice(r, r + window[0]), slice(c, c + window[1])), x[n].clone()
                    hidden[:, place[0], place[1]] = b[n][:, place[0], place[1]]
                    maps[n][place] += before - ask(hidden); count[place] += 1
            maps[n] /= count
    return maps


@pytest.mark.parametrize('name', ['resnet18', 'densenet121', 'convnext_tiny', 'vit_b_16', 'inception_v3'])
def test_every_kind_of_network(name):
    model = build(name, n_classes=3)
    maps, info = occlusion(model, X[:1], window=48, stride=48, details=True)
    assert maps.shape == (1, 96, 96) and maps.dtype == torch.float32 and maps.isfinite().all() and maps.any() and info['drops'].shape == (1, 2, 2)
    close(maps, by_hand(model, X[:1], info['target'], (48, 48), 48, 'mean'), 1e-3)
    assert all(m.training for m in model.modules()) and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize('kind', ['black', 'blur', 'noise', X[0, :, :80, :75]])
@pytest.mark.parametrize('score', ['log_odds', 'logit', 'probability'])
def test_odd_shapes_and_many_classes(kind, score):
    "Neither side, nor window, nor stride, nor the number of classes divides anything."
    model, x = build('small_cnn', n_classes=5, width=.1), X[..., :80, :75]
    options = dict(window=(30, 33), stride=(17, 20), baseline=kind, score=score)
    close(occlusion(model, x, [4, 0, 2], batch_size=7, **options), by_hand(model, x, torch.tensor([4, 0, 2]), (30, 33), (17, 20), kind, score), 1e-3)


def test_a_map_does_not_depend_on_its_batch():
    model, x = build('small_cnn', width=.1), torch.cat([X, X.flip(3)])[..., :80, :]
    for kind in ('noise', 'mean', x.flip(0)):
        one = lambda i: kind[i:i + 1] if torch.is_tensor(kind) else kind
        alone = torch.cat([occlusion(model, x[i:i + 1], 1, window=32, stride=16, baseline=one(i), seed=3) for i in range(len(x))])
        for size in (1, 4, 100): close(occlusion(model, x, 1, window=32, stride=16, baseline=kind, seed=3, batch_size=size), alone, 1e-3)


def test_passes_and_memory():
    "One pass for each window and one for the image, in batches of at most `batch_size`."
    model, seen = build('small_cnn', width=.1), []
    model.register_forward_hook(lambda m, i, out: seen.append(len(out)))
    occlusion(model, X, 1, window=16, stride=8, batch_size=10)
    assert max(seen) == 10 and sum(seen) == 3*122 + 1   # one image tells the number of classes


def test_somebody_elses_autocast():
    "Drops and painting stay in 32 bits; the network too, unless asked."
    model = build('small_cnn', width=.1)
    plain, half = occlusion(model, X, 1, window=32, stride=16), occlusion(model, X, 1, window=32, stride=16, precision='bf16')
    with torch.autocast('cpu', torch.bfloat16): close(occlusion(model, X, 1, window=32, stride=16), plain)
    assert half.dtype == torch.float32 and not torch.equal(half, plain) and (half - plain).abs().max() < .2*plain.abs().max() + 1e-2


def test_painting_is_exact_for_equal_values():
    for shape, window, stride in (((96, 96), 16, 8), ((41, 97), (7, 13), (5, 13)), ((5, 5), 5, 5), ((9, 9), 1, 1)):
        r, c = map(len, window_starts(shape, window, stride))
        close(paint_windows(torch.ones(2, r, c), shape, window, stride), torch.ones(2, *shape), 1e-6)


def test_nothing_is_learnt_from_the_pixels_that_a_crop_leaves_out():
    model = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(3*32*32, 2)), crop=32)
    m = occlusion(model, X, 1, window=8, stride=4)
    outside = torch.ones(96, 96, dtype=torch.bool)
    outside[28:68, 28:68] = False   # windows that begin at 28 reach row 35
    assert (m[:, outside] == 0).all() and m.any()


@pytest.mark.parametrize('options, said', [
    (dict(window=(16, 97)), r'window is \(16, 97\)'), (dict(window=8, stride=(8, 9)), 'never be hidden'), (dict(stride=0), 'stride is 0'), (dict(window='16'), "window is '16'"),
    (dict(baseline='gray'), "baseline 'gray'"), (dict(baseline=torch.zeros(2)), 'baseline has shape'), (dict(baseline=X[:2]), 'each of the 3 images'),
    (dict(score='odds'), 'score'), (dict(precision='int8'), 'precision'), (dict(batch_size=0), 'batch_size'), (dict(target=2), 'classes 0 to 1')])
def test_errors_name_the_argument(options, said):
    with pytest.raises(ValueError, match=said): occlusion(build('small_cnn', width=.1), X, **options)


@pytest.mark.parametrize('x', [X[0], X.numpy(), (255*X).byte(), X[:, :1], X[:0]])
def test_errors_name_x(x):
    with pytest.raises(ValueError, match='x is '): occlusion(build('small_cnn', width=.1), x)
