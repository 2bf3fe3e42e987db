"What all tests share: paths, the embedded data, where tensors live, the order, and the last line 'N passed, N failed'."
import os, subprocess, sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
sys.path.insert(0, str(ROOT/'scripts'))
from run import notebooks

NOTEBOOKS = notebooks()   # {name: path}
CUDA = 'tests/test_cuda.py'
# The networks that most notebooks wait for, meanwhile what does without them; then the longest, so that no worker ends late.
FIRST = ('test_notebooks.py::test_notebook[02', 'test_explainers[', 'test_training.py', 'test_models.py', 'test_methods.py',
         'test_notebook[08', 'test_notebook[07', 'test_notebook[06', 'test_notebook[02', 'test_notebook[04', 'test_notebook[0',
         'test_notebook[1', 'test_wheel.py')
os.environ.update(PCAM_TP_SOURCE='synthetic', PCAM_TP_BUDGET='quick')   # whatever the shell says: tests use the embedded data
os.environ.pop('PCAM_TP_HOME', None)
# this checkout, in every process
os.environ['PYTHONPATH'] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
if workers := os.environ.get('PYTEST_XDIST_WORKER_COUNT'):   # they share the processor
    os.environ.setdefault('OMP_NUM_THREADS', str(max(1, len(os.sched_getaffinity(0))//int(workers))))


def run(*args, ok=True, **kw):
    "Run a command; its completed process. With `ok`, a failure shows the end of what the command printed."
    kw = {**dict(cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding='utf-8'), **kw}
    p = subprocess.run([str(a) for a in args], **kw)
    if ok and p.returncode:
        tail = '\n'.join((p.stdout or '').splitlines()[-40:])
        pytest.fail(f'exit status {p.returncode} of: {" ".join(map(str, args))}\n{tail}', pytrace=False)
    return p


def python(code, *args, **kw):
    "Run Python `code` in a fresh process of this interpreter."
    return run(sys.executable, '-c', code, *args, **kw)


def settled(model, x=None):
    "Running statistics of a batch: without them untrained networks with batch normalisation answer next to nothing."
    import torch
    if x is None: x = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    model.eval()
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm2d): m.train().momentum = None
    with torch.no_grad(): model(x)
    return model.eval()


def pytest_addoption(parser):
    parser.addoption('--device', help="where the tensors that a test makes, and every Classifier, live: 'cuda'")


def pytest_configure(config):
    if config.option.device: _live_on(config.option.device)


def _live_on(device):
    "Tensors made in a test file, and every `Classifier`, move to `device`; what the library makes is its own business."
    import torch
    from pcam_tp.classifier import Classifier
    def moving(make):
        def made(*args, **kwargs):
            out = make(*args, **kwargs)
            ours = Path(sys._getframe(1).f_code.co_filename).parent == TESTS
            return out.to(device) if ours and 'device' not in kwargs else out
        return made
    for name in ('rand', 'randn', 'randint', 'zeros', 'ones', 'full', 'eye', 'arange', 'linspace', 'tensor', 'as_tensor',
                 'from_numpy'):
        setattr(torch, name, moving(getattr(torch, name)))
    init = Classifier.__init__
    def __init__(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.to(device)
    Classifier.__init__ = __init__


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: next((i for i, part in enumerate(FIRST) if part in item.nodeid), len(FIRST)))


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config):
    "The last lines. Errors count as failures, and so does a run that did not get to its tests."
    reporter = config.pluginmanager.get_plugin('terminalreporter')
    if reporter is None or config.option.collectonly or not hasattr(config, '_pcam_tp_exit'): return
    reporter.ensure_newline()
    simulated = {k: [r for r in v if getattr(r, 'nodeid', '').startswith(CUDA)] for k, v in reporter.stats.items()}
    if any(simulated.values()): reporter.write_line(f'simulated CUDA: {_count(simulated)}')
    early_end = config._pcam_tp_exit not in (0, 1, 5)   # interrupted, internal error, wrong use
    reporter.write_line(_count(reporter.stats, at_least=int(early_end)))


def _count(stats, at_least=0):
    "'N passed, N failed[, N skipped]' of pytest's lists of reports."
    n = lambda *kinds: sum(len(stats.get(k, [])) for k in kinds)
    skipped = n('skipped', 'xfailed')
    text = f'{n("passed", "xpassed")} passed, {max(n("failed", "error"), at_least)} failed'
    return text + (f', {skipped} skipped' if skipped else '')


def pytest_sessionfinish(session, exitstatus): session.config._pcam_tp_exit = int(exitstatus)
