"What foundation/00_core cannot show in one process: writers that are killed, two makers, folders by environment."
import builtins, contextlib, os, signal, subprocess, sys, threading, time
from pathlib import Path

import pytest
import torch

from conftest import ROOT, python, run
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


def start(code, *args):
    return subprocess.Popen([sys.executable, '-c', code, *map(str, args)], stdout=subprocess.PIPE, text=True, cwd=ROOT)


@pytest.mark.parametrize('half', [FILE, FOLDER], ids=['file', 'folder'])
def test_a_killed_writer_leaves_no_file(tmp_path, half):
    p = start(WRITER.format(half=half), tmp_path/'a.h5')
    assert p.stdout.readline() == 'half\n'
    p.kill(); p.wait()
    assert not (tmp_path/'a.h5').exists()
    with core.atomic(tmp_path/'a.h5') as tmp: tmp.write_bytes(b'whole')   # its remains do not stand in the way
    assert (tmp_path/'a.h5').read_bytes() == b'whole'


def test_an_interrupted_writer_cleans_up(tmp_path):
    (tmp_path/'a.h5').write_bytes(b'old')
    interruptible = 'import signal; signal.signal(signal.SIGINT, signal.default_int_handler)'
    p = start(interruptible + WRITER.format(half=FILE), tmp_path/'a.h5')
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
    "Variables give the defaults, arguments go before them; assets that cannot be had are not claimed."
    for k in ('BUDGET', 'SOURCE', 'ASSETS'): monkeypatch.delenv(f'PCAM_TP_{k}', raising=False)
    ambient = lambda: (core.source(), core.budget(), core.run_name(), core.sizes().epochs)
    assert ambient() == ('synthetic', 'quick', 'synthetic-quick', 3)
    assert core.run_name(tmp_path) == f'{tmp_path.name}-full' and core.budget(tmp_path) == 'full'
    assert core.run_name('pcam', 'quick') == 'pcam-quick' and core.sizes('full').epochs == 18
    monkeypatch.setenv('PCAM_TP_ASSETS', 'https://example.org')
    assert ambient() == ('assets', 'full', 'assets-full', 18) and core.assets_address() == 'https://example.org'
    monkeypatch.setattr(core, '_lost', set())
    core.lose_assets('https://example.org')
    assert ambient() == ('synthetic', 'quick', 'synthetic-quick', 3)
    monkeypatch.setenv('PCAM_TP_SOURCE', str(tmp_path))
    assert ambient() == (str(tmp_path), 'full', f'{tmp_path.name}-full', 18)
    assert core.run_name('synthetic') == 'synthetic-quick'
    monkeypatch.setenv('PCAM_TP_BUDGET', 'huge')
    for f in (core.budget, core.sizes, core.run_name):
        with pytest.raises(ValueError, match="'huge'.*quick, full"): f()
    assert core.run_name(budget='quick') == f'{tmp_path.name}-quick'


IDLE = '''
import os
import torch
from pcam_tp.core import idle_ms, sleep_when_idle
torch.set_num_threads(2)
before = idle_ms()
for _ in range(2): sleep_when_idle()   # the second call does nothing
print(before, idle_ms(), len(os.listdir('/proc/self/task')))
'''


needs_linux = pytest.mark.skipif(not Path('/proc/self/task').exists(), reason='needs Linux')
TWO = len(getattr(os, 'sched_getaffinity', lambda _: [0])(0)) > 1


@pytest.mark.skipif(not core._openmp() or not TWO, reason='needs GNU OpenMP and two processors')
def test_idle_threads_sleep():
    "Waiting threads burn processor time until they are told not to; whoever has set a variable is left alone."
    env = {k: v for k, v in os.environ.items() if k not in ('OMP_NUM_THREADS', 'GOMP_SPINCOUNT', 'OMP_WAIT_POLICY')}
    before, after, threads = map(float, python(IDLE, env=env).stdout.split())
    assert before > 2*after, (before, after)   # 3 ms and .04 ms on a quiet machine
    _, _, fewer = map(float, python(IDLE, env=env | dict(GOMP_SPINCOUNT='300000')).stdout.split())
    assert threads - fewer == os.cpu_count() + 1, (threads, fewer)


BUSY = '''
import os
import torch
from pcam_tp import core
torch.set_num_threads(2)
threads = lambda: len(os.listdir('/proc/self/task'))
core._share, core._places = lambda a, b: 0., lambda before, now: {min(now): 0}
start = threads()
core.give_way()
quiet = threads() - start
core._share = lambda a, b: .5
core.give_way()   # it has just looked
again = threads() - start
core.give_way(every=0)
print(quiet, again, threads() - start, *core._team, os.getpid())
'''


