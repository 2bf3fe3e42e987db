"""What 14_training and 02_training cannot show in one process or with PCam: runs that are killed, two processes that
train one network, a run that goes on where it was on any device, and three classes from raw files to figures."""
import contextlib, copy, json, sys
from pathlib import Path

import h5py
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import accuracy_score, log_loss, roc_auc_score

from conftest import python, run
from pcam_tp import recipe, training
from pcam_tp.classifier import predict
from pcam_tp.core import best_device
from pcam_tp.data import open_split, open_splits, subset, to_float
from pcam_tp.methods import explain
from pcam_tp.models import build
from pcam_tp.plots import compare_maps, plot_confusion, plot_roc
from pcam_tp.release import CLASSES_FILE, SPLITS, raw_file
from pcam_tp.synthetic import make_patches, slide_names, synthetic_folder


@pytest.fixture
def on_the_processor(monkeypatch):
    "Processes that are started here see no CUDA device, simulated or not: there, runs are equal to the bit."
    monkeypatch.delenv('FAKE_CUDA', raising=False)
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '')


FEW = '''
import hashlib, os, random, signal, sys
import torch
from pcam_tp import recipe, training
from pcam_tp.classifier import Classifier
from pcam_tp.data import open_split, subset
from pcam_tp.models import build
torch.set_num_threads(1)
def fingerprint(model):
    return hashlib.sha256(b''.join(v.contiguous().numpy().tobytes() for v in model.state_dict().values())).hexdigest()
'''

KILLS = FEW + '''
train, valid = subset(open_split('train'), 64), subset(open_split('valid'), 16)
def run_in_child(file, kill_after):
    "Train in a forked process that kills itself at its `kill_after`-th batch, if it gets there; True when it was killed."
    pid = os.fork()
    if pid: return os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    batches, augment = 0, training.augment
    def count(*args):
        nonlocal batches
        batches += 1
        if batches == kill_after: os.kill(os.getpid(), signal.SIGKILL)
        return augment(*args)
    training.augment = count
    model = build('small_cnn', width=.05, dropout=.3)
    history = training.train(model, train, valid, epochs=30, batch_size=16, precision='no', device='cpu', checkpoint=file)
    with open(f'{file}.result', 'w') as f: f.write(f'{fingerprint(model)} {len(history)} {history.train_loss.tolist()}')
    os._exit(0)
undisturbed, disturbed = sys.argv[1:]
assert not run_in_child(undisturbed, 0)
random.seed(0)
kills = 0
while kills < 20 and run_in_child(disturbed, random.randint(1, 7)): kills += 1
assert kills == 20, f'the run was over after {kills} kills'
assert not run_in_child(disturbed, 0)
'''


def test_twenty_kills(tmp_path, on_the_processor):
    "A run that was killed twenty times ends with the weights and losses of an undisturbed one; no file is half-written."
    python(KILLS, tmp_path/'a.pt', tmp_path/'b.pt')
    assert (tmp_path/'a.pt.result').read_text() == (tmp_path/'b.pt.result').read_text()
    assert {f.name for f in tmp_path.iterdir()} == {'a.pt', 'b.pt', 'a.pt.result', 'b.pt.result'}


PROCESSES = FEW + '''
import json
from torch import nn
from pcam_tp.recipe import trained
train, valid = subset(open_split('train'), 256), subset(open_split('valid'), 64)
colour = Classifier(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)))   # no symmetry changes what it sees
for v in colour.net.parameters(): nn.init.zeros_(v)
training.train(colour, train, valid, epochs=2, stain=0, precision='no', device='cpu')
model = trained('small_cnn', train, valid, width=.05, epochs=2)
rank = int(os.environ.get('RANK', 0))
row = dict(colour=colour.net[2].weight.detach().tolist(), small_cnn=fingerprint(model), folder=model.card['folder'],
           **{k: model.card['training'][k] for k in ('seconds', 'processes')})
with open(f'{sys.argv[1]}/{os.environ.get("WORLD_SIZE", 1)}-{rank}.json', 'w') as f: json.dump(row, f)
'''


