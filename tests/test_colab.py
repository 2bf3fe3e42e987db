"Colab without Colab: the first cell on two simulated machines, a fork, and what Colab's frozen list of packages lacks."
import json, os, re, shutil, sys
from configparser import ConfigParser
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from threading import Thread
from unittest.mock import patch

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from conftest import NOTEBOOKS, ROOT, python, run
from pcam_tp.assets import ASSETS, pack_assets
from pcam_tp.colab import badges, point_at, repository
from pcam_tp.core import picture
from pcam_tp.synthetic import write_synthetic

OURS = repository(ROOT)
SETTINGS = ConfigParser(delimiters=['='])
SETTINGS.read(ROOT/'settings.ini', encoding='utf-8')


# ---------------------------------------------------------------------------------------------- the first cell

MACHINE = '''
import importlib.util, json, os, pathlib, sys, types
from importlib.machinery import ModuleSpec
import torch
from IPython.core.interactiveshell import InteractiveShell
cells, drive, refuses, gpu = json.loads(sys.argv[1])
shell, pips = InteractiveShell.instance(), []
def pip(line):
    pips.append(line)
    import pcam_tp.colab
    pcam_tp.colab._DRIVE = pathlib.Path(drive)   # elsewhere than on Colab
shell.register_magic_function(pip)
def mount(at):
    if refuses: raise ValueError('mount failed')
    pathlib.Path(at, 'MyDrive').mkdir(parents=True, exist_ok=True)
google, colab = (importlib.util.module_from_spec(ModuleSpec(name, None)) for name in ('google', 'google.colab'))
google.colab, colab.drive = colab, types.SimpleNamespace(mount=mount)
sys.modules.update({'google': google, 'google.colab': colab})
torch.cuda.is_available = lambda: gpu
for c in cells:
    if not shell.run_cell(c).success: sys.exit(1)
print(json.dumps(dict(pips=pips, assets=os.environ.get('PCAM_TP_ASSETS'), budget=os.environ.get('PCAM_TP_BUDGET'))))
'''
LOOK = '''
from pcam_tp.core import source
from pcam_tp.data import open_splits
print('source', source(), [len(s) for s in open_splits()] if source() == 'assets' else '')
'''


def first_cell(name='03_gradcam', **changes):
    "The first code cell that a notebook runs on Colab, as the class's copy has it."
    nb = json.loads(NOTEBOOKS[name].read_text(encoding='utf-8'))
    if changes: point_at(nb, *OURS, **changes)
    return next(''.join(c['source']) for c in nb['cells'] if '%pip' in ''.join(c['source']))


def machine(home, cells, drive, refuses=False, gpu=False):
    "What a new machine prints, and at last what was installed and set. Its working folder is `home`."
    home.mkdir()
    env = {k: v for k, v in os.environ.items() if not k.startswith('PCAM_TP_')}
    cells = [*cells, 'import pathlib' + LOOK]
    *said, last = python(MACHINE, json.dumps([cells, str(drive), refuses, gpu]), cwd=home, env=env).stdout.splitlines()
    return '\n'.join(said), json.loads(last)


@pytest.fixture(scope='module')
def web(tmp_path_factory):
    "An address that serves a class's files (patches and one network), and the paths that it was asked for."
    folder, asked = tmp_path_factory.mktemp('web'), []
    raw = write_synthetic(folder/'raw', dict(train=24, valid=12, test=12))
    (folder/'net').mkdir()
    (folder/'net'/'card.json').write_text('{}')
    pack_assets(raw, {'small_cnn-assets-quick-1234567890': folder/'net'}, folder/'class')
    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *args): asked.append(self.path)
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Handler, directory=folder/'class'))
    Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}', asked
    server.shutdown()


