"""What an instructor relies on: every check of every lab is tried with the right answer, an empty hole and plausible slips;
copies hold no solution; and a lab whose check was weakened is named."""
import copy, re
from functools import cache

import nbformat
import pytest

from conftest import ROOT
from pcam_tp import classroom
from pcam_tp.classroom import HIDDEN, LABS, MODEL, SOLUTION, edited, marks, stamp, student_copy, stub, weaknesses
from pcam_tp.colab import Repository

NBS, WRONG = ROOT/'nbs', ROOT/'tests'/'wrong'
each_lab = pytest.mark.parametrize('number', LABS)


@cache
def _read(number): return classroom.read_notebook(classroom.course_files(NBS)[number])


def lab(number): return copy.deepcopy(_read(number))


def stem(number): return classroom.course_files(NBS)[number].stem


def slips(number): return classroom.wrong_answers(WRONG/f'{stem(number)}.py')


def text_of(nb): return '\n'.join(c.source for c in nb.cells)


@each_lab
def test_check(number):
    found = classroom.check([number], NBS, WRONG)
    assert not found, '\n'.join(found)


@each_lab
def test_a_copy_holds_nothing_of_the_answers(number):
    nb = lab(number)
    mine = student_copy(nb, stem(number), Repository('ada', 'class'), 'labs')
    nbformat.validate(mine)
    assert not any(c.get('outputs') for c in mine.cells), 'an output is left'
    text = text_of(mine)
    assert not re.search(r'SECRET =|HIDDEN TESTS|(BEGIN|END) SOLUTION', text)
    for m in marks(nb):
        source = nb.cells[m.at].source
        for block in (*HIDDEN.findall(source), *MODEL.findall(source)):
            told = [l for l in block.splitlines()[1:-1] if len(l.strip()) > 25 and l in text]
            assert not told, f'{m.name}: the copy has {told}'
        for hole in SOLUTION.finditer(source):
            whole = '\n'.join(hole[0].splitlines()[1:-1])
            assert whole not in text, f'{m.name}: the copy has its solution'
    assert f'github/ada/class/blob/main/labs/{stem(number)}.ipynb' in text
    assert f'github.com/ada/class/issues/new?title={stem(number)}' in text


def swapped(nb, name, kind, old, new):
    "Change the marked cell of a notebook; the text must be there."
    at, = (m.at for m in marks(nb) if m.key == (kind, name))
    changed = re.sub(old, new, nb.cells[at].source, count=1)
    assert changed != nb.cells[at].source, f'{old} is not in the {kind} of {name}'
    nb.cells[at].source = changed


@each_lab
def test_a_weakened_check_is_named(number):
    "Three ways at once, one for each of the first three exercises: no secret, no values, values that say nothing."
    nb = lab(number)
    names = [m.name for m in marks(nb) if m.kind == 'exercise'][:3]
    swapped(nb, names[0], 'check', r'SECRET = 0\b.*', 'SECRET = 5')
    swapped(nb, names[1], 'check', r'(?m)^values = ', 'kept = ')
    swapped(nb, names[2], 'check', r'(?m)^### END HIDDEN', 'values = [1.]\n### END HIDDEN')
    found = weaknesses(nb, slips(number))
    said = {n: ' '.join(s for name, s in found if name == n) for n in names}
    assert set(dict(found)) == set(names), found
    assert 'no line "SECRET = 0"' in said[names[0]]
    assert 'no `values`' in said[names[1]]
    assert 'another SECRET gives the same values' in said[names[2]]


@each_lab
def test_an_edit_outside_of_the_marks_is_named(number):
    nb = lab(number)
    mine = student_copy(nb, stem(number), Repository('ada', 'class'), 'labs')
    assert edited(mine, nb) == []
    for m in marks(nb):
        other = copy.deepcopy(mine)
        at, = (o.at for o in marks(other) if o.key == m.key)
        other.cells[at].source += '\n# helped' if m.kind != 'answer' else '\nhelped'
        assert [name for name, _ in edited(other, nb)] == [m.name]


@each_lab
def test_stamped_copies_are_what_nbgrader_reads(number):
    from nbgrader.nbgraderformat import MetadataValidator
    from nbgrader.utils import compute_checksum, determine_grade
    nb = lab(number)
    mine = student_copy(nb, stem(number), Repository('ada', 'class'), 'labs')
    stamped, remarks = stamp(mine, nb)
    assert remarks == []
    MetadataValidator().validate_nb(stamped)
    for m in marks(stamped):
        cell = stamped.cells[m.at]
        assert compute_checksum(cell) == cell.metadata.nbgrader.checksum
        assert cell.source == (nb.cells[m.at].source if m.kind == 'check' else stub(nb.cells[m.at].source))
        if m.kind == 'answer': assert determine_grade(cell) == (0, m.points)   # untouched: no points, nobody has to look


def test_every_wrong_answer_has_its_lab():
    assert {p.stem for p in WRONG.glob('*.py')} == {stem(n) for n in LABS}


def test_a_release_is_whole_or_not_there(tmp_path, monkeypatch):
    out = tmp_path/'labs'
    table = classroom.release(out, 'ada', 'class', nbs=NBS)
    assert list(table.notebook) == [stem(n) for n in LABS] and table.exercises.min() >= 3
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    def fails(*args): raise KeyboardInterrupt
    monkeypatch.setattr(classroom.Path, 'write_bytes', fails)
    with pytest.raises(KeyboardInterrupt): classroom.release(out, 'eve', 'class', nbs=NBS)
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ['labs']
    classroom.release(out, 'eve', 'class', nbs=NBS)   # the former release makes room for the next
    assert 'github/eve/class' in (out/'README.md').read_text(encoding='utf-8')
    (tmp_path/'file').write_text('')
    for other in (tmp_path/'file', ROOT/'tests', tmp_path):
        with pytest.raises(ValueError, match='no release wrote|a file'): classroom.release(other, 'ada', 'class', nbs=NBS)


def test_the_root_of_a_clone_is_no_place_for_a_release(tmp_path):
    (tmp_path/'.git').mkdir()
    with pytest.raises(ValueError, match='root of a clone: use a sub-folder, such as .*labs'): classroom.release(tmp_path, 'ada', 'class', nbs=NBS)
    assert [p.name for p in tmp_path.iterdir()] == ['.git']


def test_run_all_goes_on_over_empty_holes(tmp_path, monkeypatch):
    "Of a small lab, in a kernel of its own; `check(run=True)` does the same for the labs, in minutes."
    monkeypatch.delenv('IN_TEST', raising=False)
    exercise = '#| exercise: twice\ndef twice(x):\n    "2x"\n    ### BEGIN SOLUTION\n    return 2*x\n    ### END SOLUTION'
    check = '#| check: twice, points=1\nwith trying("twice"):\n    assert twice(2) == 4, "return the double"'
    badge = '# T\n\n[c](https://colab.research.google.com/github/a/b/blob/main/nbs/t.ipynb)'
    cell = nbformat.v4.new_code_cell
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(badge), cell('from pcam_tp.core import *'),
                                         cell(exercise), cell(check), cell('print("the end")')])
    mine = student_copy(nb, 't', Repository('ada', 'class'))
    assert list(classroom._run_all(mine, tmp_path)) == []
    del mine.cells[1]   # the imports take seconds, and the next check needs none
    mine.cells[2].source = check.replace('with trying("twice"):', 'if True:')
    (name, sentence), = classroom._run_all(mine, tmp_path)
    assert 'return the double' in sentence
