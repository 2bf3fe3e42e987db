"""Grading: cheats, broken copies and kills on a small course. Each of these copies was once a way to points or to a dead batch."""
import copy, io, json, os, re, shutil, signal, subprocess, sys, time, unicodedata, zipfile
from contextlib import redirect_stdout
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from conftest import ROOT
from pcam_tp.classroom import marks, stub
from pcam_tp.sandbox import KINDS, Limits, Sandbox, encode, matches

pytest.importorskip('nbgrader', reason='grading needs nbgrader: in the checkout, pip install -e ".[class]"')
if not sys.platform.startswith('linux'): pytest.skip('namespaces are Linux\'s', allow_module_level=True)
from pcam_tp import grading
from pcam_tp.grading import ELSEWHERE, WHY, collect, grade

SECRET = 'a secret of a class that nobody knows'
LIMITS = Limits(cpu=1.5, idle=2, memory=300, processes=12)


def cell(kind, source):
    return (nbformat.v4.new_code_cell if kind == 'code' else nbformat.v4.new_markdown_cell)(source.strip('\n'))

BADGE = ('[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]'
         '(https://colab.research.google.com/github/pcam-tp/pcam_tp/blob/main/nbs/03_gradcam.ipynb)')


def lab():
    "Three exercises and a question."
    exercises = dict(double=('def double(x):', '    return 2*x', 'assert double(2) == 4, "two times two is four"', 'double(x)'),
                     largest=('def largest(x):', '    return float(x.max())', 'assert largest(torch.tensor([1., 5])) == 5', 'largest(x)'),
                     share=('def share(x):', '    return float((x > .5).float().mean())',
                            'assert_close(torch.tensor(share(torch.tensor([0., 1]))), torch.tensor(.5))', 'share(x)'))
    cells = [cell('md', f'# A small lab\n\n{BADGE}\n\nAfter [the data](00_data.ipynb).'), cell('code', 'import torch\nfrom torch.testing import assert_close')]
    for name, (head, body, visible, value) in exercises.items():
        cells.append(cell('code', f'#| exercise: {name}\n{head}\n    ### BEGIN SOLUTION\n{body}\n    ### END SOLUTION'))
        cells.append(cell('code', f'#| check: {name}, points=2\n{visible}\nprint("{name}: right")\n### BEGIN HIDDEN TESTS\nSECRET = 0\n'
                                  f'x = torch.rand(64, generator=torch.Generator().manual_seed(SECRET))\nvalues = [{value}]\n### END HIDDEN TESTS'))
    cells.append(cell('md', '<!-- answer: why, points=2 -->\nWhy?\n<!-- ### BEGIN SOLUTION\n2 points: they are public.\n### END SOLUTION -->'))
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
    assert len(pages) == len(CHEATS) + 8
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


def chosen(inbox, name='ada'):
    copies, problems = collect(inbox, ['small', '00_data'])
    return next(c.file for c in copies if c.student == name), problems


@pytest.mark.parametrize('old, new, why', [
    ('00_data.ipynb', '00_data (1).ipynb', r'the number \(1\)'), ('00_data.ipynb', 'Copy of 00_data (1).ipynb', r'the number \(1\)'),
    ('00_data (9).ipynb', '00_data(10).ipynb', r'the number \(10\)'), ('Copy of 00_data.ipynb', '00_data.ipynb', 'the newer file'),
    ('my 00_data.ipynb', 'late/00_data.ipynb', 'the newer file')])
def test_the_newest_copy_is_graded(tmp_path, old, new, why):
    for name, at in ((old, 10**9), (new, 2*10**9)):
        hand_in(tmp_path, f'ada/{name}', copy_of())
        os.utime(tmp_path/'ada'/name, (at, 10**9 if 'number' in why else at))   # a download may lose the time
    taken, problems = chosen(tmp_path)
    assert taken == f'ada/{new}'
    assert list(problems) == [f'ada/{old}'] and re.search(f'handed in again: {re.escape(taken)} is graded, .*{why}', problems[f'ada/{old}'])