def test_first_cell(web, tmp_path):
    "Installed once, files fetched before anything else, the network of the class kept on Drive for the next machine."
    address, asked = web
    cell = first_cell(assets=address)
    kept = cell.replace('keep_on_drive = False', 'keep_on_drive = True')
    assert kept != cell
    said, last = machine(tmp_path/'one', [kept, kept], tmp_path/'drive')   # run twice by an impatient student
    assert last == dict(pips=[f'install -q "pcam_tp[course] @ git+https://github.com/{OURS.owner}/{OURS.name}"'], assets=address,
                        budget='quick'), 'the budget of the networks: with another one they would be trained again'
    assert 'the files of your class · trained networks that are here: 1' in said and 'source assets [24, 12, 12]' in said
    assert said.count('T4 GPU') == 1 and said.count('patches:') == 1
    assert asked.count(f'/{ASSETS}') == 1 and (tmp_path/'drive'/'MyDrive'/'pcam_tp'/'models'/'small_cnn-assets-quick-1234567890').is_dir()
    assert not list((tmp_path/'drive').rglob('*.h5')), 'patches are read at random: not from Drive'

    alone = first_cell().replace('keep_on_drive = False', 'keep_on_drive = True')   # the next day, without the class's files
    said, last = machine(tmp_path/'two', [alone], tmp_path/'drive', gpu=True)
    assert 'patches: synthetic · trained networks that are here: 1' in said and 'GPU' not in said
    assert last['assets'] is last['budget'] is None and 'source synthetic' in said
    assert (tmp_path/'two'/'data'/'models'/'small_cnn-assets-quick-1234567890'/'card.json').read_text() == '{}'


def test_first_cell_goes_on(tmp_path):
    "Neither a wrong address nor a refused Drive stops the lesson; both are said."
    cell = first_cell(assets='http://127.0.0.1:9').replace('keep_on_drive = False', 'keep_on_drive = True')
    said, last = machine(tmp_path/'one', [cell], tmp_path/'drive', refuses=True)
    assert 'No Drive (ValueError: mount failed)' in said and 'does not answer' in said
    assert 'source synthetic' in said and said.count('SYNTHETIC') == 1
    assert not (tmp_path/'one'/'data'/'models').is_symlink()


def test_first_cell_does_nothing_elsewhere():
    code = first_cell().replace('%pip', 'raise SystemExit #')
    assert python(f'{code}\nprint("pcam_tp" in sys.modules)').stdout.split() == ['False']


def test_pictures_on_the_ipython_of_colab():
    "IPython 7.34 knows no `alt`: pictures must not hand it over, and carry it all the same."
    import matplotlib.pyplot as plt
    from IPython.display import Image
    new = Image.__init__
    def old(self, data=None, url=None, filename=None, format=None, embed=None, width=None, height=None, retina=False,
            unconfined=False, metadata=None):
        new(self, data, url, filename, format, embed, width, height, retina, unconfined, metadata)
    fig = plt.figure(figsize=(1, 1))
    plt.close(fig)
    with patch.object(Image, '__init__', old): shown = picture(fig, 'nothing')
    assert shown._repr_mimebundle_()[1] == {'image/png': {'alt': 'nothing'}}


# ---------------------------------------------------------------------------------------------- after a fork

NAMED = re.compile(rf'(?<![\w-])(?:{OURS.owner}(?=/|\.github\.io|@users)|{OURS.owner}/{OURS.name}(?![\w-]))')


@pytest.fixture
def fork(tmp_path):
    "A copy of the sources."
    ignore = shutil.ignore_patterns('.*', '__pycache__', 'data', 'figures', 'build', 'dist', '*.egg-info', '_proc', '_docs')
    return shutil.copytree(ROOT, tmp_path/'fork', ignore=ignore)


def contents(folder): return {f.relative_to(folder): f.read_bytes() for f in sorted(folder.rglob('*')) if f.is_file()}


