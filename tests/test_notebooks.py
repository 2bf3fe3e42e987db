"Every notebook runs from top to bottom with nbdev_test: its own checks are the library's tests."
import os, re, sys
from pathlib import Path

import pytest

from conftest import NOTEBOOKS, ROOT, run

LIMIT = 30*60   # seconds for one notebook


def check(path, env=os.environ, again='.venv/bin/nbdev_test --path {}'):
    "Run the notebook at `path`; a failure names notebook, cell and error, and the command that shows it `again`."
    path = os.path.relpath(path, ROOT)
    nbdev_test = Path(sys.executable).with_name('nbdev_test')
    p = run(nbdev_test, '--path', path, '--do_print', ok=False, timeout=LIMIT, env={**env, 'MPLBACKEND': 'agg'})
    if p.returncode == 0 and '- Completed' in p.stdout: return
    out = re.sub(r'\x1b\[[0-9;]*m', '', p.stdout).strip()
    cell = re.search(r'While Executing Cell #(\d+)', out)
    errors = re.findall(r'^[\w.]+(?:Error|Exception|Interrupt)\b.*(?:\n(?!\n).*){0,2}', out, re.M)
    what = f'{path}, cell {cell[1] if cell else "?"}: {" ".join(errors[-1].split()) if errors else "no result"}'
    pytest.fail('\n'.join([what, *out.splitlines()[-60:], f'again with: {again.format(path)}']), pytrace=False)


@pytest.mark.parametrize('name', NOTEBOOKS)
def test_notebook(name): check(NOTEBOOKS[name])


def test_there_are_notebooks(): assert NOTEBOOKS, f'no notebooks in {ROOT/"nbs"}'
