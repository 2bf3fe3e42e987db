"Every notebook runs from top to bottom with nbdev_test: its own checks are the library's tests."
import os, re, sys
from pathlib import Path

import pytest

from conftest import NOTEBOOKS, ROOT, run

LIMIT = 30*60   # seconds for one notebook


def check(name, env=os.environ):
    "Run the notebook called `name`; what failed, where and how, if anything did."
    path = NOTEBOOKS[name].relative_to(ROOT)
    nbdev_test = Path(sys.executable).with_name('nbdev_test')
    p = run(nbdev_test, '--path', path, '--do_print', ok=False, timeout=LIMIT, env={**env, 'MPLBACKEND': 'agg'})
    if p.returncode == 0 and '- Completed' in p.stdout: return
    lines = re.sub(r'\x1b\[[0-9;]*m', '', p.stdout).strip().splitlines()
    again = f'{path} fails; again with: .venv/bin/nbdev_test --path {path}'
    pytest.fail('\n'.join([again, *lines[-60:]]), pytrace=False)


@pytest.mark.parametrize('name', NOTEBOOKS)
def test_notebook(name): check(name)


def test_there_are_notebooks(): assert NOTEBOOKS, f'no notebooks in {ROOT/"nbs"}'
