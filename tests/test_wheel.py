"The wheel stands alone: installed elsewhere it imports, says its version, names its needs and changes nothing in the process."
import ast, functools, json, os, re, shutil, sys, sysconfig, venv, zipfile
from email.parser import Parser
from importlib.metadata import packages_distributions

import pytest

from conftest import ROOT, python, run

pytestmark = pytest.mark.xdist_group('wheel')   # one worker builds it

MODULES = sorted(p.stem for p in (ROOT/'pcam_tp').glob('*.py') if not p.stem.startswith('_'))
ALL = 'import importlib\nfor m in ["pcam_tp"] + %r: importlib.import_module(m)\n' % [f'pcam_tp.{m}' for m in MODULES]
TOOLS = 'scripts', 'tests', 'benchmarks'
ANSWERS = 'wrong', 'right'   # folders of tests/: pieces of cells, no modules
OURS = {'pcam_tp', *(p.stem for folder in TOOLS for p in (ROOT/folder).rglob('*.py'))}
OTHERS = {'google'}   # google.colab: there only on Colab, where it needs no requirement


def canonical(name): return re.sub(r'[-_.]+', '-', name).lower()


def bare():
    "The environment without our switches and paths: the checkout and its egg-info must not be found."
    return {k: v for k, v in os.environ.items() if not k.startswith(('PYTHON', 'PCAM_TP'))}


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    "Built from a copy: no build leftovers in the repository."
    src = tmp_path_factory.mktemp('src')
    for name in ('settings.ini', 'setup.py', 'README.md', 'LICENSE'): shutil.copy(ROOT/name, src)
    shutil.copytree(ROOT/'pcam_tp', src/'pcam_tp', ignore=shutil.ignore_patterns('__pycache__'))
    run(sys.executable, '-m', 'build', '--wheel', '--no-isolation', '--outdir', src/'dist', src)
    return next((src/'dist').glob('*.whl'))


@pytest.fixture(scope='module')
def metadata(wheel):
    with zipfile.ZipFile(wheel) as z:
        return Parser().parsestr(z.read(next(n for n in z.namelist() if n.endswith('.dist-info/METADATA'))).decode())


@pytest.fixture(scope='module')
def installed(wheel, tmp_path_factory):
    "The interpreter of a new environment that holds the wheel and sees our third-party packages, but no editable install."
    env = tmp_path_factory.mktemp('env')
    venv.create(env, with_pip=False)
    exe = env/('Scripts' if os.name == 'nt' else 'bin')/'python'
    run(sys.executable, '-m', 'pip', '--python', exe, 'install', '-q', '--no-deps', '--no-index', wheel, cwd=env, env=bare())
    purelib = run(exe, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))').stdout.strip()
    paths = dict.fromkeys(sysconfig.get_path(k) for k in ('purelib', 'platlib'))
    with open(f'{purelib}/third_party.pth', 'w') as f: f.write('\n'.join(paths) + '\n')   # .pth files inside are not read
    return exe


def elsewhere(exe, code, tmp_path): return run(exe, '-c', code, cwd=tmp_path, env=bare()).stdout


def test_imports_from_the_wheel(installed, tmp_path):
    out = elsewhere(installed, ALL + 'import pcam_tp, json; print(json.dumps(pcam_tp.__file__))', tmp_path)
    where = json.loads(out.splitlines()[-1])
    assert where.startswith(str(installed.parent.parent)), f'imported from {where}'
    assert not list(tmp_path.iterdir()), 'importing wrote files'


def test_version(installed, metadata, tmp_path):
    out = elsewhere(installed, 'import pcam_tp, importlib.metadata as m; print(pcam_tp.__version__, m.version("pcam_tp"))', tmp_path)
    assert out.split() == [metadata['Version']]*2


def test_the_command(installed, tmp_path):
    help = run(installed.with_name('pcam-tp'), '--help', cwd=tmp_path, env=bare()).stdout
    assert all(c in help for c in ('download', 'subset', 'assets'))
    bad = run(installed.with_name('pcam-tp'), 'subset', 'out', ok=False, cwd=tmp_path, env=bare() | dict(PCAM_TP_SOURCE='no/such/folder'))
    assert bad.returncode == 1 and 'nor an existing folder' in bad.stdout and 'Traceback' not in bad.stdout