def test_the_newest_entry_of_a_zip_is_graded(tmp_path):
    with zipfile.ZipFile(tmp_path/'ada.zip', 'w') as z:
        for name, year in (('b', 2025), ('a', 2027), ('c', 2026)):
            z.writestr(zipfile.ZipInfo(f'{name}/small.ipynb', (year, 1, 1, 0, 0, 0)), '{}')
    taken, problems = chosen(tmp_path)
    assert taken == 'ada/a/small.ipynb' and len(problems) == 2 and all(f'{taken} is graded' in p for p in problems.values())


def test_students_of_moodle(tmp_path):
    "One student has another number in each lab; two of one name have two numbers in one lab."
    folder = '{}_assignsubmission_file'.format
    for name in (folder('Fay Gray_12345') + '/small.ipynb', folder('Fay Gray_67890') + '_/00_data.ipynb', folder('Bo Ek_1') + '/small.ipynb',
                 folder('Bo Ek_2') + '/small.ipynb', folder('Al Ox_7') + '_small.ipynb', 'my_7/small.ipynb'):
        hand_in(tmp_path, name, '{}')
    with zipfile.ZipFile(tmp_path/'XAI-small-99.zip', 'w') as z: z.writestr(folder('Zed_5') + '/small.ipynb', '{}')
    copies, problems = collect(tmp_path, ['small', '00_data'])
    assert {(c.student, c.lab) for c in copies} == {('Fay_Gray', 'small'), ('Fay_Gray', '00_data'), ('Bo_Ek_1', 'small'), ('Bo_Ek_2', 'small'),
                                                    ('Al_Ox', 'small'), ('my_7', 'small'), ('Zed', 'small')}
    assert problems == {}


class Few:
    "Three students: one answers in words, one does not, one hands in what is no notebook. `said`, `tables`, `pages`: of the last run."
    def __init__(self, folder):
        self.folder, self.out = folder, folder/'out'
        (folder/'labs').mkdir()
        nbformat.write(lab(), folder/'labs'/'small.ipynb')
        self.hand_in('ada', copy_of(why='A first text.'))
        self.hand_in('bob', copy_of(why='*Your answer:*'))
        self.hand_in('eve', '{"cells": ["a part of it, and <b>')

    def hand_in(self, student, nb): hand_in(self.folder/'inbox', f'{student}/small.ipynb', nb)

    def grade(self):
        with redirect_stdout(io.StringIO()) as said:
            grade(self.folder/'inbox', self.out, SECRET, labs=self.folder/'labs', jobs=1, limits=LIMITS)
        self.said = said.getvalue()
        self.tables = {p.stem: pd.read_csv(p, keep_default_na=False) for p in self.out.glob('*.csv')}
        self.pages = {p.parent.name: p.read_text(encoding='utf-8') for p in (self.out/'feedback').glob('*/small.html')}
        return self

    def mark(self, **row): self.tables['hand'].assign(**row).to_csv(self.out/'hand.csv', index=False)


@pytest.fixture(scope='module')
def new_class(tmp_path_factory): return Few(tmp_path_factory.mktemp('few')).grade()


@pytest.fixture
def few(new_class): return copy.copy(new_class)   # a run makes new tables; those of the first stay


def test_the_end_of_a_run_in_words(few):
    for words in '2 copies of 3 students graded', '1 copy could not be', '1 answer waits for a mark': assert words in few.said


def test_what_waits_is_told(few):
    totals = few.tables['totals']
    assert totals.student.tolist() == ['ada', 'bob', 'eve', grading.MAXIMUM] and 'student' in grading.MAXIMUM
    assert totals.waiting.tolist() == ['2.0', '0.0', '0.0', '']
    assert grading.WAITS in few.pages['ada'] and grading.WAITS not in few.pages['bob']


def test_no_page_leads_to_the_solutions(few):
    for student in 'ada', 'bob', 'eve': assert not re.search(r'nbs/0|colab\.research|href="00_data', few.pages[student]), student
    assert 'After the data.' in few.pages['ada']


