"""A lab is for a student: one session, holes with hints and a check, guesses before numbers, sentences for the report.

    python tests/test_labs.py            a table of what each lab holds
    python tests/test_labs.py FOLDER     the same of the notebooks of another checkout"""
import ast, json, re, symtable, sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from IPython.core.inputtransformer2 import TransformerManager

if __name__ == '__main__': sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from pcam_tp.classroom import ANSWER, CHECK, EXERCISE, HIDDEN, LABS, SOLUTION, made, outside, python

ROOT = Path(__file__).resolve().parent.parent
MINUTES, POINTS = re.compile(r'(\d+) minutes?\b'), re.compile(r'(\d+) points?\b')
WORDS_A_MINUTE = 200


@dataclass
class Cell:
    number: int   # counted from 1
    kind: str     # 'code' or 'markdown'
    source: str

    def first(self, pattern): return pattern.match(self.source.lstrip())


def cells(path):
    "The cells of a notebook."
    found = json.loads(Path(path).read_text(encoding='utf-8'))['cells']
    return [Cell(i, c['cell_type'], ''.join(c['source'])) for i, c in enumerate(found, 1)]


def course(folder=ROOT):
    "The notebooks of the course by number."
    return {p.name[:2]: p for p in sorted((Path(folder)/'nbs').glob('[0-9][0-9]_*.ipynb'))}


def holes(lab):
    "(name, its text in markdown, the exercise, its check or None) of each exercise."
    checks = {m[1]: c for c in lab if c.kind == 'code' and (m := c.first(CHECK))}
    above, out = '', []
    for c in lab:
        if c.kind == 'markdown': above += '\n' + c.source
        elif m := c.first(EXERCISE):
            _, mark, text = above.rpartition('**Your turn')   # all that stands between the mark and the cell
            out.append((m[1], mark + text, c, checks.get(m[1])))
            above = ''
    return out


def guesses(lab): return [c for c in lab if c.kind == 'code' and re.search(r'^(predicted|guess)\w* *=', c.source, re.M)]


def report_lines(lab): return [l for c in lab if c.kind == 'code' for l in c.source.splitlines() if 'In your report' in l]


def stripped(source): return SOLUTION.sub('', source)


def used(source):
    return {n.id for n in ast.walk(python(source)) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}


def assigned(source):
    "Global names that a cell makes, in whatever way."
    top = symtable.symtable(TransformerManager().transform_cell(source), 'cell', 'exec')
    return {s.get_name() for s in top.get_symbols() if s.is_assigned() or s.is_imported()}


def lives_on(names, cells):
    "(cell, those of `names` that it reads) of the first cells that read one of them before a cell makes it again."
    for c in cells:
        if found := names & outside(c.source): yield c, sorted(found)
        names = names - assigned(c.source)


DEFINES = ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef


def without_data(lab, names):
    "Those of `names` that neither imports nor definitions of the cells make; definitions are followed."
    made, left = {}, set()
    for node in (n for c in lab if c.kind == 'code' and not c.first(CHECK) for n in python(c.source).body):
        if isinstance(node, DEFINES) or isinstance(node, ast.Assign) and isinstance(node.value, (ast.Constant, ast.Dict)):
            text = ast.unparse(node)
            for name in assigned(text): made[name] = set() if isinstance(node, DEFINES[:2]) else outside(text)
        else: left |= assigned(ast.unparse(node))
    todo, seen, bad = set(names), set(), set()
    while todo:
        seen.add(name := todo.pop())
        if name in made: todo |= made[name] - seen
        elif name in left: bad.add(name)
    return bad


each_lab = pytest.mark.parametrize('number', [n for n in LABS if n in course()])


def test_all_labs_are_there(): assert not set(LABS) - set(course())


@each_lab
def test_one_session(number):
    n = len(cells(course()[number]))
    assert 40 <= n <= 60, f'{n} cells: expected 40 to 60'


