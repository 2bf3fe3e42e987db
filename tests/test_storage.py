"What foundation/02_storage cannot show in one process: memory of fresh processes, files that travel to workers, a writer that is killed."
import multiprocessing, shutil, signal, subprocess, sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from conftest import ROOT, python
from pcam_tp.storage import FileRows

ROW = 96*96*3
linux = pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='peak memory is read from /proc/self/status')


def patches(path, n):
    "A file of `n` patches in one piece. Only the last is written: the file has its full size, but hardly takes disk space."
    with h5py.File(path, 'w') as f:
        f.create_dataset('x', (n, 96, 96, 3), 'uint8')[n - 1] = 7
    assert path.stat().st_size > n*ROW
    return path


# ru_maxrss begins with the peak of the process that started this one; VmHWM is this program's own.
PEAK = '''
import re, sys, h5py, numpy as np, torch
from pathlib import Path
from pcam_tp.storage import FileRows, unpack
def peak(): return int(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])
before = peak()
'''
EPOCH = PEAK + '''
x = FileRows(sys.argv[1], 'x')
order = np.random.default_rng(0).permutation(len(x))
total = sum(int(torch.from_numpy(x[order[i:i + 64]]).permute(0, 3, 1, 2).float().amax((1, 2, 3)).sum()) for i in range(0, len(x), 64))
assert total == 7, total
print(before, peak())
'''
UNPACK = PEAK + '''
unpack(sys.argv[1], 'x', sys.argv[2])
print(before, peak())
'''


def peak(code, *args): return tuple(map(int, python(code, *args, timeout=60).stdout.split()[-2:]))   # kB before and after


@linux
def test_memory_of_an_epoch_does_not_grow_with_the_file(tmp_path):
    small, large = (peak(EPOCH, patches(tmp_path/f'{n}.h5', n))[1] for n in (2_000, 20_000))
    assert large < 1.2*small, f'peak {large/1024:.0f} MB for 20,000 patches, {small/1024:.0f} MB for 2,000'


@linux
def test_memory_of_a_copy_is_bounded(tmp_path):
    if shutil.disk_usage(tmp_path).free < 2e9: pytest.skip('less than 2 GB of disk space are left')
    before, after = peak(UNPACK, patches(tmp_path/'a.h5', 20_000), tmp_path/'b.h5')
    assert after - before < 150*1024, f'{(after - before)/1024:.0f} MB to copy 553 MB'
    assert (FileRows(tmp_path/'b.h5', 'x')[19_999] == 7).all()
    (tmp_path/'b.h5').unlink()


def reader(x, seed, queue):
    order = np.random.default_rng(seed).permutation(len(x))
    queue.put(all((x[rows] == rows[:, None]).all() for rows in np.array_split(order, 20)))


@pytest.mark.parametrize('method', ['fork', 'spawn'])
def test_two_workers_read_one_file(tmp_path, method):
    if method not in multiprocessing.get_all_start_methods(): pytest.skip(f'no {method} on this system')
    with h5py.File(tmp_path/'a.h5', 'w') as f: f['x'] = np.repeat(np.arange(2_000)[:, None], 500, 1)
    x = FileRows(tmp_path/'a.h5', 'x')
    assert x[1_999][0] == 1_999   # opened before the workers start
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    workers = [context.Process(target=reader, args=(x, seed, queue)) for seed in range(2)]
    for w in workers: w.start()
    assert [queue.get(timeout=60) for _ in workers] == [True, True]
    for w in workers: w.join(20)
    assert x[[5, 3]][:, 0].tolist() == [5, 3]


WRITER = '''
import signal, sys, time
from pcam_tp import storage
signal.signal(signal.SIGINT, signal.default_int_handler)   # also where the shell ignores it
copy = storage._copy_piece
def stuck(a, rows, piece, *rest):
    copy(a, rows, piece, *rest)
    if piece[0]: print('half', flush=True); time.sleep(60)
storage._copy_piece, storage._PIECE = stuck, 2**20
storage.write_subset(sys.argv[1], sys.argv[2], slice(None))
'''


@pytest.mark.parametrize('name', ['SIGKILL', 'SIGINT'])
def test_a_writer_that_is_stopped_leaves_no_file(tmp_path, name):
    source, out = patches(tmp_path/'a.h5', 200), tmp_path/'out'/'b.h5'
    out.parent.mkdir()
    p = subprocess.Popen([sys.executable, '-c', WRITER, source, out], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT)
    assert p.stdout.readline() == 'half\n'
    p.send_signal(getattr(signal, name)); p.wait(20)
    left = list(out.parent.iterdir())
    assert out not in left
    if name == 'SIGINT': assert not left
