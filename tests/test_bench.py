"benchmarks/: the arms run with hardly any work, on the processor and on the simulated device; rows and comparisons."
import os, re, sys

import pytest

from conftest import ROOT, TESTS, python, run

sys.path[:0] = [str(ROOT/'benchmarks'), str(TESTS/'fake_cuda')]
from arms import ARMS, DEVICES
import bench as benchmark
from bench import cases, merged
from fake_cuda import why_not

RESULTS = ROOT/'benchmarks'/'results.json'
FAKE = os.environ | dict(FAKE_CUDA='1', PYTHONPATH=os.pathsep.join([str(TESTS/'fake_cuda'), os.environ['PYTHONPATH']]))
simulated = pytest.mark.skipif(bool(why_not()), reason=f'no simulated CUDA device: {why_not()}')


def bench(*args, **kw): return run(sys.executable, 'benchmarks/bench.py', '--quick', '--repeats', '1', *args, **kw)


@pytest.mark.parametrize('device', DEVICES)
def test_every_case_has_its_arms(device):
    found = cases(device)
    assert len(found) > 20 and not {a for c in found for a in (c.ours, c.theirs)} - set(ARMS)
    assert len({(c.name, c.work, c.peer) for c in found}) == len(found), 'two rows would be one'


def test_rows_are_kept_by_device():
    "A row of one device leaves that of another, and what is no longer measured goes."
    both = {c[:2] + (c.peer,) for c in cases('cpu')} & {c[:2] + (c.peer,) for c in cases('cuda')}
    name, work, peer = sorted(both)[0]
    row = lambda device, ours, name=name: dict(device=device, name=name, work=work, peer=peer, ours_s=ours)
    rows = merged([row('cpu', 1), row('cuda', 2), row('cpu', 3, 'gone')], [row('cuda', 4)])
    assert [(r['device'], r['ours_s']) for r in rows] == [('cpu', 1), ('cuda', 4)]


def test_ctrl_c_keeps_whole_rounds(monkeypatch):
    "The round that was cut is left out; cut in the first, there is nothing to tell."
    def cut(k):
        seconds = iter(range(k))
        def measure(*a):
            for s in seconds: return s
            raise KeyboardInterrupt
        monkeypatch.setattr(benchmark, 'measure', measure)
        for times in benchmark.rounds(['a', 'b'], 3, []): pass
        return times
    assert cut(3) == dict(a=[0], b=[1]) and cut(6) == dict(a=[0, 3, 4], b=[1, 2, 5])
    with pytest.raises(KeyboardInterrupt): cut(1)


def test_two_arms_on_the_processor():
    before = RESULTS.read_bytes()
    table = bench('--device', 'cpu', '--only', 'occlusion', 'small_cnn', 'bare').stdout
    assert re.search(r'cpu +occlusion 16/8, fp32 +small_cnn', table), table
    assert RESULTS.read_bytes() == before, 'figures of --quick mean nothing'


@simulated
def test_arms_on_the_device():
    "One process for all kinds of arms: each gives seconds, and our networks and images lie on the device."
    python('''
import sys
sys.path.insert(0, 'benchmarks')
import torch, arms
arms.use('cuda', quick=True)
model, x = arms._scene('lime', 'small_cnn')
assert torch.cuda.is_fake and x.is_cuda and model.device.type == 'cuda'
kinds = [f'{m}_small_cnn_{k}' for m in arms.METHODS for k in ('ours', 'bare', 'library', 'best')]
kinds += ['cam_small_cnn_ours', 'cam_small_cnn_batch', 'step_small_cnn_default']
kinds += ['train_small_cnn', 'train_small_cnn_bare']
kinds += ['curves_small_cnn_ours', 'curves_small_cnn_loop', 'curves_small_cnn_bare', 'flips_small_cnn_ours']
for a in kinds:
    if a in arms.ARMS: assert 0 < arms.ARMS[a]() < 1e3, a
''', env=FAKE)


@simulated
def test_bench_on_the_device():
    table = bench('--only', 'RISE', 'small_cnn', 'fp32', env=FAKE).stdout
    assert re.search(r'cuda +RISE of 2,000, fp32 +small_cnn', table), table


def checkout(folder, took):
    "A checkout whose library says how long its arm took."
    arms = 'import pcam_tp\nARMS = dict(batches_ours=0, gone=0)\nif __name__ == "__main__": print(pcam_tp.TOOK)\n'
    for name, source in {'benchmarks/arms.py': arms, 'pcam_tp/__init__.py': f'TOOK = {took}'}.items():
        (folder/name).parent.mkdir(parents=True)
        (folder/name).write_text(source, encoding='utf-8')
    return folder


def test_against_another_checkout(tmp_path):
    "Its own arms run with its own library: it took 1,000 seconds, so ours is faster; an arm that is lost is left out."
    args = '--repeats', '1', '--device', 'cpu', '--only', 'batches', '--against', checkout(tmp_path, 1000.)
    table = run(sys.executable, 'benchmarks/bench.py', *args).stdout
    found = re.search(r'batches_ours +1e\+03 +(\S+) +(\S+) .* False', table)
    assert found and 0 < float(found[1]) < 100 and 'gone' not in table, table


def test_against_what_cannot_be_compared(tmp_path):
    p = run(sys.executable, 'benchmarks/bench.py', '--against', tmp_path, ok=False)
    assert p.returncode and 'there is no' in p.stdout, p.stdout
    p = bench('--device', 'cpu', '--against', checkout(tmp_path, 1.), ok=False)
    assert p.returncode and 'use --device cpu' in p.stdout, p.stdout