def test_two_processes(tmp_path, monkeypatch, on_the_processor):
    "They see the batches of one: same weights where nothing depends on the share; one network, written once, for both."
    script = tmp_path/'script.py'
    script.write_text(PROCESSES)
    monkeypatch.setenv('PCAM_TP_SOURCE', str(synthetic_folder()))
    monkeypatch.setenv('ACCELERATE_USE_CPU', 'true')
    # `accelerate launch` starts one process on a CPU
    launch = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node']
    for n in (1, 2):
        monkeypatch.setenv('PCAM_TP_HOME', str(tmp_path/f'home{n}'))
        run(*(launch + [n] if n > 1 else [sys.executable]), script, tmp_path)
    one, a, b = (json.loads((tmp_path/f'{k}.json').read_text()) for k in ('1-0', '2-0', '2-1'))
    assert a == b and Path(a['folder']).is_dir()
    assert (one['processes'], a['processes']) == (1, 2)   # the card tells which network it is
    assert all(abs(x - y) < 1e-6 for u, v in zip(one['colour'], a['colour']) for x, y in zip(u, v)), (one, a)
    assert any(x for v in a['colour'] for x in v)
    assert not list((tmp_path/'home2').rglob('*.run.pt'))


# ---------------------------------------------------------------- three classes, on any device

NAMES = 'normal', 'tumour outside', 'tumour inside'
RECIPE = dict(batch_size=16, precision='no')


@pytest.fixture(scope='module')
def three(tmp_path_factory):
    "Train, valid, test of three classes in the release's layout: painted patches, sorted by where their tumour lies."
    folder = tmp_path_factory.mktemp('three')
    for k, split in enumerate(SPLITS):
        p = make_patches(96, seed=k, slides=slide_names(split, 8), outside=.5)
        y = np.where(p.y == 1, 2, p.mask.any((1, 2))).astype(np.uint8)
        for part, a in dict(x=p.x, y=y.reshape(-1, 1, 1, 1), mask=p.mask[..., None]).items():
            with h5py.File(raw_file(folder, split, part), 'w') as f: f[part] = a
        pd.DataFrame(dict(wsi=p.wsi)).to_csv(raw_file(folder, split, 'meta'), index=False)
    (folder/CLASSES_FILE).write_text('\n'.join(NAMES))
    return open_splits(folder)


def small(): return build('small_cnn', width=.25, n_classes=3, classes=NAMES, dropout=.3)


@pytest.fixture(scope='module')
def learnt(three):
    "A network after a few steps, and the run's history."
    model = small()
    return model, training.train(model, *three[:2], 4, **RECIPE)


def ovr(y, p): return roc_auc_score(y, p, multi_class='ovr', average='macro')


def test_three_classes_are_trained_and_judged(three, learnt):
    (model, history), (learn, watch, test) = learnt, three
    assert learn.classes == model.classes == NAMES and set(learn.y) == {0, 1, 2}
    assert history.train_loss.iloc[0] == pytest.approx(np.log(3), abs=.3)   # of somebody who knows nothing
    moved = [not torch.equal(p.cpu(), q.cpu()) for p, q in zip(model.parameters(), small().parameters())]
    assert all(moved), 'some parameters stood still'
    best = history.loc[history.valid_loss.idxmin()]   # the network has the weights of this epoch
    on_watch = training.evaluate(model, watch)
    assert best.valid_auc == pytest.approx(ovr(on_watch.y, training.probabilities(on_watch)), abs=1e-3)

    predictions = training.evaluate(model, test)
    assert list(predictions.columns) == ['row', 'slide', 'y', 'pred', 'p0', 'p1', 'p2']
    y, p = predictions.y, training.probabilities(predictions)
    assert p.shape == (96, 3) and np.allclose(p.sum(1), 1) and (predictions.pred == p.argmax(1)).all()
    found = training.results(predictions, n_resamples=99).set_index('metric')
    expected = dict(auc=ovr(y, p), nll=log_loss(y, p), accuracy=accuracy_score(y, predictions.pred))
    for metric, value in expected.items(): assert found.estimate[metric] == pytest.approx(value), metric
    assert ((found.low <= found.estimate) & (found.estimate <= found.high)).all() and (found.n == 8).all(), found   # slides
    assert training.slide_table(predictions).patches.sum() == 96


