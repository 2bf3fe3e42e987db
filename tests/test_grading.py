"""Grading: cheats, broken copies and kills on a small course. Each of these copies was once a way to points or to a dead batch."""
import json, os, signal, subprocess, sys, time
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from conftest import ROOT
from pcam_tp.classroom import marks, stub
from pcam_tp.sandbox import KINDS, Limits, Sandbox, encode, matches

pytest.importorskip('nbgrader', reason='grading needs nbgrader: pip install "pcam_tp[class]"')
if not sys.platform.startswith('linux'): pytest.skip('namespaces are Linux\'s', allow_module_level=True)
from pcam_tp import grading
from pcam_tp.grading import ELSEWHERE, WHY, collect, grade

SECRET = 'a secret of a class that nobody knows'
LIMITS = Limits(cpu=1.5, idle=2, memory=300, processes=12)


def cell(kind, source):
    return (nbformat.v4.new_code_cell if kind == 'code' else nbformat.v4.new_markdown_cell)(source.strip('\n'))


def lab():
    "Three exercises and a question."
    exercises = dict(double=('def double(x):', '    return 2*x', 'assert double(2) == 4, "two times two is four"', 'double(x)'),
                     largest=('def largest(x):', '    return float(x.max())', 'assert largest(torch.tensor([1., 5])) == 5', 'largest(x)'),
                     share=('def share(x):', '    return float((x > .5).float().mean())',
                            'assert_close(torch.tensor(share(torch.tensor([0., 1]))), torch.tensor(.5))', 'share(x)'))
    cells = [cell('md', '# A small lab'), cell('code', 'import torch\nfrom torch.testing import assert_close')]
    for name, (head, body, visible, value) in exercises.items():
        cells.append(cell('code', f'#| exercise: {name}\n{head}\n    ### BEGIN SOLUTION\n{body}\n    ### END SOLUTION'))
        cells.append(cell('code', f'#| check: {name}, points=2\n{visible}\nprint("{name}: right")\n### BEGIN HIDDEN TESTS\nSECRET = 0\n'
                                  f'x = torch.rand(64, generator=torch.Generator().manual_seed(SECRET))\nvalues = [{value}]\n### END HIDDEN TESTS'))
    cells.append(cell('md', '<!-- answer: why, points=2 -->\nWhy?\n<!-- ### BEGIN SOLUTION\nBecause.\n### END SOLUTION -->'))
    return nbformat.v4.new_notebook(cells=cells)


RIGHT = dict(double='def double(x): return 2*x', largest='def largest(x): return x.max().item()',
             share='def share(x): return (x > .5).float().mean().item()')


def copy_of(right=RIGHT, why='Because secrets are.', **changed):
    "A student's copy: right answers, but for what is changed."
    nb, answers = lab(), right | changed
    for m in marks(nb):
        source = stub(nb.cells[m.at].source)
        if m.kind == 'exercise' and m.name in answers: source = f'#| exercise: {m.name}\n{answers[m.name]}'
        nb.cells[m.at].source = source.replace('*Your answer:*', why) if m.kind == 'answer' else source
    return nb


LIAR = 'class Liar(float):\n    __eq__ = lambda a, b: True\n    __hash__ = float.__hash__\n    __float__ = lambda a: 2.\n'
PATCH = ('import builtins, torch.testing\nbuiltins.print = lambda *a, **k: None\ntorch.testing.assert_close = assert_close = lambda *a, **k: None\n'
         'def share(x): return .5')
# name: (answer to `double`, points of double, what the remark says); largest and share are right and keep their points
CHEATS = {
    'loops': ('def double(x):\n    while True: pass', WHY['time']),
    'sleeps': ('import time\ntime.sleep(999)\ndef double(x): return 2*x', WHY['time']),
    'exits': ('import os\ndef double(x): os._exit(0)', WHY['exit']),
    'eats': ('def double(x):\n    a = []\n    while True: a.append(bytes(10**7))', 'MemoryError'),
    'floods': ('def double(x):\n    while True: print("x"*10**4)', ''),
    'forks': ('import os, time\ndef double(x):\n    for _ in range(60):\n        if not os.fork(): time.sleep(99)\n    return 2*x', ''),
    'writes': ('def double(x):\n    open("/usr/mine", "w")\n    return 2*x', 'OSError'),
    'disk': ('def double(x):\n    for i in range(99): open(str(i), "wb").write(bytes(10**7))\n    return 2*x', 'OSError'),
    'calls': ('import socket\ndef double(x):\n    socket.create_connection(("1.1.1.1", 53), 2)\n    return 2*x', 'OSError'),
    'reads': ('import glob\ndef double(x):\n    text = "".join(open(f).read() for f in glob.glob(LABS + "/*.ipynb"))\n'
              '    exec(text.split("BEGIN SOLUTION")[1])', 'IndexError'),
    'equals': (LIAR + 'def double(x): return Liar(3)', ELSEWHERE),
    'knows': ('def double(x): return 4 if isinstance(x, int) else 0*x', ELSEWHERE),
    'peeks': ('import sys\ndef double(x):\n    f = sys._getframe(1).f_globals\n    print("peeked", f.get("SECRET"))\n    f["SECRET"] = 0\n'
              '    return 4 if isinstance(x, int) else x', ELSEWHERE),
    'syntax': ('def double(x) return', 'SyntaxError'),
    'raises': ('class E(BaseException):\n    def __str__(self): raise self\ndef double(x): raise E', ''),
}


