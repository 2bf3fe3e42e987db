"Any model: one line for every file, what was kept is what would be computed, a cut run goes on, odd networks and images."
import json

import captum.attr
import h5py
import numpy as np
import pandas as pd
import PIL.Image
import pytest
import torch
from conftest import settled

from pcam_tp import any_model
from pcam_tp.any_model import analyse_folder, class_maps, depth_maps, map_numbers, reading_guide, top_classes
from pcam_tp.classifier import Classifier, predict
from pcam_tp.methods import METHODS, from_captum
from pcam_tp.models import build
from pcam_tp.questions import answers, explainer
from pcam_tp.saliency import saliency

NAMES = 'fibre', 'gland', 'vessel'
dice = np.random.default_rng(0)


@pytest.fixture
def model(): return settled(build('small_cnn', width=.1, n_classes=3, classes=NAMES))


@pytest.fixture
def folder(tmp_path):
    "Two images of two classes, a grey one of another size, one without a label."
    for name, size in (('fibre/a.png', (96, 96, 3)), ('gland/a.png', (96, 96, 3)), ('gland/b.jpg', (80, 64)), ('c.bmp', (96, 96, 3))):
        path = tmp_path/'in'/name
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(dice.integers(0, 256, size, 'uint8')).save(path)
    return tmp_path/'in'


def test_every_file_has_a_line(model, folder, tmp_path, capsys):
    (folder/'vessel').mkdir()
    (folder/'vessel'/'broken.png').write_bytes(b'no image')
    t = analyse_folder(model, folder, tmp_path/'out', 'gradcam')
    assert t.image.tolist() == ['c.bmp', 'fibre/a.png', 'gland/a.png', 'gland/b.jpg', 'vessel/broken.png']
    assert t.label.fillna('none').tolist() == ['none', 'fibre', 'gland', 'gland', 'vessel']
    assert t.error.isna().tolist() == [True]*4 + [False]
    assert '1 of 5 images failed' in capsys.readouterr().out
    assert t[[f'p_{k}' for k in NAMES]].iloc[:4].sum(1).to_numpy() == pytest.approx(1, abs=1e-5)
    assert pd.isna(t.right[0]) and all(t.right[i] == (t.label[i] == t.predicted[i]) for i in (1, 2, 3))
    kept = pd.read_csv(tmp_path/'out'/'summary.csv')
    assert kept.image.tolist() == t.image.tolist() and kept.error.notna().sum() == 1


def test_what_is_kept_is_what_would_be_computed(model, folder, tmp_path):
    "Each image at its own size; the file has the raw map, the class and the score."
    from pcam_tp.folders import read_image
    t = analyse_folder(model, folder, tmp_path/'out', ['saliency', 'layercam'], score='logit')
    for row in t.itertuples():
        x, target = read_image(folder/row.image), [NAMES.index(row.predicted)]
        with h5py.File(tmp_path/'out'/row.image/'maps.h5') as f:
            assert f.attrs['target'] == row.predicted and f.attrs['score'] == 'logit' and set(f) == {'saliency', 'layercam'}
            found = torch.from_numpy(f['saliency'][:])
        again = saliency(model, x, target, score='logit')[0].cpu()
        assert (found.cpu() - again).norm() < .01*again.norm()   # rounding may turn a ReLU or two
        assert found.shape == x.shape[2:] == PIL.Image.open(tmp_path/'out'/row.image/'saliency.png').size[::-1]


def test_a_cut_run_goes_on(model, folder, tmp_path, monkeypatch):
    whole = analyse_folder(model, folder, tmp_path/'whole', 'gradcam', batch_size=1)
    calls, ask = [], any_model._Analysis.ask
    def cut(self, x):
        if len(calls) == 2: raise KeyboardInterrupt
        calls.append(len(x))
        return ask(self, x)
    monkeypatch.setattr(any_model._Analysis, 'ask', cut)
    with pytest.raises(KeyboardInterrupt): analyse_folder(model, folder, tmp_path/'cut', 'gradcam', batch_size=1)
    assert len([*(tmp_path/'cut').rglob('result.json')]) == 2 and not (tmp_path/'cut'/'summary.csv').exists()
    calls.append(None)   # from here on nothing stops it
    again = analyse_folder(model, folder, tmp_path/'cut', 'gradcam', batch_size=1)
    pd.testing.assert_frame_equal(again, whole)
    assert calls == [1, 1, None, 1, 1], 'finished images were asked again'


