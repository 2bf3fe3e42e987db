"The library is what the notebooks export, and the notebooks are clean, small and portable."
import ast, functools, json, os, re, shutil, sys
from pathlib import Path

import pytest
from IPython.core.inputtransformer2 import TransformerManager

from conftest import NOTEBOOKS, ROOT, run
from pcam_tp.colab import repository

MACHINE_PATH = re.compile(r'(?<![\w.:/~-])/(?:work|root|tmp|home|Users|content)/[\w.-]+')
OURS = repository(ROOT)   # as settings.ini says
COLAB = re.compile(r'https://colab\.research\.google\.com/github/{}/{}/blob/{}/([^)\s"]+)'.format(*map(re.escape, OURS)))
each_notebook = pytest.mark.parametrize('path', NOTEBOOKS.values(), ids=NOTEBOOKS)
pytestmark = pytest.mark.xdist_group('export')   # one worker makes the copy


def cells(path, kind='code'):
    "(number, source, outputs) of the cells of a notebook, counted from 1."
    for i, c in enumerate(json.loads(path.read_text(encoding='utf-8'))['cells'], 1):
        if c['cell_type'] == kind: yield i, ''.join(c['source']), c.get('outputs', [])


def texts(outputs):
    "The readable text of cell outputs; images are left out."
    for o in outputs:
        yield ''.join(o.get('text', ''))
        for k, v in o.get('data', {}).items():
            if k.startswith('text/') or k == 'image/svg+xml': yield ''.join(v)


def imports(source):
    "Full names of the modules that notebook code imports; magics are understood."
    for node in ast.walk(ast.parse(TransformerManager().transform_cell(source))):
        if isinstance(node, ast.Import): yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom): yield node.module or ''


@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    "A copy of the sources, in which nbdev may write."
    folder = tmp_path_factory.mktemp('copy')
    for name in ('settings.ini', 'setup.py', 'README.md'): shutil.copy(ROOT/name, folder)
    ignore = shutil.ignore_patterns('__pycache__', '.*')
    for name in ('nbs', 'pcam_tp'): shutil.copytree(ROOT/name, folder/name, ignore=ignore)
    return folder


def nbdev(command, folder):
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'}   # with it nbdev_export does nothing
    return run(Path(sys.executable).with_name(command), cwd=folder, env=env)


def files(folder, glob): return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob(glob))}


def test_library_is_exported(copy):
    for p in (copy/'pcam_tp').rglob('*.py'):
        if p.name != '__init__.py': p.unlink()
    nbdev('nbdev_export', copy)
    ours, fresh = files(ROOT/'pcam_tp', '*.py'), files(copy/'pcam_tp', '*.py')
    stale = [n for n in sorted({*ours, *fresh}) if ours.get(n) != fresh.get(n)]
    assert not stale, f'pcam_tp/ is not what the notebooks export (run nbdev_export): {", ".join(stale)}'


def test_notebooks_are_clean(copy):
    before = files(copy/'nbs', '*.ipynb')
    nbdev('nbdev_clean', copy)
    after = files(copy/'nbs', '*.ipynb')
    dirty = [n for n in before if before[n] != after[n]]
    assert not dirty, f'not clean (run nbdev_clean): {", ".join(dirty)}'


@each_notebook
def test_imports(path):
    for i, source, _ in cells(path):
        for name in imports(source):
            top = name.split('.')[0]
            assert top != 'nbdev', f'cell {i} imports nbdev, which Colab cannot hold'
            same = 'fastcore.test', 'fastcore.basics'
            assert top != 'fastcore' or name in same, f'cell {i} imports {name}: allowed are {" and ".join(same)}'


@each_notebook
def test_cells_are_small(path):
    long = {i: n for i, source, _ in cells(path) if (n := sum(bool(l.strip()) for l in source.splitlines())) > 25}
    assert not long, f'cells with more than 25 lines: {long}'
    assert path.stat().st_size < 300_000, f'{path.stat().st_size:,} bytes, 300,000 at most'