def pixels(fig, file):
    "Save as PNG; the share of the picture that is not background."
    fig.savefig(file, dpi=110)
    plt.close(fig)
    return (plt.imread(file)[..., :3] < .98).any(-1).mean()


def texts(fig):
    "All that is written in a figure."
    return ' '.join(t.get_text().replace('\n', ' ') for t in fig.findobj(plt.Text))


def test_three_classes_are_explained_and_drawn(three, learnt, tmp_path):
    (model, _), test = learnt, three[2]
    first = [np.flatnonzero(test.y == k)[0] for k in range(3)]   # a patch of each class
    x, y = to_float(test.patches(first)), range(3)
    logits = predict(model, x)
    by_class = [explain(model, x, k, methods=['gradcam', 'saliency']) for k in range(3)]
    own = explain(model, x, methods=['gradcam', 'saliency'])   # of the predicted class
    for name, maps in own.items():
        of = torch.stack([m[name] for m in by_class])
        assert maps.shape == (3, 96, 96) and maps.isfinite().all() and maps.flatten(1).any(1).all()
        expected = of[logits.argmax(1).to(of.device), torch.arange(3, device=of.device)]
        torch.testing.assert_close(maps, expected, rtol=1e-4, atol=1e-4*float(of.abs().max()))
        assert all((of[j] - of[k]).abs().max() > .01*of.abs().max() for j, k in ((0, 1), (1, 2), (0, 2))), name

    fig = compare_maps(x, own, y=y, prob=logits.softmax(1), names=model.classes)
    written = texts(fig)
    for name in NAMES: assert f'label {name}' in written
    for k in logits.argmax(1).tolist(): assert f'predicted {NAMES[k]}' in written and f'P({NAMES[k]})' in written
    assert pixels(fig, tmp_path/'maps.png') > .3

    predictions = training.evaluate(model, test)
    fig = plot_confusion(predictions.y, predictions.pred, model.classes)
    for axis in (fig.axes[0].xaxis, fig.axes[0].yaxis):
        assert [t.get_text() for t in axis.get_ticklabels()] == list(NAMES)
    assert pixels(fig, tmp_path/'confusion.png') > .1
    p = training.probabilities(predictions)
    fig = plot_roc(predictions.y, p, names=model.classes)
    for k, name in enumerate(NAMES): assert f'{name} AUC {roc_auc_score(predictions.y == k, p[:, k]):.3f}' in texts(fig)
    assert pixels(fig, tmp_path/'roc.png') > .02


def test_a_run_that_was_cut_goes_on(three, tmp_path, monkeypatch):
    "Half of the epochs, then the rest by the same call: the file's state on the device, the losses of one run."
    def losses(**options):
        return training.train(small(), *three[:2], 4, **RECIPE, **options).train_loss.tolist()
    undisturbed, file, epoch, found = losses(), tmp_path/'run.pt', training._Run.epoch, {}
    def stops(run, bar):
        if len(run.history) == 2: raise KeyboardInterrupt
        return epoch(run, bar)
    def looks(run, bar):
        if not found:
            state = {k: part.state_dict() for k, part in run.parts().items()}
            found.update(copy.deepcopy(state), device=run.device, epochs=len(run.history))
        return epoch(run, bar)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(training._Run, 'epoch', stops)
        losses(checkpoint=file)
    kept = torch.load(file, map_location=best_device(), weights_only=True)
    with monkeypatch.context() as m:
        m.setattr(training._Run, 'epoch', looks)
        again = losses(checkpoint=file)
    assert found['device'].type == best_device().type and found['epochs'] == 2
    exactly = dict(rtol=0, atol=0)   # copies, and their device
    torch.testing.assert_close(dict(found['model']), dict(kept['model']), **exactly)
    torch.testing.assert_close(found['opt']['state'], kept['opt']['state'], **exactly)
    assert found['opt']['state'] and found['schedule'] == kept['schedule']
    assert again == pytest.approx(undisturbed, rel=.01)   # AdamW enlarges what rounding leaves: not to the last bit