def test_a_file_that_is_no_notebook_has_a_page(few):
    remark, = few.tables['scores'][few.tables['scores'].student == 'eve'].remark.unique()
    assert 'not a notebook' in remark and len(remark) < 60 and 'cells' not in remark
    assert remark in few.pages['eve'] and 'hand it in again' in few.pages['eve'] and 'a part of it' not in few.pages['eve']


def test_a_broken_file_makes_room_for_the_next_page(tmp_path):
    "From readable to broken and back: the page of the readable copy is then written again."
    done = grading._page_done(tmp_path, 'ada', 'small')
    grading._mark_done(done, 'key of a good copy')
    grading._broken_page(tmp_path, tmp_path/'pages', 'ada', 'small', dict(file='ada/<i>.ipynb', broken='not a notebook: empty'))
    assert '<b>&lt;i&gt;.ipynb</b>' in (tmp_path/'pages'/'ada'/'small.html').read_text(encoding='utf-8')
    assert not grading._marked_done(done, 'key of a good copy')
    grading._broken_page(tmp_path, tmp_path/'pages', 'bob', 'small', dict(file='bob/small.ipynb', broken='could not be run: OSError'))
    assert not (tmp_path/'pages'/'bob').exists(), 'it is the machine that failed'


def test_from_the_first_mark_to_the_next_text(few):
    "The model answer and a marker's notes are for the marker alone; what waits is said as long as it waits."
    assert few.tables['hand'].model.tolist() == ['2 points: they are public.']
    few.mark(points=1)
    few.grade()
    assert grading.WAITS not in few.pages['ada'] and few.tables['totals'].waiting[0] == '0.0'
    few.mark(points=1.5, comment='nice')
    few.grade()
    assert 'nice' in few.pages['ada'] and few.tables['totals'].total[0] == 7.5
    few.hand_in('ada', copy_of(why='A second text.'))
    few.grade()
    for _ in range(2):   # and it stays
        row, = few.tables['hand'][['points', 'comment', 'earlier']].values.tolist()
        assert row == ['', '', 'was marked 1.5 for an earlier text. nice']
        few.mark()
        few.grade()
    assert 'A second text.' in few.pages['ada'] and grading.WAITS in few.pages['ada']
    for word in ('was marked', 'earlier', 'nice', 'they are public'): assert word not in few.pages['ada'], word


def test_what_waits_is_not_missed(few):
    "Four copies: of `none` nobody has a mark but who wrote nothing, of `some` one waits."
    rows = [(s, 'l', 'code', 'check', p, 2, '') for s, p in zip('abcd', (2, 0, 2, 1))]
    rows += [(s, 'l', 'none', 'by hand', p, 2, r) for s, p, r in zip('abcd', (None, None, None, 0), [*['to be marked by hand']*3, 'not answered'])]
    rows += [(s, 'l', 'some', 'by hand', p, 2, r) for s, p, r in zip('abcd', (None, 0, 2, 0), ['to be marked by hand', '', '', 'not answered'])]
    table = pd.DataFrame(rows, columns=['student', 'lab', 'exercise', 'kind', 'points', 'max', 'remark']).astype(dict(points=float))
    q = grading.questions(table).set_index('exercise')
    assert q.waiting.to_dict() == dict(code=0, none=3, some=1) and q.n.to_dict() == dict(code=4, none=0, some=3)
    assert q.loc['none', ['mean', 'solved', 'missed', 'discrimination']].isna().all()
    assert round(q.missed['some'], 3) == .667 and q.missed['code'] == .25
    assert pd.isna(q.discrimination['code']), 'what waits counts as 0 in the others'
    fig = grading.plot_questions(q.reset_index())
    labels = [t.get_text() for t in fig.axes[0].get_yticklabels()]
    assert labels == ['l · code (n = 4)', 'l · none (n = 0, 3 wait)', 'l · some (n = 3, 1 wait)']
    assert [t.get_text() for t in fig.axes[0].texts] == ['no mark yet']
    assert few.tables['questions'].set_index('exercise').waiting.to_dict() == dict(double=0, largest=0, share=0, why=1)


