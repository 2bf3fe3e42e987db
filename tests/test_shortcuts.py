"What foundation/08_shortcuts cannot show in one process: the same bytes in another process, blocks of another size, a writer that fails."
import hashlib, os

import pytest

from conftest import python
from pcam_tp import shortcuts, synthetic

HASH = '''
import hashlib, numpy as np
from pcam_tp.shortcuts import KINDS, plant
x, y = np.random.default_rng(0).integers(0, 256, (16, 96, 96, 3), np.uint8), np.arange(16) % 2
for k in KINDS:
    a = plant(x, y, k, .5, seed=3)
    print(k, hashlib.sha256(a.x.tobytes() + a.present.tobytes() + (b'' if a.mask is None else a.mask.tobytes())).hexdigest())
'''


def test_the_same_bytes_in_another_process():
    a, b = [python(HASH, env={**os.environ, 'PYTHONHASHSEED': s}).stdout for s in '12']
    assert a == b and len(set(a.split())) == 6   # three kinds, three different results


@pytest.mark.parametrize('kind', shortcuts.KINDS)
def test_block_size_does_not_change_a_byte(tmp_path, kind):
    found = []
    for block in (1_024, 7):
        folder = synthetic.write_synthetic(tmp_path/str(block), dict(test=40))
        shortcuts._write_shortcut(folder, 'test', kind, .5, 0, .5, block=block)
        found.append({f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.iterdir()})
    assert found[0] == found[1] and len(found[0]) == (4 if kind == 'stain_shift' else 5)


def test_a_writer_that_fails_leaves_no_folder(tmp_path, monkeypatch):
    def fails(*args): raise KeyboardInterrupt
    few = dict(sizes=dict(train=16), folder=tmp_path)
    with monkeypatch.context() as m:
        m.setattr(shortcuts, '_apply', fails)
        with pytest.raises(KeyboardInterrupt): shortcuts.shortcut_folder('ink', .5, **few)
    assert not [f for f in tmp_path.iterdir() if f.is_dir()]
    assert shortcuts.shortcut_folder('ink', .5, **few).parent == tmp_path
