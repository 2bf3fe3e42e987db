"""Every notebook and the explainers' tests on a simulated CUDA device: what a GPU refuses is refused on every machine.

Alone: `make cuda`. The device is tests/fake_cuda; where it cannot be, these tests are skipped and say why.
Where there is a GPU, the explainers' tests run on it by `pytest --device cuda tests/test_saliency.py …`."""
import ast, os, sys

import pytest

sys.path.insert(0, os.path.join(os.path.dirname(__file__), 'fake_cuda'))
from conftest import NOTEBOOKS, TESTS, python, run
from fake_cuda import why_not
from test_layout import MODULES, imports
from test_notebooks import check
from test_run import notebook

pytestmark = pytest.mark.skipif(bool(why_not()), reason=f'no simulated CUDA device: {why_not()}')
ON = {**os.environ, 'FAKE_CUDA': '1', 'FAKE_CUDA_JITTER': '1',
      'PYTHONPATH': os.pathsep.join([str(TESTS/'fake_cuda'), os.environ['PYTHONPATH']])}


def asks(file):
    "Does a test file ask networks in its own process: does it import the classifier, or a module that does?"
    tops = ast.parse(file.read_text(encoding='utf-8')).body
    used = {(n.module or '').removeprefix('pcam_tp.') for n in tops if isinstance(n, ast.ImportFrom)} & {*MODULES}
    return any(m == 'classifier' or 'classifier' in imports(m) for m in used)

# These compare with weights, files and processes that are on the processor.
ON_THE_PROCESSOR = {'test_models.py', 'test_training.py', 'test_checkpoints.py', 'test_cli.py'}
ASKING = [p.name for p in sorted(TESTS.glob('test_*.py')) if asks(p) and p.name not in ON_THE_PROCESSOR]