class NoBox:
    "In place of a sandbox: answers in words run nothing."
    kind, process = 'none needed', None
    def __init__(self, *args): pass
    def run(self, cells): return [dict(status='ok', output='', values=['none'])]*len(cells)
    def close(self): pass


class Words:
    "Three students answer one question in words. `said`: of the last run."
    def __init__(self, folder):
        self.at(folder)
        (folder/'labs').mkdir()
        nbformat.write(self.copy('<!-- ### BEGIN SOLUTION\nBecause.\n### END SOLUTION -->'), folder/'labs'/'small.ipynb')
        for student in 'ada', 'josé', 'max': self.hand_in(student)

    def at(self, folder):
        self.folder, self.out, self.hand = folder, folder/'out', folder/'out'/'hand.csv'
        return self

    def copy(self, text): return nbformat.v4.new_notebook(cells=[cell('md', f'<!-- answer: why, points=4 -->\n{text}')])
    def hand_in(self, student, text='weil Größe zählt'): hand_in(self.folder/'inbox', f'{student}/small.ipynb', self.copy(text))
    def leaves(self, student): shutil.rmtree(self.folder/'inbox'/student)

    def grade(self, hand=None):
        "Points of a run by student."
        with redirect_stdout(io.StringIO()) as said:
            table = grade(self.folder/'inbox', self.out, SECRET, labs=self.folder/'labs', hand=hand, jobs=1)
        self.said = said.getvalue()
        return table.set_index('student').points.fillna(-1).to_dict()

    def lines(self): return pd.read_csv(self.hand, dtype=str, keep_default_na=False)
    def line(self, student): return self.lines().set_index('student').loc[student, ['points', 'comment', 'earlier']].tolist()

    def mark(self, **points):
        table = self.lines()
        table.assign(points=table.student.map(points), comment='good').to_csv(self.hand, index=False, encoding='utf-8')

    def excel(self, **points):
        "Excel takes a file without the mark of UTF-8 for cp1252; saved is what it calls CSV UTF-8."
        coded = 'utf-8-sig' if self.hand.read_bytes().startswith(b'\xef\xbb\xbf') else 'cp1252'
        table = pd.read_csv(io.StringIO(self.hand.read_bytes().decode(coded, 'replace')), dtype=str, keep_default_na=False)
        table['points'] = table.student.map(points).fillna('3')
        table.to_csv(self.hand, index=False, sep=';', encoding='utf-8-sig')

    def of_colleague(self, **points):
        "A table with a line for each of `points` and no more."
        path, table = self.folder/'colleague.csv', self.lines()
        table = table[table.student.isin(points)]
        table.assign(points=table.student.map(points), comment='').to_csv(path, index=False)
        return path


def light(patch):
    "Neither sandbox nor pages."
    patch.setattr(grading, 'Sandbox', NoBox)
    patch.setattr(grading, 'write_feedback', lambda *args: None)


@pytest.fixture(scope='module')
def in_words(tmp_path_factory):
    words = Words(tmp_path_factory.mktemp('words'))
    with pytest.MonkeyPatch.context() as patch:
        light(patch)
        words.grade()
    return words


@pytest.fixture
def words(in_words, tmp_path, monkeypatch):
    "A class of its own for each test, graded once."
    light(monkeypatch)
    shutil.copytree(in_words.folder, tmp_path, dirs_exist_ok=True)
    return copy.copy(in_words).at(tmp_path)


def test_names_survive_a_spreadsheet(words):
    words.excel(ada='1', josé='2')
    assert words.grade() == dict(ada=1, josé=2, max=3)
    assert words.line('josé') == ['2.0', '', ''] and len(words.lines()) == 3


def test_a_line_of_nobody_is_kept_and_told(words):
    words.mark(ada=1, josé=2, max=3)
    words.hand.write_text(words.hand.read_text(encoding='utf-8').replace('josé', 'josÃ©'), encoding='utf-8')
    for _ in range(2):
        assert words.grade() == dict(ada=1, josé=-1, max=3)
        assert words.line('josÃ©') == ['2.0', 'good', ''] and 'josÃ©, small, why: no such answer' in words.said
    words.hand.write_text(words.hand.read_text(encoding='utf-8').replace('josÃ©', 'josé'), encoding='utf-8')   # as told
    assert words.grade() == dict(ada=1, josé=2, max=3) and len(words.lines()) == 3 and 'no such' not in words.said