def hand_in(inbox, name, nb):
    (inbox/name).parent.mkdir(parents=True, exist_ok=True)
    (inbox/name).write_text(nb if isinstance(nb, str) else nbformat.writes(nb), encoding='utf-8')


def stripped(nb):
    return nbformat.v4.new_notebook(cells=[cell('code' if c.cell_type == 'code' else 'md', c.source) for c in nb.cells])


def fill(inbox, labs):
    "A class of honest, broken and cheating copies."
    for name, (code, _) in CHEATS.items(): hand_in(inbox, f'{name}/small.ipynb', copy_of(double=code.replace('LABS', repr(str(labs)))))
    hand_in(inbox, 'patches/small.ipynb', copy_of(share=PATCH))
    hand_in(inbox, 'honest/small.ipynb', copy_of())
    hand_in(inbox, 'flat_small.ipynb', stripped(copy_of()))
    hand_in(inbox, 'empty/Copy of small (1).ipynb', copy_of(right={}, why='*Your answer:*'))
    turned = copy_of()
    turned.cells = [c for c in turned.cells[::-1] for _ in range(2)]   # duplicated ids and names as well
    hand_in(inbox, 'turned/small.ipynb', json.dumps(turned))
    helped = copy_of(double='def double(x): return my_factor()*x')
    helped.cells.insert(1, cell('code', 'import math\ndef my_factor(): return math.sqrt(4)'))
    hand_in(inbox, 'helped/small.ipynb', helped)
    hand_in(inbox, 'broken/small.ipynb', '{"cells": [{"cell_type": "code", ')
    hand_in(inbox, 'number/small.ipynb', '3')
    hand_in(inbox, 'letter.txt', 'I am ill')


@pytest.fixture(scope='module')
def course(tmp_path_factory):
    folder = tmp_path_factory.mktemp('class')
    (folder/'labs').mkdir()
    nbformat.write(lab(), folder/'labs'/'small.ipynb')
    fill(folder/'inbox', folder/'labs')
    table = grade(folder/'inbox', folder/'out', SECRET, labs=folder/'labs', jobs=1, limits=LIMITS)
    return folder, table


def points(table, student): return table[table.student == student].set_index('exercise').points.fillna(-1).to_dict()
def remark(table, student, exercise='double'):
    return table[(table.student == student) & (table.exercise == exercise)].remark.item()


@pytest.mark.parametrize('name', CHEATS)
def test_a_cheat_gets_nothing_and_costs_nothing_else(course, name):
    table = course[1]
    assert points(table, name) == dict(double=0, largest=2, share=2, why=-1)
    assert CHEATS[name][1] in remark(table, name) and remark(table, name)
    assert remark(table, name, 'largest') == ''


def test_patched_tests_do_not_decide(course):
    assert points(course[1], 'patches') == dict(double=2, largest=2, share=0, why=-1)
    assert remark(course[1], 'patches', 'share') == ELSEWHERE


@pytest.mark.parametrize('name', ['honest', 'flat', 'turned', 'helped'])
def test_full_points_however_the_copy_looks(course, name):
    assert points(course[1], name) == dict(double=2, largest=2, share=2, why=-1)


def test_what_is_missing_is_named_and_the_rest_goes_on(course):
    folder, table = course
    assert points(table, 'empty') == dict(double=0, largest=0, share=0, why=0)
    for name in 'broken', 'number':
        assert points(table, name) == dict(double=0, largest=0, share=0, why=0)
        assert 'not a notebook' in remark(table, name)
    files = pd.read_csv(folder/'out'/'files.csv')
    assert files[files.file == 'letter.txt'].problem.item() == 'not a notebook'
    assert len(table) == 4*(len(CHEATS) + 8)
    assert not (Path('/usr/mine').exists() or (folder/'mine').exists())


def test_no_page_tells_a_secret(course):
    folder, _ = course
    pages = sorted((folder/'out'/'feedback').rglob('*.html'))
    assert len(pages) == len(CHEATS) + 6
    number = str(grading.secret_number(SECRET, 'double'))
    for page in pages:
        text = page.read_text(encoding='utf-8')
        assert not any(s in text for s in (SECRET, number, 'manual_seed', 'HIDDEN')), page
    assert 'peeked None' in (folder/'out'/'feedback'/'peeks'/'small.html').read_text(encoding='utf-8')
    stored = b''.join(p.read_bytes() for p in (folder/'out').rglob('*') if p.is_file())
    assert SECRET.encode() not in stored and number.encode() not in stored and b'manual_seed' not in stored