@each_notebook
def test_outputs(path):
    for i, _, outputs in cells(path):
        assert not any(o['output_type'] == 'error' for o in outputs), f'the output of cell {i} is an error'
        for text in texts(outputs):
            found = MACHINE_PATH.search(text)
            assert not found, f'the output of cell {i} names a folder of one machine: {found[0]}'


def silent_pictures(outputs):
    "Kinds of the embedded pictures that say nothing to a reader who cannot see them."
    for o in outputs:
        for kind in o.get('data', {}):
            alt = o.get('metadata', {}).get(kind, {}).get('alt') if kind.startswith('image/') else 'no picture'
            if not (alt or '').strip(): yield kind


@each_notebook
def test_pictures_have_alternative_text(path):
    silent = {i: found for i, _, outputs in cells(path) if (found := list(silent_pictures(outputs)))}
    assert not silent, f'no alternative text (`picture(fig, \'what is seen\')`, then --refresh) in cells {silent}'


def test_missing_alternative_text_is_seen():
    picture = lambda metadata: dict(data={'image/png': '', 'text/plain': ''}, metadata=metadata)
    outputs = [picture(m) for m in ({}, {'image/png': {}}, {'image/png': {'alt': ' '}}, {'image/jpeg': {'alt': 'other'}})]
    assert list(silent_pictures(outputs)) == ['image/png']*4
    assert not list(silent_pictures([picture({'image/png': {'alt': 'a map'}}), dict(data={'text/plain': ''})]))


def test_cleaning_keeps_alternative_text(copy):
    path = copy/'nbs'/'foundation'/'99_picture.ipynb'
    output = dict(output_type='display_data', data={'image/png': 'iVBORw0KGgo='}, metadata={'image/png': {'alt': 'a map'}})
    cell = dict(cell_type='code', execution_count=3, id='one', metadata={'tags': ['x']}, outputs=[output], source=['1'])
    path.write_text(json.dumps(dict(cells=[cell], metadata={}, nbformat=4, nbformat_minor=5)), encoding='utf-8')
    try:
        nbdev('nbdev_clean', copy)
        (_, _, outputs), = cells(path)
        cleaned = json.loads(path.read_text(encoding='utf-8'))['cells'][0]
    finally: path.unlink()
    assert cleaned['metadata'] == {} and not list(silent_pictures(outputs)), 'nbdev_clean drops alternative text'


@functools.cache
def first_cell():
    "What every notebook runs first on Colab."
    first = next(source for _, source, _ in cells(NOTEBOOKS['tools/01_colab']) if '%pip' in source)
    at = '' if OURS.branch == 'main' else f'@{OURS.branch}'
    assert f'%pip install -q "pcam_tp[course] @ git+https://github.com/{OURS.owner}/{OURS.name}{at}"\n' in first
    return first


@each_notebook
def test_colab(path):
    "The badge opens this very notebook, other links one that is there; every bootstrap installs the same."
    text = '\n'.join(source for _, source, _ in cells(path, 'markdown'))
    own, links = path.relative_to(ROOT).as_posix(), COLAB.findall(text)
    badge = re.search(r'\[!\[[^]]*\]\([^)]*colab-badge[^)]*\)\]\(([^)]*)\)', text)
    assert badge or path.parent != ROOT/'nbs', 'a notebook of the course has a badge'
    assert not badge or COLAB.findall(badge[1]) == [own], f'the badge opens {badge[1]}, not {own}'
    for link in links: assert (ROOT/link).exists(), f'a link opens {link}, which is not there'
    first = [source for _, source, _ in cells(path) if 'google.colab' in source and '%pip' in source]
    assert first == [first_cell()], 'the first cell is that of tools/01_colab, and there is one'


def test_readme_lists_every_notebook():
    text = (ROOT/'README.md').read_text(encoding='utf-8')
    for name in NOTEBOOKS:
        assert f'](nbs/{name}.ipynb)' in text, f'README.md has no link to {name}'
        if '/' not in name: assert f'nbs/{name}.ipynb' in COLAB.findall(text), f'README.md has no Colab link to {name}'
    for link in {*re.findall(r'\]\((nbs/[^)]+)\)', text), *COLAB.findall(text)}:
        assert (ROOT/link).exists(), f'README.md links to {link}, which is not there'