def third_party(folder):
    "{top-level package: where} of what the files of a folder import: at module level, and inside functions and `try`."
    always, sometimes = {}, {}
    for path in sorted(p for p in folder.rglob('*.py') if p.parent.name not in ANSWERS):
        tree = ast.parse(path.read_text(encoding='utf-8'))
        scopes = ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.Try
        inside = {n for f in ast.walk(tree) if isinstance(f, scopes) for n in ast.walk(f)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import): names = [a.name for a in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level: names = [node.module]
            else: continue
            for top in {n.split('.')[0] for n in names} - set(sys.stdlib_module_names) - OURS - OTHERS:
                (sometimes if node in inside else always).setdefault(top, f'{path.name}:{node.lineno}')
    return always, sometimes


distributions = functools.cache(packages_distributions)   # reads the files of every package


def owners(top):
    "The packages that bring the top-level module `top`."
    return {canonical(d) for d in distributions().get(top, [top])}


@pytest.fixture(scope='module')
def required(metadata):
    "Names of the packages that the wheel requires: always, and with every extra."
    reqs = metadata.get_all('Requires-Dist')
    name = lambda r: canonical(re.match(r'[\w.-]+', r)[0])
    return {name(r) for r in reqs if 'extra ==' not in r}, {name(r) for r in reqs}


def test_requirements_cover_imports(required):
    plain, every = required
    always, sometimes = third_party(ROOT/'pcam_tp')
    tools = [imports for folder in TOOLS for imports in third_party(ROOT/folder)]
    for imported, named in ((always, plain), (sometimes, every), *((t, every) for t in tools)):
        for top, where in imported.items():
            assert owners(top) & named, f'{where} imports {top} ({", ".join(owners(top))}): not in settings.ini'


def test_requirements_are_imported(required):
    always, sometimes = third_party(ROOT/'pcam_tp')
    idle = required[0] - {d for top in always | sometimes for d in owners(top)}
    assert not idle, f'settings.ini requires {", ".join(sorted(idle))}, which pcam_tp/ does not import (an extra?)'


STATE = '''
import json, logging, os, random, signal, sys, threading, warnings
import matplotlib, numpy as np, torch
def state():
    b = torch.backends
    return dict(
        threads=torch.get_num_threads(), interop=torch.get_num_interop_threads(), torch_seed=torch.initial_seed(), torch_rng=hash(bytes(torch.get_rng_state().tolist())),
        numpy_rng=hash(np.random.get_state()[1].tobytes()), python_rng=hash(random.getstate()), dtype=str(torch.get_default_dtype()), grad=torch.is_grad_enabled(),
        deterministic=torch.are_deterministic_algorithms_enabled(), matmul=torch.get_float32_matmul_precision(), cudnn=(b.cudnn.benchmark, b.cudnn.deterministic),
        tf32=(b.cuda.matmul.allow_tf32, b.cudnn.allow_tf32), env=dict(os.environ), rc={k: str(v) for k, v in matplotlib.rcParams.items()}, backend=matplotlib.get_backend(),
        warnings=[str(w) for w in warnings.filters], handlers=[str(h) for h in logging.getLogger().handlers], level=logging.getLogger().level,
        sigint=str(signal.getsignal(signal.SIGINT)), cwd=os.getcwd(), path=list(sys.path), alive=threading.active_count(), excepthook=str(sys.excepthook))
'''


def test_importing_changes_nothing(tmp_path):
    "What third-party packages do when they are imported is not ours: they come first, then the state is taken."
    out = python(ALL + 'import sys, json; print(json.dumps([m for m in sys.modules if not m.startswith(("pcam_tp", "__"))]))', cwd=tmp_path).stdout
    (tmp_path/'modules.json').write_text(out.splitlines()[-1])
    code = f'''
import importlib, json, contextlib
for m in json.load(open("modules.json")):
    with contextlib.suppress(Exception): importlib.import_module(m)
{STATE}
before = state()
{ALL}
after = state()
changed = {{k: (before[k], after[k]) for k in before if before[k] != after[k]}}
print(json.dumps(changed, default=str))
'''
    changed = json.loads(python(code, cwd=tmp_path).stdout.splitlines()[-1])
    assert not changed, f'importing pcam_tp changed: {changed}'