def test_a_fork_names_its_owner_everywhere(fork, capsys):
    before = contents(fork)
    to = 'jane-doe', 'xai.course', 'class/2027'
    would = badges(fork, *to, dry_run=True)
    assert contents(fork) == before and {'README.md', 'CITATION.cff', 'settings.ini', 'pcam_tp/_modidx.py'} <= {*would}
    assert badges(fork, *to) == would and repository(fork) == to
    left = {str(f): NAMED.findall(t.decode()) for f, t in contents(fork).items() if f.suffix != '.png' and NAMED.search(t.decode())}
    assert not left, f'the old owner is still named in {left}'
    readme = (fork/'README.md').read_text(encoding='utf-8')
    owner, name, branch = to   # written apart, so that no test names a repository that badges would take for an old one
    assert f'github/{owner}/{name}/blob/{branch}/nbs/00_data.ipynb' in readme
    assert f'git+https://github.com/{owner}/{name}@{branch}"' in readme

    exported = contents(fork/'pcam_tp')
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'}
    run(os.path.join(os.path.dirname(sys.executable), 'nbdev_export'), cwd=fork, env=env)
    assert contents(fork/'pcam_tp') == exported, 'the next export changes what badges wrote'
    assert run(sys.executable, 'setup.py', '--url', cwd=fork).stdout.split()[-1] == f'https://github.com/{owner}/{name}'

    capsys.readouterr()
    assert badges(fork) == {} and 'no files' in capsys.readouterr().out
    badges(fork, *OURS)
    after = {f: t for f, t in contents(fork).items() if '.egg-info' not in str(f)}
    assert after == before


def test_settings_edited_by_hand(fork):
    "Whoever writes a new owner into settings.ini first gets the same copy."
    settings = fork/'settings.ini'
    settings.write_text(re.sub(r'(?m)^user = .*$', 'user = jane-doe', settings.read_text(encoding='utf-8')), encoding='utf-8')
    assert badges(fork) and not any(NAMED.search(t.decode()) for f, t in contents(fork).items() if f.suffix != '.png')


# ---------------------------------------------------------------------------------------------- what Colab has installed

FROZEN = sorted((ROOT.parent/'shared'/'colab').glob('pip-freeze-*.txt'))
MISSING = {'captum', 'grad-cam', 'lime', 'ttach'}   # on Colab: what our first cell installs there beside pcam_tp itself
THERE = dict(python_version='3.13', python_full_version='3.13.5', sys_platform='linux', platform_system='Linux')


def frozen(path):
    "{package: version} of a list that `pip freeze` wrote; where it names an address, the version in the file's name."
    found = {}
    for line in path.read_text(encoding='utf-8').splitlines():
        if m := re.match(r'([\w.-]+)==(\S+)$', line) or re.match(r'([\w.-]+) @ .*[-_](\d[\w.%]*)-\S*\.whl', line):
            found[canonicalize_name(m[1])] = m[2].replace('%2B', '+')
    return found


def requirements(*keys): return [Requirement(r) for k in keys for r in SETTINGS['DEFAULT'].get(k, '').split()]


def install(wanted, there):
    "Packages that installing `wanted` brings, and requirements that what is there does not meet (pip would move it)."
    new, moved, todo = set(), [], [*wanted]
    while todo:
        r = todo.pop()
        name = canonicalize_name(r.name)
        if r.marker and not r.marker.evaluate({**THERE, 'extra': ''}): continue
        if name in there:
            if not r.specifier.contains(there[name], prereleases=True): moved.append(f'{r} (there: {there[name]})')
        elif name not in new:
            new.add(name)
            todo += map(Requirement, metadata.requires(name) or [])
    return new, moved


@pytest.mark.skipif(not FROZEN, reason='no ../shared/colab/pip-freeze-*.txt beside this checkout: what Colab has is not known')
@pytest.mark.parametrize('path', FROZEN, ids=lambda p: p.stem)
def test_installing_moves_nothing_on_colab(path):
    there = frozen(path)
    assert len(there) > 600 and there['torch'].startswith('2.') and there['ipywidgets'] == '7.7.1'
    new, moved = install(requirements('requirements', 'course_requirements', 'hub_requirements'), there)
    assert not moved, f'pip would move packages of Colab: {moved}'
    assert new == MISSING


def test_a_package_that_would_move_is_seen():
    there = dict(numpy='2.0.2', torch='2.11.0+cpu', pillow='11')
    assert install([Requirement('numpy>=2.1'), Requirement('torch>=2.3')], there)[1] == ['numpy>=2.1 (there: 2.0.2)']
    new, moved = install([Requirement('ttach')], there)
    assert (new, moved) == ({'ttach'}, [])
    assert 'matplotlib' in install([Requirement('grad-cam')], there)[0], 'what a new package needs is looked at too'
