"scripts/run.py on tiny notebooks: the right kernel, readable failures, a clean Ctrl-C, outputs kept and written back."
import json, os, re, runpy, shutil, signal, subprocess, sys, time

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from conftest import ROOT, run
from pcam_tp.core import budget
from run import chosen

SCRIPT = ROOT/'scripts'/'run.py'


def notebook(folder, name, *sources):
    (folder/name).parent.mkdir(parents=True, exist_ok=True)
    cells = [new_markdown_cell('# Title\n\n> promise'), *map(new_code_cell, sources)]
    for i, c in enumerate(cells): c.id = f'cell{i}'
    nbformat.write(new_notebook(cells=cells), folder/f'{name}.ipynb')


def go(folder, *args, script=SCRIPT, **kw):
    return run(sys.executable, script, '--nbs', folder, '--jobs', '1', *args, ok=False, cwd=folder.parent, **kw)


def outputs(path): return [c.outputs for c in nbformat.read(path, as_version=4).cells if c.cell_type == 'code']


def alive(pid):
    "Is process `pid` there and not a zombie?"
    p = subprocess.run(['ps', '-o', 'stat=', '-p', str(pid)], capture_output=True, text=True)
    return p.stdout.strip() not in ('',) and not p.stdout.strip().startswith('Z')


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition(): return True
        time.sleep(.1)
    return False


def test_success_in_order(tmp_path):
    "Each notebook has a fresh kernel of this interpreter in its own folder, even where another kernel is called python3."
    nbs, kernels = tmp_path/'nbs', tmp_path/'jupyter'/'kernels'/'python3'
    kernels.mkdir(parents=True)
    (kernels/'kernel.json').write_text(json.dumps(dict(argv=['false', '{connection_file}'], display_name='python3', language='python')))
    notebook(nbs, '90_late', 'assert "x" not in dir()', 'open("order", "a").write("90 ")')
    notebook(nbs, '00_early', 'import sys, os; x = sys.executable, os.getcwd()', 'print(*x)', 'open("order", "a").write("00 ")', '#| slow\n1/0')
    p = go(nbs, '--out', tmp_path/'out', env={**os.environ, 'JUPYTER_PATH': str(tmp_path/'jupyter')})
    assert p.returncode == 0, p.stdout
    assert (nbs/'order').read_text() == '00 90 '
    assert re.search(r'\[ 1/2\] 00_early … [\d.]+ s ok \(1 cell skipped\)\n\[ 2/2\] 90_late … [\d.]+ s ok\n', p.stdout), p.stdout
    assert re.search(r'2 of 2 notebooks ran in [\d.]+ s\n$', p.stdout), p.stdout
    assert outputs(tmp_path/'out'/'00_early.ipynb')[1][0].text.split() == [sys.executable, str(nbs)]
    assert not any(outputs(nbs/'00_early.ipynb')), 'without --refresh the notebooks stay as they are'