def test_another_question_starts_anew(model, folder, tmp_path):
    "Other weights, methods or scores; an edited image; a JSON that was cut off."
    def stamps(): return {p: p.stat().st_mtime_ns for p in (tmp_path/'out').rglob('result.json')}
    def run(m=model, methods='gradcam', **options):
        before = stamps()
        analyse_folder(m, folder, tmp_path/'out', methods, **options)
        return sum(before.get(p) != t for p, t in stamps().items())
    assert run() == 4 and run() == 0
    assert run(score='logit') == 4 and run(methods='layercam') == 4
    other = settled(build('small_cnn', width=.1, n_classes=3, classes=NAMES, seed=1))
    assert run(other) == 4 and run() == 4
    PIL.Image.fromarray(dice.integers(0, 256, (96, 96, 3), 'uint8')).save(folder/'c.bmp')
    assert run() == 1
    (tmp_path/'out'/'c.bmp'/'result.json').write_text('{"key": [')
    assert run() == 1


def asked_again(folder, out):
    "A function (model, methods, options) → how many images were asked anew."
    def run(*args, **options):
        stamps = lambda: {p: p.stat().st_mtime_ns for p in out.rglob('result.json')}
        before = stamps()
        analyse_folder(args[0], folder, out, *args[1:], **options)
        return sum(before.get(p) != t for p, t in stamps().items())
    return run


def test_another_view_of_the_images_starts_anew(model, folder, tmp_path):
    "The weights and their names are the same: another normalisation, crop, output, or code."
    run = asked_again(folder, tmp_path/'out')
    class Tempered(torch.nn.Module):
        def __init__(self, net, t): super().__init__(); self.net, self.t = net, t
        def forward(self, x): return self.net(x)/self.t
    given = dict(layers=('net.' + model.layers[-1],), classes=NAMES)
    seen = lambda t=1., **how: Classifier(Tempered(model.net, t), **given | how)
    for how in ({}, dict(mean=(.5, .5, .5)), dict(std=(.5, .5, .5)), dict(crop=64), dict(output=lambda out: out.flip(1)), dict(t=2.)):
        assert (run(seen(**how), 'saliency'), run(seen(**how), 'saliency')) == (4, 0), how


def test_other_options_start_anew(model, folder, tmp_path):
    "Those inside an adapter, and images that differ where the text of a tensor has dots."
    run = asked_again(folder, tmp_path/'out')
    ig = lambda n: dict(IG=from_captum(captum.attr.IntegratedGradients, n_steps=n))
    assert [run(model, ig(n), size=96) for n in (2, 50, 50)] == [4, 4, 0]
    hides = torch.zeros(2, 3, 96, 96)
    hides[1, 1, 40, 40] = 1
    assert [run(model, 'occlusion', size=96, baseline=b) for b in (*hides, hides[1])] == [4, 4, 0]
    assert [run(model, dict(m=METHODS['occlusion'].using(baseline=b)), size=96) for b in (*hides, hides[1])] == [4, 4, 0]


def test_what_has_no_description_is_computed_each_time(model, folder, tmp_path):
    run, noise = asked_again(folder, tmp_path/'out'), np.random.default_rng(0)
    @explainer(signed=True, source='a test')
    def drawn(q): return q.x.mean(1)*float(noise.random())
    with pytest.warns(UserWarning, match='nothing is kept'): assert run(model, dict(drawn=drawn)) == 4
    with pytest.warns(UserWarning, match='nothing is kept'): assert run(model, dict(drawn=drawn)) == 4


def test_classes_without_names_are_found_first(folder, tmp_path):
    "A network names its classes when it is first asked; a fresh one takes up what another has begun."
    run, net = asked_again(folder, tmp_path/'out'), build('small_cnn', width=.1, n_classes=3).net
    (folder/'0.png').write_bytes(b'no image')
    assert [run(Classifier(net), 'saliency'), run(Classifier(net), 'saliency')] == [4, 0]