def pytest_on_device(file, *args, env=ON):
    run(sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', file, *args, env=env)


@pytest.mark.parametrize('name', NOTEBOOKS)
def test_notebook(name): check(NOTEBOOKS[name], ON, f'make cuda ARGS="-k {name}"')


FAULTS = dict(
    numpy=('import numpy as np', 'assert np.allclose(x, x)', "TypeError: can't convert cuda:0 device type tensor to numpy"),
    mixed=('y = torch.ones(4, 1)', 'x + y', 'RuntimeError: Expected all tensors to be on the same device'),
    sums=('w = torch.ones(3, 5, device=x.device)/3', 'assert torch.equal((x @ w)[:2], x[:2] @ w)', 'AssertionError'))

@pytest.mark.parametrize('kind', FAULTS)
def test_faults_are_found(kind, tmp_path):
    "What runs on the processor and not on a GPU fails here, and the failure names notebook, cell and error."
    first, second, error = FAULTS[kind]
    make = "import torch\nx = torch.rand(4, 3, device='cuda' if torch.cuda.is_available() else 'cpu')"
    notebook(tmp_path, '00_fault', make, first, second)
    check(tmp_path/'00_fault.ipynb')
    with pytest.raises(pytest.fail.Exception) as e: check(tmp_path/'00_fault.ipynb', ON)
    assert f'00_fault.ipynb, cell 4: {error}' in str(e.value).splitlines()[0]


@pytest.mark.parametrize('file', ASKING)
def test_explainers(file): pytest_on_device(f'tests/{file}', '--device', 'cuda')


@pytest.mark.parametrize('jitter', '01', ids=['exact', 'noisy'])
def test_the_device_itself(jitter): pytest_on_device('tests/fake_cuda/selftest.py', env=ON | {'FAKE_CUDA_JITTER': jitter})


def test_training():
    "A network learns on the device: parameters, batches and the optimiser's state are there, and the loss falls."
    python('''
import torch
from pcam_tp.data import open_split, subset
from pcam_tp.models import build
from pcam_tp.training import train
model = build('small_cnn', width=.1)
before = [p.clone() for p in model.parameters()]
few = subset(open_split('train'), 64)
history = train(model, few, subset(open_split('valid'), 32), epochs=6, batch_size=16, precision='no')
assert torch.cuda.is_fake and all(p.is_cuda for p in model.parameters()), 'trained on the processor'
assert not any(torch.equal(p, b.cuda()) for p, b in zip(model.parameters(), before)), 'some parameters stood still'
assert len(history) == 6 and history.train_loss.iloc[-1] < history.train_loss.iloc[0], history
''', env=ON)


def test_every_batch_is_counted_once():
    "Channels that lie last do not suit `view`: this is found out before batch normalisation counts."
    python('''
import torch
from torch import nn
from pcam_tp.classifier import Classifier
from pcam_tp.data import open_split, subset
from pcam_tp.training import train
class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 4, 8, 8), nn.BatchNorm2d(4), nn.Linear(4*12*12, 2)
    def forward(self, x): return self.fc(self.bn(self.conv(x)).view(len(x), -1))
few = [subset(open_split(s), n) for s, n in (('train', 64), ('valid', 16))]
for precision in ('no', 'bf16'):
    model = Classifier(Own()).cuda()
    train(model, *few, epochs=2, batch_size=16, precision=precision)
    assert model.net.bn.num_batches_tracked % 4 == 0, precision   # four in an epoch, up to the best one
''', env=ON)


def test_recorded_training():
    "Steps that are replayed learn what single ones learn: same losses, same weights; somebody else's code is launched."
    python('''
import contextlib
from unittest import mock
import torch
from pcam_tp import training
from pcam_tp.data import open_split, subset
from pcam_tp.models import build
few = [subset(open_split(s), n) for s, n in (('train', 64), ('valid', 32))]
first = lambda model, kind: next(m for m in model.modules() if isinstance(m, kind))
def learned(records, **options):
    model, replayed = build('small_cnn', width=.1, dropout=.3), []
    steady, replay, everywhere = training._steady, torch.cuda.CUDAGraph.replay, contextlib.nullcontext()
    if records == 'hook': model.net[0].register_forward_hook(lambda *a: None)
    if records == 'hook of all modules': everywhere = torch.nn.modules.module.register_module_forward_hook(lambda *a: None)
    if records == 'hook of a parameter': next(model.parameters()).register_hook(lambda g: g)
    if records == 'function': model.output = lambda out: out
    if records == 'a wait': first(model, torch.nn.BatchNorm2d).momentum = None
    def noted(graph): replayed.append(graph); replay(graph)
    with everywhere, mock.patch.object(training, '_steady', lambda run: steady(run) and records), \\
         mock.patch.object(torch.cuda.CUDAGraph, 'replay', noted):
        history = training.train(model, *few, epochs=4, batch_size=16, **options)
    assert all(p.grad is None for p in model.parameters())
    return history.train_loss.tolist(), model.state_dict(), len(replayed)
for options in (dict(precision='no'), dict(precision='bf16', schedule='plateau', class_weights=(1, 3))):
    (l0, w0, n0), (l1, w1, n1) = [learned(r, **options) for r in (False, True)]
    assert (n0, n1) == (0, 16) and l0 == l1, (n0, n1, l0, l1)
    assert all(torch.equal(w0[k], w1[k]) for k in w0), 'other weights'
for records in ('hook', 'hook of all modules', 'hook of a parameter', 'function', 'a wait'):
    assert learned(records, precision='no')[2] == 0, records
assert learned(True, precision='fp16')[2] == 0
model = build('small_cnn', width=.1)
before = {k: v.cuda() for k, v in model.state_dict().items()}
try:
    with mock.patch('torch.cuda.graph', side_effect=RuntimeError('operation not permitted')):
        training.train(model, *few, epochs=4, batch_size=16, precision='no')
    assert False, 'trained all the same'
except RuntimeError as e: assert "precision='fp16'" in str(e) and 'not permitted' in str(e.__cause__), e
assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), 'a failed recording left its traces'
''', env=ON | {'FAKE_CUDA_JITTER': '0'})


def test_a_resumed_run_keeps_the_scale_of_float16():
    python('''
import tempfile, torch
from pathlib import Path
from unittest import mock
from pcam_tp.data import open_split, subset
from pcam_tp.models import build
from pcam_tp.training import _Run, train
few = [subset(open_split(s), n) for s, n in (('train', 64), ('valid', 32))]
saved, epoch, made = _Run.save, _Run.epoch, Path(tempfile.mkdtemp())
def run(file, precision='fp16'):
    train(build('small_cnn', width=.1), *few, epochs=3, batch_size=16, precision=precision, checkpoint=made/file)
    return torch.load(made/file, weights_only=True)
def stops(self, bar):
    if self.history: raise KeyboardInterrupt
    return epoch(self, bar)
whole = run('whole')['scaler']
with mock.patch.object(_Run, 'epoch', stops):
    try: run('cut')
    except KeyboardInterrupt: pass
assert torch.load(made/'cut', weights_only=True)['scaler']['_growth_tracker'] == 4, 'one epoch of four steps'
assert run('cut')['scaler'] == whole and whole['_growth_tracker'] == 12, whole
with mock.patch.object(_Run, 'epoch', stops):
    try: run('bf16', 'bf16')
    except KeyboardInterrupt: pass
assert 'scaler' not in torch.load(made/'bf16', weights_only=True)
assert run('bf16')['scaler']['_growth_tracker'] == 8, 'two epochs on a GPU that has float16 only'
''', env=ON | {'FAKE_CUDA_JITTER': '0'})
