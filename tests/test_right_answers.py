"""A right answer in another style gets its points: tests/right holds loops for einsum, arrays for tensors, 64 bits for 32."""
import contextlib, io
from functools import cache
from pathlib import Path

import nbformat
import pytest

from conftest import NOTEBOOKS
from pcam_tp.classroom import Trial, answered, imports_of, wrong_answers

HERE = Path(__file__).parent
ANSWERS = [(p.stem, *answer) for p in sorted((HERE/'right').glob('*.py')) for answer in wrong_answers(p)]


@cache
def lab(stem):
    "A lab, and the names that its imports make."
    nb, names = nbformat.read(NOTEBOOKS[stem], 4), {}
    with contextlib.redirect_stdout(io.StringIO()): exec(imports_of(nb), names)
    return nb, names


def test_there_are_some(): assert len(ANSWERS) > 20


@pytest.mark.parametrize('stem, name, style, code', ANSWERS, ids=[f'{n}: {s}' for _, n, s, _ in ANSWERS])
def test_style_costs_nothing(stem, name, style, code):
    nb, names = lab(stem)
    trial = Trial(nb, name, names)
    for secret in (0, 777):
        solved, other = (trial.run(a, secret) for a in (trial.exercise, answered(trial.exercise, code)))
        assert not other.told and not other.error, f'{other.told} {other.error}'
        assert trial.right(other, solved), f'other values with SECRET = {secret}'