def test_two_marks_for_one_answer(words):
    words.mark(ada=1, josé=2, max=3)
    before = words.hand.read_text(encoding='utf-8') + 'max,small,why,,4\n'
    words.hand.write_text(before, encoding='utf-8')
    with pytest.raises(ValueError, match=r'row \d+ \(max, why\): a second line with a mark; keep one of the two'):
        words.grade()
    assert words.hand.read_text(encoding='utf-8') == before


@pytest.mark.parametrize('encoding', ['cp1252', 'utf-16'])
def test_a_table_in_another_encoding(words, encoding):
    words.lines().assign(points='3').to_csv(words.hand, index=False, sep=';', encoding=encoding)
    before = words.hand.read_bytes()
    with pytest.raises(ValueError, match='hand.csv: .*CSV UTF-8'): words.grade()
    assert words.hand.read_bytes() == before


def test_a_table_of_a_colleague_goes_over_ours(words, monkeypatch):
    words.mark(ada=1, josé=2, max=3)
    words.grade()
    assert words.grade(words.of_colleague(max=4)) == dict(ada=1, josé=2, max=4)
    assert words.line('ada') == ['1.0', 'good', ''] and words.line('max') == ['4.0', 'good', '']
    assert words.grade(words.of_colleague(max='')) == dict(ada=1, josé=2, max=4), 'what is empty blanks nothing'
    theirs = words.of_colleague(max=2)
    words.hand_in('max', 'anders')
    words.grade()
    words.mark(ada=1, josé=2, max=3)
    assert words.grade(theirs) == dict(ada=1, josé=2, max=3), 'of a text that is no more'
    notes = 'was marked 4 for an earlier text. good was marked 2 for an earlier text.'
    assert words.line('max')[2] == notes
    monkeypatch.setattr(grading, '_grader', lambda: 'another library')
    assert words.grade(theirs) == dict(ada=1, josé=2, max=3) and words.line('max')[2] == notes
    with pytest.raises(FileNotFoundError, match='typo.csv'): words.grade(words.folder/'typo.csv')
    assert words.grade(words.hand) == dict(ada=1, josé=2, max=3)


@pytest.mark.parametrize('text, points, line', [
    ('weil Größe zählt', 1, ['1.0', 'good', '']), ('corrected', -1, ['', '', 'was marked 1 for an earlier text. good'])])
def test_a_copy_that_comes_back_finds_its_mark(words, text, points, line):
    words.mark(ada=1, josé=2, max=3)
    words.grade()
    words.leaves('ada')
    for _ in range(2):
        assert words.grade() == dict(josé=2, max=3)
        assert words.line('ada') == ['1.0', 'good', ''] and 'ada, small, why: no such answer' in words.said
    words.hand_in('ada', '*Your answer:*')
    assert words.grade()['ada'] == 0, 'the mark is kept, it does not count'
    assert words.line('ada') == ['1.0', 'good', '']
    words.hand_in('ada', text)
    assert words.grade() == dict(ada=points, josé=2, max=3) and words.line('ada') == line