def test_a_network_that_refuses_a_shape_loses_that_line_only(folder, tmp_path):
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 96), torch.nn.Flatten(), torch.nn.Linear(4, 3))
    t = analyse_folder(Classifier(net, classes=NAMES), folder, tmp_path/'out', 'saliency')
    assert t.error.notna().tolist() == [False, False, False, True]
    sized = analyse_folder(Classifier(net, classes=NAMES), folder, tmp_path/'sized', 'saliency', size=96)
    assert sized.error.isna().all()


def test_it_leaves_no_trace_and_needs_images(model, folder, tmp_path):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.train()
    analyse_folder(model, folder, tmp_path/'out', 'gradcam', most=2)
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert len([*(tmp_path/'out').rglob('result.json')]) == 2
    with pytest.raises(FileNotFoundError, match='holds no image'): analyse_folder(model, tmp_path/'nowhere', tmp_path/'out')
    with pytest.raises(ValueError, match='lemon'): analyse_folder(model, folder, tmp_path/'out', 'lemon')


def test_class_maps_answer_for_their_class():
    "A linear network: the map of class k is its weights, on the scale of the logits."
    w = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 4, bias=False))
    net[1].weight.data = w.flatten(1)
    model, x = Classifier(net, mean=(0, 0, 0), std=(1, 1, 1)), torch.rand(2, 3, 8, 8)
    maps = class_maps(model, x, 'input_x_gradient', score='logit')
    assert list(maps) == [f'class {k}' for k in range(4)]
    for k, m in enumerate(maps.values()): torch.testing.assert_close(m, (x*w[k].to(x.device)).sum(1), rtol=1e-4, atol=1e-5)
    assert list(class_maps(model, x, 'saliency', ['class 2', 0])) == ['class 2', 'class 0']
    for bad in ('class 9', 4, -1):
        with pytest.raises(ValueError, match='expected one of'): class_maps(model, x, 'saliency', [bad])


def test_depths(model):
    x = torch.rand(2, 3, 96, 96)
    found = depth_maps(model, x, 1)
    assert list(found) == list(model.layers) and all(m.shape == (2, 96, 96) for d in found.values() for m in d.values())
    last = answers({'layercam': any_model.choose('layercam')['layercam']}, model, x, 1)['layercam'][0]
    torch.testing.assert_close(found[model.layers[-1]]['layercam'], last, rtol=1e-4, atol=1e-6)


def test_numbers_of_maps():
    one = torch.zeros(1, 4, 4)
    one[0, 1, 2] = 5.
    found = {k: float(v) for k, v in map_numbers(one, one).items()}
    assert found == pytest.approx(dict(half=1/16, row=1.5/4, column=2.5/4, untrained=1))
    assert all(np.isnan(v) for v in map_numbers(-torch.ones(1, 4, 4)).values())


def test_words(model, folder, tmp_path):
    assert top_classes(torch.tensor([[.004, .996]]), ('a', 'b'), 5) == ['b 1.00, a .00']
    t = analyse_folder(model, folder, tmp_path/'out', ['gradcam', 'layercam'])
    guide = reading_guide(t, 'layercam')
    assert guide.count('Seen') == t.predicted.nunique() and 'maps by layercam' in guide and 'Not for diagnosis' in guide
    assert 'of 3 with a label rightly' in guide or t.predicted.nunique() > 1
    with pytest.raises(ValueError, match='no column rise_half'): reading_guide(t, 'rise')
    json.loads((tmp_path/'out'/'c.bmp'/'result.json').read_text(encoding='utf-8'))


def test_its_own_pictures_are_no_images(model, folder, tmp_path, monkeypatch):
    "Wherever they lie, and however the folder is called."
    monkeypatch.chdir(tmp_path)
    first = analyse_folder(model, folder, folder/'maps', methods=['saliency'])
    for out in ('in/maps', folder/'maps', folder/'again'):
        assert list(analyse_folder(model, folder, out, methods=['saliency']).image) == list(first.image)