def test_trained_wants_both_splits():
    with pytest.raises(ValueError, match='both splits'): recipe.trained('small_cnn', subset(open_split('test'), 8))


def test_few_patches_are_seen_more_often():
    "The recipe of a small data set takes about 200 steps in small batches; the course's and what is asked for stand."
    def asked(**o): return [recipe.course_recipe('small_cnn', **o)[k] for k in ('epochs', 'batch_size')]
    assert asked() == asked(n=6_000) == [3, 32]
    assert asked(n=1_500) == [5, 32] and asked(n=120) == [20, 12] and asked(n=31) == [29, 4]
    assert asked(n=31, epochs=2, batch_size=8) == [2, 8] and asked(n=120, batch_size=30) == [50, 30]
    assert recipe.course_recipe('resnet18', n=6_000)['epochs'] == 1


def test_the_opening_network_is_shared():
    "Notebooks 00 and foundation/08_shortcuts ask for one network, and one at another correlation has another name."
    names = {c: Path(recipe.trained_with_ink(c).card['folder']).name for c in (.9, 0.)}
    network, *splits = recipe.opening_case()
    assert Path(network.card['folder']).name == names[.9] != names[0.]
    assert len({s.folder for s in splits}) == 3 and all((s.y == splits[0].y).all() for s in splits)


def test_training_leaves_cudnn_on():
    "`torch.backends.cudnn.flags` switches it off unless told otherwise: a GPU then took five times as long, in silence."
    cudnn, seen, model = torch.backends.cudnn, set(), build('small_cnn', width=.1)
    def look(net, *_):
        if net.training: seen.add((cudnn.enabled, cudnn.allow_tf32, cudnn.deterministic))
    model.net.register_forward_hook(look)
    few = subset(open_split('train'), 32), subset(open_split('valid'), 8)
    with cudnn.flags(enabled=True, deterministic=True):
        training.train(model, *few, 3, batch_size=8, device='cpu', precision='no')
    assert seen == {(True, False, True)} and cudnn.enabled


def test_every_step_looks_for_others(monkeypatch):
    looks, few = [], (subset(open_split('train'), 32), subset(open_split('valid'), 8))
    monkeypatch.setattr(training, 'beside_others', lambda: contextlib.nullcontext(looks.append(1)))
    training.train(build('small_cnn', width=.1), *few, 3, batch_size=8, device='cpu', precision='no')
    assert len(looks) == 3*4


def test_a_checkpoint_of_numpys_numbers_goes_on(tmp_path):
    "A rate from `np.logspace`, weights as an array or a tensor: what `torch.load` reads is plain."
    few = subset(open_split('train'), 32), subset(open_split('valid'), 8)
    for k, weights in enumerate((np.array([1., 3.]), torch.tensor([1., 3.]))):
        options = dict(lr=np.logspace(-4, -2, 3)[1], class_weights=weights, batch_size=8, device='cpu', precision='no')
        a, b = (training.train(build('small_cnn', width=.1), *few, 2, checkpoint=tmp_path/f'{k}.pt', **options) for _ in range(2))
        assert a.train_loss.tolist() == b.train_loss.tolist()