def test_a_filled_line_is_never_lost(words, monkeypatch):
    "All that once lost a mark, one after the other."
    nfd = lambda s: unicodedata.normalize('NFD', s)
    def kept(**more):
        found = words.lines().set_index('student').points
        assert found[found != ''].astype(float).to_dict() == dict(ada=1, josé=2, max=3) | more
    words.excel(ada='1', josé='2')
    words.grade(), kept()
    words.leaves('josé'), words.hand_in(nfd('josé'))   # from a Mac
    assert words.grade() == dict(ada=1, josé=2, max=3)
    words.leaves('ada')
    assert words.grade(words.of_colleague(max='4')) == dict(josé=2, max=4)
    kept(max=4)
    monkeypatch.setattr(grading, '_grader', lambda: 'another library')
    words.grade(), kept(max=4)
    before = words.hand.read_text(encoding='utf-8-sig')
    words.hand.write_text(before, encoding='cp1252', errors='replace')
    with pytest.raises(ValueError, match='CSV UTF-8'): words.grade()
    words.hand.write_text(before, encoding='utf-8')   # as it says
    hand_in(words.folder/'inbox', 'max/small.ipynb', '{"cells": [')
    assert words.grade() == dict(josé=2, max=0)
    kept(max=4)
    text = words.hand.read_text(encoding='utf-8')
    words.hand.write_text(text.replace('josé', nfd('josé')), encoding='utf-8')
    words.hand_in('ada'), words.hand_in('max')
    assert words.grade() == dict(ada=1, josé=2, max=4) and 'no such answer' not in words.said
    kept(max=4)
    words.hand_in('ada', 'A second text.')
    words.grade()
    assert words.line('ada') == ['', '', 'was marked 1 for an earlier text.']
    words.mark(josé=2, max=4)   # a comment alone, then a third text
    words.hand_in('ada', 'A third text.')
    words.grade()
    assert words.line('ada')[2] == 'of an earlier text: good was marked 1 for an earlier text.'


def test_what_a_message_says_leaves_no_copy_out(words):
    "An exercise may fail with any words; copies that are missing or could not be read are left out all the same."
    why = 'the exercise: ValueError: operands could not be broadcast together'
    rows = [(f's{i}', 'l', 'q1', *((2, 2, '') if i > 5 else (0, 2, why)), False) for i in range(10)]
    rows += [('t', 'l', 'q1', 0, 2, 'anything', True)]
    table = pd.DataFrame(rows, columns=['student', 'lab', 'exercise', 'points', 'max', 'remark', 'broken']).astype(dict(points=float))
    assert grading.questions(table)[['n', 'mean', 'missed']].values.tolist() == [[10, .4, .6]]
    hand_in(words.folder/'inbox', 'max/small.ipynb', '{"cells": [')
    words.mark(ada=1, josé=4)
    words.grade()
    scores = pd.read_csv(words.out/'scores.csv')
    assert scores.broken.tolist() == [False, False, True]
    assert pd.read_csv(words.out/'questions.csv')[['n', 'mean']].values.tolist() == [[2, .625]]


def test_one_name_in_two_forms(tmp_path):
    "macOS writes é as e and an accent."
    nfc, nfd = (unicodedata.normalize(form, 'José Pérez') for form in ('NFC', 'NFD'))
    hand_in(tmp_path, f'{nfc}/small.ipynb', '{}')
    hand_in(tmp_path, f'{nfd}_00_data.ipynb', '{}')
    with zipfile.ZipFile(tmp_path/f'{nfd}.zip', 'w') as z: z.writestr('small (1).ipynb', '{}')
    copies, problems = collect(tmp_path, ['small', '00_data'])
    assert [(c.student, c.lab) for c in copies] == [('José_Pérez', '00_data'), ('José_Pérez', 'small')]
    assert list(problems) == [f'{nfc}/small.ipynb']


def test_no_key_is_left_by_a_machine_that_cannot_grade(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'nbgrader.api', None)
    with pytest.raises(ImportError) as e: grading.class_secret(tmp_path/'secret')
    assert not (tmp_path/'secret').exists()
    command, = re.findall(r'pip install .*', str(e.value))
    assert command in (ROOT/'TEACHING.md').read_text(encoding='utf-8')


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


# what each wall asks of the machine, without our code
NEEDS = dict(bwrap='bwrap --unshare-all --ro-bind / / --proc /proc true',
             unshare='unshare --user --map-root-user --mount --net --ipc --uts --pid --fork --mount-proc true')


@pytest.fixture(params=KINDS)
def kind(request):
    "Each wall that this machine allows."
    command = NEEDS.get(request.param, 'true').split()
    if not shutil.which(command[0]): pytest.skip(f'{command[0]} is not installed')
    done = subprocess.run(command, text=True, capture_output=True)
    if done.returncode: pytest.skip(f'not allowed on this machine: {done.stderr.strip()}')
    return request.param


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
