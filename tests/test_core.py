"What foundation/00_core cannot show in one process: writers that are killed, two makers, folders by environment."
import contextlib, signal, subprocess, sys

import pytest
import torch

from conftest import ROOT, python
from pcam_tp import core

WRITER = '''
import sys, time
from pathlib import Path
from pcam_tp.core import atomic
with atomic(Path(sys.argv[1])) as tmp:
    {half}
    print('half', flush=True); time.sleep(60)
'''
FILE, FOLDER = "tmp.write_bytes(b'x'*1000)", "tmp.mkdir(); (tmp/'part').write_bytes(b'x')"


def start(code, *args): return subprocess.Popen([sys.executable, '-c', code, *map(str, args)], stdout=subprocess.PIPE, text=True, cwd=ROOT)


@pytest.mark.parametrize('half', [FILE, FOLDER], ids=['file', 'folder'])
def test_a_killed_writer_leaves_no_file(tmp_path, half):
    p = start(WRITER.format(half=half), tmp_path/'a.h5')
    assert p.stdout.readline() == 'half\n'
    p.kill(); p.wait()
    assert not (tmp_path/'a.h5').exists()
    with core.atomic(tmp_path/'a.h5') as tmp: tmp.write_bytes(b'whole')   # what it left behind does not stand in the way
    assert (tmp_path/'a.h5').read_bytes() == b'whole'


def test_an_interrupted_writer_cleans_up(tmp_path):
    (tmp_path/'a.h5').write_bytes(b'old')
    p = start('import signal; signal.signal(signal.SIGINT, signal.default_int_handler)' + WRITER.format(half=FILE), tmp_path/'a.h5')
    assert p.stdout.readline() == 'half\n'
    p.send_signal(signal.SIGINT); p.wait(20)
    assert [f.name for f in tmp_path.iterdir()] == ['a.h5'] and (tmp_path/'a.h5').read_bytes() == b'old'


MAKER = '''
import os, sys, time
from pathlib import Path
from pcam_tp.core import make_once
folder = Path(sys.argv[1])
def make(tmp):
    with open(folder/'makers', 'a') as f: f.write(f'{os.getpid()}\\n')
    print('making', flush=True)
    while not (folder/'go').exists(): time.sleep(.05)
    tmp.write_text(str(os.getpid()))
print(make_once(folder/'artefact', make).read_text(), flush=True)
'''


def test_two_processes_one_maker(tmp_path):
    a = start(MAKER, tmp_path)
    assert a.stdout.readline() == 'making\n'
    b = start(MAKER, tmp_path)
    assert 'waiting' in b.stdout.readline()
    (tmp_path/'go').touch()
    (a_out, _), (b_out, _) = a.communicate(timeout=60), b.communicate(timeout=60)
    assert (tmp_path/'makers').read_text().split() == [str(a.pid)]
    assert a_out.strip() == b_out.strip() == str(a.pid)


def test_a_killed_maker_frees_the_lock(tmp_path):
    a = start(MAKER, tmp_path)
    assert a.stdout.readline() == 'making\n'
    a.kill(); a.wait()
    (tmp_path/'go').touch()
    out, _ = (b := start(MAKER, tmp_path)).communicate(timeout=60)
    assert out.split()[-1] == str(b.pid)


def test_home(tmp_path, monkeypatch):
    "The repository around us, else the working folder; PCAM_TP_HOME overrides both."
    for cwd, expected in {ROOT: ROOT, ROOT/'nbs': ROOT, tmp_path: tmp_path}.items():
        monkeypatch.chdir(cwd)
        assert core.home() == expected
        with monkeypatch.context() as m:
            m.setenv('PCAM_TP_HOME', str(tmp_path/'other'))
            assert core.home('data') == tmp_path/'other'/'data' and (tmp_path/'other'/'data').is_dir()


def test_source_and_budget(monkeypatch, tmp_path):
    monkeypatch.delenv('PCAM_TP_BUDGET'); monkeypatch.delenv('PCAM_TP_SOURCE')
    assert (core.source(), core.budget(), core.run_name()) == ('synthetic', 'quick', 'synthetic-quick')
    monkeypatch.setenv('PCAM_TP_SOURCE', str(tmp_path))
    assert core.budget() == 'full'


def test_setup():
    "The probe believes the clock, and what it draws does not move the seed."
    code = '''
import torch, platform
from pcam_tp.core import setup
cfg = setup(seed=3, threads=1, device='cpu'); a = torch.rand(4)
setup(seed=3, threads=1, precision='no', verbose=False); b = torch.rand(4)
assert torch.equal(a, b)
assert (cfg.device.type, cfg.threads, cfg.seed, torch.get_num_threads()) == ('cpu', 1, 3, 1)
assert cfg.precision in ('no', 'bf16', 'fp16') and cfg.keeps_memory in (True, False)
assert not torch.backends.cuda.matmul.allow_tf32
'''
    out = python(code).stdout.splitlines()
    assert len(out) == 1 and torch.__version__ in out[0], out


@pytest.fixture
def device_that_takes(monkeypatch):
    "A CUDA device for `best_batch_size`: `seconds(n)` a pass of n images, and gigabytes of free memory."
    def make(seconds, free=64):
        clock, calls = [0.], []
        def net(x):
            calls.append(len(x))
            clock[0] += seconds(len(x))
        monkeypatch.setattr(core, '_small_convolutions', lambda device: net)
        monkeypatch.setattr(core.time, 'perf_counter', lambda: clock[0])
        for name, value in dict(synchronize=None, mem_get_info=(free*2**30, 80*2**30), memory_reserved=0, memory_allocated=0, current_device=0).items():
            monkeypatch.setattr(torch.cuda, name, lambda *a, value=value: value)
        monkeypatch.setattr(core.torch, 'rand', lambda *shape, device, dtype: torch.empty(shape[0], 1, 1, 1))
        monkeypatch.setattr(torch.random, 'fork_rng', lambda devices: contextlib.nullcontext())
        core._measured_batch.cache_clear(); core._batch_size.cache_clear()
        return calls
    yield make
    core._measured_batch.cache_clear(); core._batch_size.cache_clear()


@pytest.mark.parametrize('seconds, free, expected', [
    (lambda n: max(.002, n*1e-5), 80, 256),     # full from 200 images on: the smallest that fills it
    (lambda n: .002 + n*1e-5, 80, 1_024),       # never full: the largest that is tried
    (lambda n: .001*n, 80, 32),                 # each image costs the same
    (lambda n: .01*n, 80, 32),                  # slow: it stops after few
    (lambda n: max(.002, n*1e-5), 8, 128),      # 8 GiB free: 128 images
    (lambda n: max(.002, n*1e-5), 1, 16),       # less than the smallest that is tried
    (lambda n: max(.002, n*1e-5), .01, 1)], ids=['fills', 'never', 'linear', 'slow', 'memory', 'little', 'none'])
def test_batch_size_of_a_card(device_that_takes, seconds, free, expected):
    calls = device_that_takes(seconds, free)
    assert core.best_batch_size('cuda') == expected
    assert sum(map(seconds, calls)) < .5 + 2*seconds(32)
    n = len(calls)
    assert core.best_batch_size(torch.device('cuda', 0)) == expected and len(calls) == n, 'measured again'
    assert core.best_batch_size('cuda', (192, 192)) == max(1, expected//4) and len(calls) == n