@each_lab
def test_holes(number):
    found = holes(cells(course()[number]))
    assert 3 <= len(found) <= 5, f'{len(found)} exercises: expected 3 to 5'
    for name, text, exercise, check in found:
        assert text, f'{name}: no "**Your turn" in the markdown above it'
        assert MINUTES.search(text) and POINTS.search(text), f'{name}: its text names no minutes or no points'
        hints = text.count('<details>'), text.count('</details>')
        assert hints[0] == hints[1] >= 2, f'{name}: {hints[0]} hints, {hints[1]} of them closed: expected 2 or 3'
        assert '### BEGIN SOLUTION' in exercise.source, f'{name}: no marked solution'
        assert check and check.number > exercise.number, f'{name}: no check below it'
        assert check.first(CHECK)[2] == POINTS.search(text)[1], f'{name}: other points in the check than in the text'


@each_lab
def test_predict_run_read(number):
    lab = cells(course()[number])
    assert len(guesses(lab)) >= 2, f'{len(guesses(lab))} guesses: expected cells with "predicted = …"'
    assert len(report_lines(lab)) >= 2, f'{len(report_lines(lab))} sentences "In your report"'


def test_names_are_unique():
    found = [c for path in course().values() for c in cells(path)]
    for what, pattern in dict(exercise=EXERCISE, check=CHECK, answer=ANSWER).items():
        names = Counter(m[1] for c in found if (m := c.first(pattern)))
        assert names and max(names.values()) == 1, f'{what}s that occur twice: {[k for k, n in names.items() if n > 1]}'


@pytest.mark.parametrize('number', course())
def test_without_its_solutions_it_is_python(number):
    for c in cells(course()[number]):
        if c.kind != 'code': continue
        begins, ends = (c.source.count(f'### {w} SOLUTION') for w in ('BEGIN', 'END'))
        assert begins == ends, f'cell {c.number} has {begins} BEGIN SOLUTION and {ends} END SOLUTION'
        rest = stripped(c.source)
        assert 'SOLUTION' not in rest, f'cell {c.number}: a mark is left'
        try: python(rest)
        except SyntaxError as e: pytest.fail(f'cell {c.number} without its solution: {e}')


@each_lab
def test_nothing_rests_on_an_answer(number):
    "A student without an answer can go on: only the check uses what an exercise makes."
    lab = cells(course()[number])
    for name, _, exercise, check in holes(lab):
        own = made(exercise.source)
        for c in lab:
            if c.kind == 'code' and c.number > exercise.number and c is not check and not c.first(EXERCISE):
                again = own - made(c.source)
                found = again & used(c.source)
                assert not found, f'cell {c.number} uses {sorted(found)} of the exercise {name}: take the library\'s function'
                own = again


def test_teachers_are_told_the_points():
    text = (ROOT/'TEACHING.md').read_text(encoding='utf-8')
    told = {m[1]: int(m[2]) for m in re.finditer(r'^\| (\d\d) [^|]+\| *\d+ *\| *(\d+) *\|', text, re.M)}
    found = {n: shape(course()[n])['points'] for n in LABS}
    assert told == found and f'({sum(found.values())} over eight labs)' in text


@each_lab
def test_a_check_helps_and_a_hidden_one_decides(number):
    "Its visible part stands in `trying`, so that it stops nobody; the hidden part draws from SECRET and ends in `values`."
    lab = cells(course()[number])
    for name, _, _, check in holes(lab):
        visible, (hidden,) = HIDDEN.sub('', check.source), HIDDEN.findall(check.source)
        assert f"with trying('{name}'):" in visible, f'{name}: no "with trying(\'{name}\'):"'
        checks = [n for n in python(visible).body if isinstance(n, (ast.Assert, ast.Raise))]
        assert not checks, f'{name}: an assert outside of `trying` would stop Run all'
        assert len(re.findall(r'^SECRET = 0\b', hidden, re.M)) == 1, f'{name}: expected one line "SECRET = 0"'
        assert len(re.findall(r'\bSECRET\b', hidden)) >= 2, f'{name}: the hidden part draws nothing from SECRET'
        assert re.search(r'^values = ', hidden, re.M), f'{name}: the hidden part ends in no "values = …"'