@pytest.mark.skipif(not core._openmp(), reason='needs GNU OpenMP')
def test_threads_sleep_where_others_work():
    "A quiet machine is left to spin; a busy one is seen, and gets its processors back."
    env = {k: v for k, v in os.environ.items() if k not in ('GOMP_SPINCOUNT', 'OMP_WAIT_POLICY')}
    quiet, again, parked, *team, pid = map(int, python(BUSY, env=env).stdout.split())
    assert quiet == again == 0 and parked > os.cpu_count() and team == [pid]   # the main thread
    workers = [subprocess.Popen([sys.executable, '-c', 'while True: pass']) for _ in range(os.cpu_count())]
    try: assert max(core.busy_share(.3) for _ in range(5)) > .8
    finally:
        for w in workers: w.kill()


def test_who_does_not_tell_is_not_busy(monkeypatch, tmp_path):
    "Counters that stand still, or none for the processors of this process."
    for text in ('cpu  0 0 0 0 0 0 0 0 0 0\ncpu0 0 0 0 0 0 0 0 0 0 0\n', 'cpu  9 9 9 9\nintr 5\n'):
        (tmp_path/'stat').write_text(text)
        monkeypatch.setattr(core, 'Path', lambda p: tmp_path/'stat')
        assert core.busy_share(0) == 0


@needs_linux
def test_own_work_is_not_that_of_others(monkeypatch, tmp_path):
    "Five seconds that two processors worked, three of them for us, are one second of others on each."
    (tmp_path/'stat').write_text('cpu 9 9 9\ncpu0 100 50 50 900 9 0 0 0 9\ncpu1 100 0 0 9 9 50 50 100 9\ncpu2 9 9\n')
    monkeypatch.setattr(core, 'Path', lambda p: tmp_path/'stat')
    monkeypatch.setattr(os, 'sched_getaffinity', lambda t: {0, 1})
    monkeypatch.setattr(os, 'sysconf', lambda name: 100)
    monkeypatch.setattr(time, 'process_time', lambda: 3.)
    assert core._others() == 1


@needs_linux
@pytest.mark.parametrize('processors, expected', {
    (0, 0): (0, 1),          # two threads on the same: one goes
    (0, 1): (0, 1),          # each has its own
    (0, 2, 2, 1): (0, 2, 3, 1),
    (0, 0, 0, 0): (0, 1, 2, 3),
    (3, 3, 0, 1): (3, 2, 0, 1)}.items())
def test_each_thread_of_a_team_has_its_processor(monkeypatch, processors, expected):
    "The first of `processors` runs this thread, its team the others; of two bystanders one worked before, one little."
    me, n = threading.get_native_id(), len(processors)
    monkeypatch.setattr(torch, 'get_num_threads', lambda: n)
    monkeypatch.setattr(os, 'sched_getaffinity', lambda t: set(range(n + 1)))
    now = {t: (50 - t, processors[t]) for t in range(1, n)} | {me: (90, processors[0])}
    bystanders = {1_000: (80, processors[0]), 1_001: (1, processors[0])}
    assert core._places({1_000: (80, 0)}, now | bystanders) == dict(zip([me, *range(1, n)], expected))


@needs_linux
def test_who_has_no_processor_of_its_own(monkeypatch):
    "A thread that works alone; one that its user has bound; one too many; one that has ended."
    me, together = threading.get_native_id(), {threading.get_native_id(): (9, 0), 1: (9, 0)}
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 2)
    def allow(masks): monkeypatch.setattr(os, 'sched_getaffinity', lambda t: masks[t])
    allow({0: {0, 1}, me: {0, 1}, 1: {0, 1}})
    assert core._places({}, together) == {me: 0, 1: 1} and core._places(together, together) == {}
    allow({0: {0, 1}, me: {0, 1}, 1: {0}})
    assert core._places({}, together) == {me: 0}
    allow({0: {0}, me: {0}, 1: {0}})
    assert core._places({}, together) == {me: 0}
    def ended(t):
        if t == 1: raise ProcessLookupError
        return {0, 1}
    monkeypatch.setattr(os, 'sched_getaffinity', ended)
    assert core._places({}, together) == {me: 0}


@pytest.mark.skipif(not TWO, reason='needs two processors')
@needs_linux
def test_threads_are_bound_inside_the_block_alone(monkeypatch):
    "Threads of the team keep to a processor, and are free again, even if one has ended or the work is interrupted."
    monkeypatch.setattr(core, 'give_way', lambda: None)
    ended, other, stop = threading.Thread(target=int), threading.Thread(target=lambda: stop.wait()), threading.Event()
    ended.start(); ended.join(); other.start()
    me, allowed, last = threading.get_native_id(), os.sched_getaffinity(0), max(os.sched_getaffinity(0))
    masks = lambda: [os.sched_getaffinity(t) for t in (me, other.native_id)]
    def inside(*team):
        monkeypatch.setattr(core, '_team', dict.fromkeys(team, last))
        with contextlib.suppress(KeyboardInterrupt), core.beside_others():
            bound = masks()
            raise KeyboardInterrupt
        assert masks() == [allowed, allowed]
        return bound
    try:
        assert inside(ended.native_id, me, other.native_id) == [{last}, {last}]
        assert inside(other.native_id) == inside() == [allowed, allowed]   # somebody else's team, or nobody beside us
    finally: stop.set()