def test_side_by_side(tmp_path):
    "Two notebooks run at once with half of the threads each, those that time or train run alone with all of them."
    nbs = tmp_path/'nbs'
    meet = ('import os, time\nme, other = {0!r}, {1!r}\nopen(me, "w").close()\nend = time.time() + 30\n'
            'while not os.path.exists(other):\n    assert time.time() < end, "never met"\n    time.sleep(.05)')
    log = 'import os\nwith open("threads", "a") as f: f.write(os.environ["OMP_NUM_THREADS"] + " ")'
    alone = 'import glob, os\nassert not glob.glob("running*")'
    busy = 'import time; open("running{0}", "w").close(); time.sleep(1); os.remove("running{0}")'
    notebook(nbs, '00_a', meet.format('a', 'b'), log)
    notebook(nbs, '01_b', meet.format('b', 'a'), log, busy.format(1))
    notebook(nbs, '02_training', alone, log, busy.format(2))
    notebook(nbs, '03_c', alone, log)
    p = go(nbs, '--jobs', '2', env={k: v for k, v in os.environ.items() if k != 'OMP_NUM_THREADS'})
    assert p.returncode == 0 and p.stdout.count(' ok\n') == 4, p.stdout
    cores = len(os.sched_getaffinity(0))
    half = max(1, cores//2)
    assert list(map(int, (nbs/'threads').read_text().split())) == [half, half, cores, half]
    assert go(nbs, '--jobs', '0').returncode == 2


def test_failure_names_the_cell(tmp_path):
    nbs = tmp_path/'nbs'
    notebook(nbs, '00_bad', 'a = 1', 'def f(): raise ValueError("no such thing")', 'f()')
    notebook(nbs, '01_good', '1')
    p = go(nbs)
    assert p.returncode == 1
    for word in ('00_bad.ipynb, code cell 3 of 3', '    f()\n', 'ValueError: no such thing', '1 not tried'): assert word in p.stdout, p.stdout
    assert '01_good …' not in p.stdout
    p = go(nbs, '--keep-going')
    assert p.returncode == 1 and re.search('01_good … .* ok', p.stdout) and 'failed: 00_bad' in p.stdout, p.stdout


TREE = '03_c', '00_a', 'foundation/03_d', 'foundation/00_b', 'foundation/12_e', 'tools/00_f', '_draft', '.cache/00_g'
HERE = ['00_a', '03_c', 'foundation/00_b', 'foundation/03_d', 'foundation/12_e', 'tools/00_f']   # in the order of running


@pytest.fixture
def tree(tmp_path):
    "A course with folders; nothing in it has to run."
    for name in TREE: notebook(tmp_path/'nbs', name, '1')
    return tmp_path/'nbs'


@pytest.mark.parametrize('words, expected', [
    ([], HERE), (['03'], ['03_c']), (['03_c.ipynb'], ['03_c']), (['c'], ['03_c']), (['0*'], HERE[:2]), (['12'], ['foundation/12_e']),
    (['f'], ['tools/00_f']), (['foundation/03'], ['foundation/03_d']), (['foundation/*'], HERE[2:5]), (['*/00*'], [HERE[0], *HERE[2:6:3]]),
    (['tools/00_f', '03', 'foundation/d'], ['03_c', 'foundation/03_d', 'tools/00_f'])], ids=' '.join)
def test_names(tree, words, expected): assert list(chosen(tree, words)) == expected


def test_paths(tree, monkeypatch):
    monkeypatch.chdir(tree.parent)
    for path in (tree/'foundation'/'03_d.ipynb', 'nbs/foundation/03_d.ipynb'): assert list(chosen(tree, [str(path)])) == ['foundation/03_d']


def test_lost_names(tree):
    for word in ('07', 'foundation/c', 'nowhere/*'):
        with pytest.raises(ValueError, match='no notebook called .*; there are 00_a, 03_c, foundation/00_b'): chosen(tree, [word])
    p = go(tree, '07')
    assert p.returncode == 2 and 'no notebook called 07' in p.stdout


def test_folders(tmp_path):
    "The course runs first; each notebook works in its own folder, and copies of the same name stay apart."
    nbs = tmp_path/'nbs'
    for name in ('00_a', 'tools/00_a', 'foundation/00_a'): notebook(nbs, name, f'import os\nprint("{name}", os.getcwd())')
    p = go(nbs, '--out', 'out')
    assert re.findall(r'\] (\S+) … .* ok', p.stdout) == ['00_a', 'foundation/00_a', 'tools/00_a'], p.stdout
    for name in ('00_a', 'tools/00_a', 'foundation/00_a'):
        assert outputs(tmp_path/'out'/f'{name}.ipynb')[0][0].text.split() == [name, str((nbs/name).parent)]


@pytest.mark.parametrize('source, word', [('import os; os._exit(3)', 'kernel died'), ('import time; time.sleep(60)', '--timeout')], ids=['dead', 'slow'])
def test_other_ends(tmp_path, source, word):
    notebook(tmp_path/'nbs', '00_a', source)
    p = go(tmp_path/'nbs', '--timeout', '2')
    assert p.returncode == 1 and word in p.stdout, p.stdout


@pytest.mark.parametrize('sig', [signal.SIGINT, signal.SIGTERM], ids=['ctrl-c', 'kill'])
def test_interrupt(tmp_path, sig):
    "The kernel may clean up; then it is gone, with what it started."
    nbs, pids = tmp_path/'nbs', tmp_path/'nbs'/'pids'
    notebook(nbs, '00_a', 'import os, subprocess, time', 'child = subprocess.Popen(["sleep", "90"])',
             'open("tmp", "w").write(f"{os.getpid()} {child.pid}"); os.replace("tmp", "pids")', 'try: time.sleep(90)\nfinally: open("cleaned", "w").close()')
    p = subprocess.Popen([sys.executable, SCRIPT, '--nbs', nbs], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert wait_for(pids.exists), 'the notebook did not start'
        kernel, child = map(int, pids.read_text().split())
        assert alive(kernel) and alive(child)
        p.send_signal(sig)
        out, _ = p.communicate(timeout=20)
    finally: p.kill()
    assert p.returncode == 130, out
    assert 'interrupted in code cell' in out and 'Traceback' not in out, out
    assert wait_for(lambda: not alive(kernel) and not alive(child), 5), 'the kernel or its child is still there'
    assert (nbs/'cleaned').exists(), 'the running cell had no chance to clean up'


def test_interrupt_side_by_side(tmp_path):
    "Ctrl-C ends both kernels that run, and no other notebook begins."
    nbs = tmp_path/'nbs'
    for name in ('00_a', '01_b', '02_c'): notebook(nbs, name, f'import os, time\nopen("{name}.tmp", "w").write(str(os.getpid())); os.replace("{name}.tmp", "{name}.pid")\ntime.sleep(90)')
    p = subprocess.Popen([sys.executable, SCRIPT, '--nbs', nbs, '--jobs', '2'], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert wait_for(lambda: len(list(nbs.glob('*.pid'))) == 2), 'the notebooks did not start'
        kernels = [int(f.read_text()) for f in nbs.glob('*.pid')]
        p.send_signal(signal.SIGINT)
        out, _ = p.communicate(timeout=20)
    finally: p.kill()
    assert p.returncode == 130 and out.count('interrupted in code cell') == 2 and 'Traceback' not in out, out
    assert wait_for(lambda: not any(map(alive, kernels)), 5), 'a kernel is still there'
    assert not (nbs/'02_c.pid').exists()


@pytest.mark.parametrize('env', ({}, dict(PCAM_TP_SOURCE='pcam'), dict(PCAM_TP_ASSETS='dir'), dict(PCAM_TP_SOURCE='synthetic', PCAM_TP_ASSETS='dir'), dict(PCAM_TP_BUDGET='full')))
def test_budget_is_that_of_core(monkeypatch, env):
    "The runner does without pcam_tp, which would load torch, and must still know which notebooks are long."
    for k in ('SOURCE', 'ASSETS', 'BUDGET'): monkeypatch.delenv(f'PCAM_TP_{k}', raising=False)
    for k, v in env.items(): monkeypatch.setenv(k, v)
    assert runpy.run_path(str(SCRIPT))['BUDGET'] == budget()


def test_new_files_are_reported(tmp_path):
    nbs = tmp_path/'nbs'
    notebook(nbs, '00_a', 'import os, pathlib', 'd = pathlib.Path(os.environ["PCAM_TP_HOME"])',
             'for p in ("figures/r/a.png", "figures/r/b.png", "figures/r/t.csv", "data/models/m.safetensors"):\n'
             '    (d/p).parent.mkdir(parents=True, exist_ok=True); (d/p).write_text("")')
    (tmp_path/'home'/'figures'/'r').mkdir(parents=True)
    old = tmp_path/'home'/'figures'/'r'/'old.png'
    old.write_text('')
    os.utime(old, (0, 0))
    out = go(nbs, env={**os.environ, 'PCAM_TP_HOME': 'home'}).stdout   # relative: to where the command was called
    assert re.search(r'home/figures/r/ +2 figures, 1 table\n +home/data/models/ +1 model\n', out), out


def test_refresh(tmp_path):
    "Outputs come back without what changes from run to run; a second refresh changes nothing; a failed notebook stays."
    nbs, script = tmp_path/'nbs', tmp_path/'scripts'/'run.py'
    script.parent.mkdir()
    shutil.copy(SCRIPT, script)
    shutil.copy(ROOT/'settings.ini', tmp_path)
    notebook(nbs, '00_a', '6*7', 'import sys, time; print("noise", file=sys.stderr)', 'print(f"1 %\\r2 %\\rdone in {time.time():.3f} s")',
             'from tqdm.auto import tqdm\nfor _ in tqdm(range(2)): pass', '#| slow\n1/0')
    notebook(nbs, '01_b', '1/0')
    failing = (nbs/'01_b.ipynb').read_bytes()
    p = go(nbs, '--refresh', '--keep-going', script=script)
    assert p.returncode == 1 and (nbs/'01_b.ipynb').read_bytes() == failing, p.stdout
    a, b, c, d, e = outputs(nbs/'00_a.ipynb')
    assert a[0].data == {'text/plain': '42'} and a[0].execution_count is None
    assert b == d == e == [] and re.fullmatch(r'done in [\d.]+ s\n', c[0].text)
    first = (nbs/'00_a.ipynb').read_bytes()
    p = go(nbs, '--refresh', '00', script=script)
    assert p.returncode == 0 and (nbs/'00_a.ipynb').read_bytes() == first, p.stdout
    assert not list(nbs.glob('*.tmp'))


def test_refresh_only_from_embedded_data(tmp_path):
    notebook(tmp_path/'nbs', '00_a', '1')
    p = go(tmp_path/'nbs', '--refresh', env={**os.environ, 'PCAM_TP_SOURCE': 'pcam'})
    assert p.returncode == 2 and 'embedded data' in p.stdout