@each_lab
def test_nothing_rests_on_a_check(number):
    "A student's copy has no hidden part, and its visible part may have broken off."
    lab = cells(course()[number])
    for name, _, _, check in holes(lab):
        later = [c for c in lab if c.kind == 'code' and c.number > check.number]
        for c, found in lives_on(assigned(check.source), later):
            pytest.fail(f'cell {c.number} uses {found}, which the check of {name} makes or overwrites')


@each_lab
def test_an_exercise_needs_no_data(number):
    "It is graded without data, network or GPU: all that it needs are imports and definitions."
    lab = cells(course()[number])
    for name, _, exercise, check in holes(lab):
        above = [c for c in lab if c.number < check.number and c is not exercise]
        bad = without_data(above, outside(exercise.source + '\n' + check.source))
        assert not bad, f'{name} needs {sorted(bad)}, which an earlier cell computes'


def test_the_reader():
    "What the tests above would not see if the reader were blind."
    source = 'def f(x):\n    "Twice."\n    ### BEGIN SOLUTION\n    return 2*x\n    ### END SOLUTION\n'
    assert stripped(source) == 'def f(x):\n    "Twice."\n'
    with pytest.raises(SyntaxError): python(stripped(source.replace('    "Twice."\n', '')))
    lab = [Cell(1, 'markdown', '**Your turn: two** · ●○○ · 5 minutes · 2 points\n<details>a</details>'), Cell(2, 'markdown', 'b'),
           Cell(3, 'code', '#| exercise: two\n' + source), Cell(4, 'code', '#| check: two, points=2\nassert f(1) == 2')]
    (name, text, exercise, check), = holes(lab)
    assert (name, exercise.number, check.number, POINTS.search(text)[1]) == ('two', 3, 4, '2') and text.endswith('b')
    assert made(source) == {'f'} and used('print(f(2))') == {'print', 'f'}
    assert outside('y = x + 1\ndef f(a): return a + b\nwith w as v: z = v') == {'x', 'b', 'w'}
    later = [Cell(5, 'code', 'm = 1'), Cell(6, 'code', 'print(m, k)'), Cell(7, 'code', 'k = 2'), Cell(8, 'code', 'k')]
    assert [(c.number, found) for c, found in lives_on({'m', 'k'}, later)] == [(6, ['k'])]
    lab = [Cell(1, 'code', 'import a\nd = load()\ndef g(x): return h(x)\ndef h(x): return x + d\nK = {1: 2}')]
    assert without_data(lab, {'a', 'K'}) == set() and without_data(lab, {'g'}) == {'d'}
    assert len(guesses([Cell(1, 'code', '# think\npredicted = .5')])) == 1


def shape(path):
    "The numbers of a notebook for the table."
    lab = cells(path)
    found, prose = holes(lab), ' '.join(re.sub(r'<!--.*?-->', '', c.source, flags=re.S) for c in lab if c.kind == 'markdown')
    lines = sorted(sum(bool(l.strip()) for l in c.source.splitlines()) for c in lab if c.kind == 'code')
    minutes = sum(int(m[1]) for _, text, *_ in found if (m := MINUTES.search(text)))
    points = sum(int(c.first(p)[2]) for c in lab for p in (CHECK, ANSWER) if c.first(p))
    return dict(cells=len(lab), code=len(lines), median_lines=lines[len(lines)//2] if lines else 0,
                reading_min=round(len(prose.split())/WORDS_A_MINUTE), holes=len(found), hole_min=minutes,
                answers=sum(bool(c.first(ANSWER)) for c in lab), points=points, guesses=len(guesses(lab)),
                report=len(report_lines(lab)))


if __name__ == '__main__':
    rows = {p.stem: shape(p) for p in course(*sys.argv[1:2]).values()}
    head = list(next(iter(rows.values())))
    print(f'{"":24}' + ' '.join(f'{h:>{max(len(h), 5)}}' for h in head))
    for name, row in rows.items():
        mark = '*' if name[:2] in LABS else ' '
        print(f'{mark}{name:23}' + ' '.join(f'{row[h]:>{max(len(h), 5)}}' for h in head))
    print('* graded lab: 40 to 60 cells, 3 to 5 holes, at least 2 guesses and 2 sentences for the report')
