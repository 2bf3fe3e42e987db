"What all tests share: paths, the embedded data, and the last line 'N passed, N failed'."
import os, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(p for p in (ROOT/'nbs').glob('*.ipynb') if not p.name.startswith(('_', '.')))
os.environ.update(PCAM_TP_SOURCE='synthetic', PCAM_TP_BUDGET='quick')   # whatever the shell says: tests use the embedded data
os.environ.pop('PCAM_TP_HOME', None)
os.environ['PYTHONPATH'] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))   # this checkout, in every process


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


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config):
    "The last line. Errors count as failures, and so does a run that did not get to its tests."
    reporter = config.pluginmanager.get_plugin('terminalreporter')
    if reporter is None or config.option.collectonly or not hasattr(config, '_pcam_tp_exit'): return
    n = {k: len(v) for k, v in reporter.stats.items()}
    failed = n.get('failed', 0) + n.get('error', 0)
    if config._pcam_tp_exit not in (0, 1, 5): failed = max(failed, 1)   # interrupted, internal error, wrong use
    skipped = n.get('skipped', 0) + n.get('xfailed', 0)
    reporter.ensure_newline()
    reporter.write_line(f'{n.get("passed", 0) + n.get("xpassed", 0)} passed, {failed} failed' + (f', {skipped} skipped' if skipped else ''))


def pytest_sessionfinish(session, exitstatus): session.config._pcam_tp_exit = int(exitstatus)
