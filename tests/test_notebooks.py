"Every notebook runs from top to bottom with nbdev_test: its own checks are the library's tests."
import os, re
from pathlib import Path
import sys

import pytest

from conftest import NOTEBOOKS, ROOT, run

LIMIT = 30*60   # seconds for one notebook


@pytest.mark.parametrize('path', NOTEBOOKS, ids=[p.stem for p in NOTEBOOKS])
def test_notebook(path):
    nbdev_test = Path(sys.executable).with_name('nbdev_test')
    p = run(nbdev_test, '--path', path.relative_to(ROOT), '--do_print', ok=False, timeout=LIMIT, env={**os.environ, 'MPLBACKEND': 'agg'})
    if p.returncode == 0 and '- Completed' in p.stdout: return
    lines = re.sub(r'\x1b\[[0-9;]*m', '', p.stdout).strip().splitlines()
    pytest.fail('\n'.join([f'{path.name} fails; again with: .venv/bin/nbdev_test --path nbs/{path.name}', *lines[-60:]]), pytrace=False)


def test_there_are_notebooks(): assert NOTEBOOKS, f'no notebooks in {ROOT/"nbs"}'