def test_marks_by_hand_survive_and_come_back(course):
    folder, _ = course
    path = folder/'out'/'hand.csv'
    hand = pd.read_csv(path)
    assert set(hand.text) == {'Why?\nBecause secrets are.'}
    filled = hand.assign(points=[1.5]*len(hand))
    filled.to_csv(folder/'filled.csv', index=False)
    table = grade(folder/'inbox', folder/'out', SECRET, labs=folder/'labs', hand=folder/'filled.csv', jobs=1, limits=LIMITS)
    assert points(table, 'honest')['why'] == 1.5 and points(table, 'empty')['why'] == 0
    again = grade(folder/'inbox', folder/'out', SECRET, labs=folder/'labs', jobs=1, limits=LIMITS)   # its own hand.csv now
    pd.testing.assert_frame_equal(again, table)


def test_another_secret_is_another_run(course, monkeypatch):
    folder, _ = course
    copies, _ = collect(folder/'inbox', ['small'])
    key = lambda secret, limits=LIMITS: grading._key(copies[0], grading.read_labs(folder/'labs')['small'], secret, limits)
    assert key(SECRET) == key(SECRET) != key('another secret of a class')
    assert key(SECRET) != key(SECRET, Limits())


def test_a_course_whose_own_solution_fails_grades_nobody(course, tmp_path):
    bad = lab()
    bad.cells[2].source = bad.cells[2].source.replace('2*x', '3*x')
    nbformat.write(bad, tmp_path/'small.ipynb')
    with pytest.raises(ValueError, match='small: the course\'s own solution does not pass, check double: two times two'):
        grade(course[0]/'inbox', tmp_path/'out', SECRET, labs=tmp_path, jobs=1, limits=LIMITS)


RUN = '''import sys
from pathlib import Path
from pcam_tp.grading import grade
from pcam_tp.sandbox import Limits
inbox, out, labs, secret = sys.argv[1:]
grade(Path(inbox), Path(out), secret, labs=Path(labs), jobs=1, limits=Limits(cpu=3))
'''


def test_a_killed_run_goes_on(course, tmp_path):
    "SIGKILL to the whole process group at two moments; the tables are those of an undisturbed run."
    folder, table = course
    names = ['honest', 'knows', 'exits', 'turned']
    for name in names:
        hand_in(tmp_path/'inbox', f'{name}/small.ipynb', (folder/'inbox'/name/'small.ipynb').read_text(encoding='utf-8'))
    out, command = tmp_path/'out', [sys.executable, '-c', RUN, str(tmp_path/'inbox'), str(tmp_path/'out'), str(folder/'labs'), SECRET]
    env = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1')
    result = lambda: len([*(out/'results').rglob('[!.]*.json')])
    booked = lambda: len([*(out/'gradebook'/'done'/'small').glob('*.txt')])
    for reached in (lambda: result() >= 2, lambda: booked() >= 2):
        p = subprocess.Popen(command, env=env, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not reached() and p.poll() is None: time.sleep(.005)
        assert p.poll() is None, 'the run ended before it could be killed'
        os.killpg(p.pid, signal.SIGKILL)
        p.wait()
        assert not (out/'scores.csv').exists()
    subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL)
    expected = table[table.student.isin(names)].assign(points=lambda t: t.points.where(t.exercise != 'why'))
    found = pd.read_csv(out/'scores.csv', keep_default_na=False, dtype=str)
    assert found.points.tolist() == ['' if pd.isna(v) else str(v) for v in expected.points]
    assert found.exercise.tolist() == expected.exercise.tolist() and found.student.tolist() == expected.student.tolist()


@pytest.mark.parametrize('kind', KINDS)
def test_python_below_tmp(kind, tmp_path, monkeypatch):
    "A checkout in /tmp has its environment there too; what lies beside that stays hidden."
    packages = tmp_path/'site-packages'
    packages.mkdir()
    (packages/'mine.py').touch(), (tmp_path/'secret').touch()
    monkeypatch.syspath_prepend(packages)
    files = [str(packages/'mine.py'), str(tmp_path/'secret')]
    with Sandbox(kind, LIMITS) as box:
        seen, = box.run([dict(name='a', code=f'import os\nvalues = [*map(os.path.exists, {files})]', values=True)])
    assert matches(seen['values'], encode([True, kind == 'none']))


@pytest.mark.parametrize('kind', KINDS)
def test_each_wall(kind):
    "The same cells behind each wall; what a plain process cannot keep is known."
    with Sandbox(kind, LIMITS) as box:
        a, b, c = box.run([dict(name='a', code='import os, socket\nx = 2; print(sorted(os.listdir(".")))\nopen("mine", "w").close()'),
                           dict(name='b', code='os._exit(0)'),
                           dict(name='c', code=f'values = [x, os.path.exists({str(ROOT/"nbs")!r})]', values=True)])
        assert (a['status'], a['output'], b['status']) == ('ok', '[]\n', 'exit')
        assert matches(c['values'], encode([2, kind == 'none']))
        net = box.run([dict(name='net', code='import socket\nvalues = socket.if_nameindex()', values=True)])[0]
        if kind != 'none': assert net['values'] in (['list', []], encode([(1, 'lo')]))
        later = box.run([dict(name='a', code='import os; print(os.listdir("."))')])[0]
        if kind != 'none': assert later['output'] == '[]\n', 'the next copy sees the files of the one before'