def test_no_name_hides_another():
    assert not set(core.__all__) & (set(dir(builtins)) | set(sys.stdlib_module_names))


SHARED = '''
import sys, time
from pathlib import Path
from pcam_tp.core import best_device, processes, wait_for_all
index, count = processes()
if index == 0: time.sleep(1)
(Path(sys.argv[1])/f'{index} of {count} on {best_device().type}').touch()
wait_for_all()
assert len(list(Path(sys.argv[1]).iterdir())) == count
'''


def test_processes(tmp_path):
    "Each knows its number and how many there are; one that waits for all finds what all have done."
    for n in (1, 2):
        folder = tmp_path/str(n)
        folder.mkdir()
        (tmp_path/'shared.py').write_text(SHARED)
        launch = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', n] if n > 1 else []
        run(sys.executable, *launch, tmp_path/'shared.py', folder, env={**os.environ, 'ACCELERATE_USE_CPU': '1'})
        assert sorted(f.name for f in folder.iterdir()) == [f'{k} of {n} on cpu' for k in range(n)]


def test_setup():
    "The probe believes the clock, and what it draws does not move the seed, whatever torch's default type."
    code = '''
import torch
from pcam_tp.core import setup
torch.set_default_dtype(getattr(torch, sys.argv[1]))
cfg = setup(seed=3, threads=1, device='cpu')
a = torch.rand(4)
setup(seed=3, threads=1, precision='no', verbose=False)
assert torch.equal(a, torch.rand(4))
assert (cfg.device.type, cfg.threads, cfg.batch_size, cfg.seed, torch.get_num_threads()) == ('cpu', 1, 64, 3, 1)
assert not torch.backends.cuda.matmul.allow_tf32
print(cfg.precision, cfg.keeps_memory)
'''
    found = []
    for default in ('float32', 'float64'):
        line, result = python('import sys' + code, default).stdout.splitlines()
        assert torch.__version__ in line and '64 images a pass' in line, line
        found.append(result)
    assert found[0] == found[1] and found[0].split()[0] in ('no', 'bf16'), found



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
        card = dict(synchronize=None, mem_get_info=(int(free*2**30), 80*2**30), memory_reserved=0, memory_allocated=0,
                    current_device=0)
        for name, value in card.items(): monkeypatch.setattr(torch.cuda, name, lambda *a, value=value: value)
        monkeypatch.setattr(core.torch, 'rand', lambda *shape, device, dtype: torch.empty(shape[0], 1, 1, 1))
        monkeypatch.setattr(torch.random, 'fork_rng', lambda devices: contextlib.nullcontext())
        core._measured_batch.cache_clear(); core._batch_size.cache_clear()
        return calls
    yield make
    core._measured_batch.cache_clear(); core._batch_size.cache_clear()


@pytest.mark.parametrize('seconds, free, expected', [
    (lambda n: max(.002, n*1e-5), 80, 256),     # full from 200 images on: the smallest that fills it
    (lambda n: .0003 + n*1e-5, 80, 512),        # fills slowly: near enough
    (lambda n: .002 + n*1e-5, 80, 1_024),       # never full: the largest that is tried
    (lambda n: .001*n, 80, 32),                 # each image costs the same
    (lambda n: .01*n, 80, 32),                  # slow: it stops after few
    (lambda n: max(.002, n*1e-5), 8, 128),      # 8 GiB free: 128 images
    (lambda n: max(.002, n*1e-5), 1, 16),       # less than the smallest that is tried
    (lambda n: max(.002, n*1e-5), .01, 1),
], ids=['fills', 'slowly', 'never', 'linear', 'slow', 'memory', 'little', 'none'])
def test_batch_size_of_a_card(device_that_takes, seconds, free, expected):
    calls = device_that_takes(seconds, free)
    assert core.best_batch_size('cuda') == expected
    assert sum(map(seconds, calls)) < .5 + 2*seconds(32)
    n = len(calls)
    assert core.best_batch_size(torch.device('cuda', 0)) == expected and len(calls) == n, 'measured again'
    assert core.best_batch_size('cuda', (192, 192)) == max(1, expected//4) and len(calls) == n
