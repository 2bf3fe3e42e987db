#!/usr/bin/env python3
"""Run the notebooks, each in a fresh Jupyter kernel of this very interpreter: the course, then foundation, then tools.

    python scripts/run.py                  all of nbs/, two side by side, each with half of the processor's threads
    python scripts/run.py 03 07 core       some: number, name, glob or path; the course's own come first
    python scripts/run.py foundation/03 'tools/*'
    python scripts/run.py --jobs 1         one at a time
    python scripts/run.py --out DIR        keep the executed copies
    python scripts/run.py --refresh        write the outputs back into nbs/ (embedded data only; needs nbdev)

PCAM_TP_SOURCE, PCAM_TP_BUDGET and PCAM_TP_HOME reach the notebooks. Cells that begin with `#| notest`, `#| slow`,
`#| gpu`, `#| colab` (tst_flags of settings.ini) or `#| eval: false` are skipped, as nbdev_test skips them;
`--flags slow` runs those too.
Exit status: 0 all ran, 1 a notebook failed, 2 wrong use, 130 interrupted.
"""
import argparse, asyncio, json, os, re, shutil, signal, subprocess, sys, time
from collections import Counter, deque
from configparser import ConfigParser
from fnmatch import fnmatch
from pathlib import Path

import nbformat
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

ROOT = Path(__file__).resolve().parent.parent
EMBEDDED = 'synthetic-quick'   # core.run_name() of the embedded data: the run whose outputs are committed
FOLDERS = '', 'foundation', 'tools'   # of nbs/, in the order of running; others follow
README_FIGURES = ['03_gradcam_methods.png']   # --refresh copies them from figures/<run>/ to figures/
# log level 40 would show what a kernel says that is ended while it answers
KERNEL_ARGS = ['--HistoryManager.hist_file=:memory:', '--IPKernelApp.log_level=50']
SOURCE = os.environ.get('PCAM_TP_SOURCE') or os.environ.get('PCAM_TP_ASSETS') or 'synthetic'
BUDGET = os.environ.get('PCAM_TP_BUDGET') or ('quick' if SOURCE == 'synthetic' else 'full')   # as pcam_tp.core has it
# These work for minutes: all threads, and nothing beside them.
ALONE = {'01_models', '02_training'} | ({'08_all_methods', '16_many_runs'} if BUDGET == 'full' else set())
CORES = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
TTY = sys.stdout.isatty()


class Interrupted(Exception): "Ctrl-C or a polite kill."


class Kernel(AsyncKernelManager):
    "A kernel of the running interpreter, whatever other 'python3' kernels the user has."
    @property
    def kernel_spec(self):
        return KernelSpec(argv=[sys.executable, '-m', 'ipykernel_launcher', '-f', '{connection_file}'],
                          display_name='python3', language='python')


def skip_flags():
    "The cell directives that are not run, from settings.ini."
    cfg = ConfigParser(interpolation=None)
    cfg.read(ROOT/'settings.ini', encoding='utf-8')
    return set(cfg['DEFAULT'].get('tst_flags', '').split())


def skipped(cell, flags):
    "Does the code `cell` begin with a directive of `flags`, or with `#| eval: false`?"
    for line in cell.source.splitlines():
        m = re.match(r'\s*#\s*\|\s*(\w+):?\s*(\w*)', line)
        if not m:
            if line.strip(): return False
        elif m[1] in flags or (m[1], m[2].lower()) == ('eval', 'false'): return True
    return False


def code_cells(nb, flags):
    "Index and cell of the code cells that a run executes."
    runs = lambda c: c.cell_type == 'code' and c.source.strip() and not skipped(c, flags)
    return [(i, c) for i, c in enumerate(nb.cells) if runs(c)]


class Job:
    "A notebook that runs: its name, the cell it has reached, since when."
    def __init__(self, head, total): self.head, self.total, self.k, self.start = head, total, 0, time.monotonic()
    def __str__(self): return f'{self.head} … {self.k}/{self.total} {duration(time.monotonic() - self.start)}'


class Board:
    "One line a notebook when it has ended; on a terminal a last line that ticks with those that run."
    def __init__(self): self.jobs, self.stopped = [], False

    def tick(self):
        if not TTY: return
        line = ' '.join(map(str, self.jobs))[:shutil.get_terminal_size().columns - 1]
        print(f'\r\033[K{line}', end='', flush=True)

    def end(self, job, word):
        self.jobs.remove(job)
        print('\r\033[K'*TTY + f'{job.head} … {duration(time.monotonic() - job.start)} {word}', flush=True)
        self.tick()

    async def ticking(self):
        while TTY:
            self.tick()
            await asyncio.sleep(1)


def duration(s): return f'{s:.1f} s' if s < 100 else f'{int(s)//60} min {int(s)%60:02} s'


def kernel_env(threads):
    "The environment of a kernel: this repository's library first, and switches that mean the same in nbs/ as here."
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))}
    env.pop('MPLBACKEND', None)   # Jupyter sets its own: figures land in the notebook
    env.setdefault('OMP_NUM_THREADS', str(threads))
    env.setdefault('PYDEVD_DISABLE_FILE_VALIDATION', '1')   # a debugger's remark about frozen modules
    if env.get('PCAM_TP_HOME'): env['PCAM_TP_HOME'] = os.path.abspath(env['PCAM_TP_HOME'])
    if os.path.isdir(env.get('PCAM_TP_SOURCE', '')): env['PCAM_TP_SOURCE'] = os.path.abspath(env['PCAM_TP_SOURCE'])
    return env


async def execute(nb, cells, folder, job, timeout, threads):
    "Run `cells` of `nb` in a new kernel that works in `folder`; the kernel is gone afterwards, whatever happens."
    km = Kernel()
    client = NotebookClient(nb, km=km, timeout=timeout, startup_timeout=120)
    try:
        await km.start_kernel(cwd=str(folder), env=kernel_env(threads), extra_arguments=KERNEL_ARGS)
        await client.async_start_new_kernel_client()
        for job.k, (i, cell) in enumerate(cells, 1):
            try: await client.async_execute_cell(cell, i)
            except Exception as e:
                e.where = f'code cell {job.k} of {len(cells)} (cell {i + 1} of {len(nb.cells)} in the notebook)'
                e.source = cell.source
                e.error = next((o for o in cell.outputs if o.output_type == 'error'), {})
                raise
    finally:
        if client.kc is not None: client.kc.stop_channels()
        if km.has_kernel: await km.shutdown_kernel()   # interrupts, asks, and kills after 5 s


def explain(name, e):
    "What a reader needs to find the fault: notebook, cell, source and the end of the traceback."
    if isinstance(e, CellExecutionError): text = '\n'.join(e.error.get('traceback', [])) or f'{e.ename}: {e.evalue}'
    elif isinstance(e, CellTimeoutError): text = 'The cell took longer than --timeout allows.'
    elif isinstance(e, DeadKernelError): text = 'The kernel died: out of memory, or killed from outside.'
    else: text = f'{type(e).__name__}: {e}'
    text = re.sub(r'^-{30,}$', '', re.sub(r'\x1b\[[0-9;]*m', '', text), flags=re.M).strip().splitlines()
    source = getattr(e, 'source', '').strip().splitlines()
    source = source[:8] + ['…']*(len(source) > 8)
    where = getattr(e, 'where', 'the kernel did not start')
    indented = lambda lines: ['    ' + l for l in lines]
    return '\n'.join([f'\n{name}, {where}:', *indented(source), 'fails with', *indented(text[-14:]), ''])


# ── what is written back ────────────────────────────────────────────────────────────────────────────────────────────
def stable(outputs, old):
    "`outputs` without what changes from run to run: stderr, bars, widgets, counts; timings alone are no change."
    res = []
    for o in outputs:
        if o.get('name') == 'stderr' or 'application/vnd.jupyter.widget-view+json' in o.get('data', {}): continue
        o = nbformat.from_dict(o)
        if o.output_type == 'execute_result': o.execution_count = None
        if o.output_type == 'stream':
            o.text = re.sub(r'[^\n]*\r(?!\n)', '', o.text)
            if not o.text.strip(): continue
        res.append(o)
    return old if masked(old) == masked(res) else res


def masked(outputs):
    "`outputs` as text, with durations and addresses blanked."
    text = json.dumps(outputs, sort_keys=True, ensure_ascii=False)
    return re.sub(r'\b\d[\d.,]*(?= ?(?:µs|ms|s|min|h)\b)|(?<= at )0x[0-9a-f]+', '#', text)


def write_back(path, before, nb, cells):
    "Put the outputs of `cells` into the notebook at `path`, if it still is as it was `before`."
    if path.read_bytes() != before: return 'ok, NOT written back: the file changed meanwhile'
    new = nbformat.reads(before.decode(), as_version=4)
    for i, cell in cells: new.cells[i].outputs = stable(cell.outputs, new.cells[i].outputs)
    for c in new.cells:
        c.pop('execution_count', None)
        if c.cell_type == 'code': c.execution_count = None
    tmp = path.with_suffix('.tmp')
    try:
        tmp.write_text(nbformat.writes(new).rstrip('\n') + '\n', encoding='utf-8')
        os.replace(tmp, path)
    finally: tmp.unlink(missing_ok=True)
    clean = 'import sys; from nbdev.clean import nbdev_clean; nbdev_clean(sys.argv[1])'
    subprocess.run([sys.executable, '-c', clean, str(path)], cwd=ROOT, check=True)
    return 'ok' if path.read_bytes() == before else 'ok, refreshed'


def copy_figures(home):
    "Copy the README's figures from the run's folder to figures/; the names of those that are missing."
    run, missing = home/'figures'/EMBEDDED, []
    for name in README_FIGURES:
        if not (run/name).exists(): missing.append(name); continue
        (ROOT/'figures').mkdir(exist_ok=True)
        shutil.copyfile(run/name, ROOT/'figures'/f'{name}.tmp')
        os.replace(ROOT/'figures'/f'{name}.tmp', ROOT/'figures'/name)
    print(f'figures/: {len(README_FIGURES) - len(missing)} of {len(README_FIGURES)} figures for README.md')
    if missing: print(f'not found in {shown(run)}: {", ".join(missing)}')
    return missing


# ── what a run made ─────────────────────────────────────────────────────────────────────────────────────────────────
def shown(path):
    "`path` relative to the working folder where that is shorter."
    rel = os.path.relpath(path)
    return f'{path if rel.startswith("..") else rel}/'


def made(home, start):
    "One line for each folder with files newer than `start`: figures and tables of the run, models, data."
    kinds = {'.png': 'figure', '.csv': 'table', '.safetensors': 'model', '.h5': 'HDF5 file', '.html': 'page'}
    found = {}
    for top in ('figures', 'data'):
        for p in sorted((home/top).rglob('*')):
            try: new = p.is_file() and not p.name.startswith('.') and p.stat().st_mtime >= start
            except OSError: continue
            if new and p.suffix in kinds: found.setdefault(p.parent, Counter())[kinds[p.suffix]] += 1
    for folder, n in found.items():
        yield f'{shown(folder):32} ' + ', '.join(f'{v} {k}{"s"*(v > 1)}' for k, v in n.items())


# ── command line ────────────────────────────────────────────────────────────────────────────────────────────────────
def notebooks(folder=ROOT/'nbs'):
    "{name: path} of the notebooks below `folder` in the order of running: '03_gradcam', 'foundation/03_download' …"
    paths = {p.relative_to(folder).with_suffix('').as_posix(): p for p in folder.rglob('*.ipynb')}
    hidden = lambda name: any(part.startswith(('_', '.')) for part in name.split('/'))
    order = lambda name: (FOLDERS.index(f) if (f := folder_of(name)) in FOLDERS else len(FOLDERS), name)
    return {name: paths[name] for name in sorted(paths, key=order) if not hidden(name)}


def folder_of(name): return name.rpartition('/')[0]


def meant(word, names):
    "Which of `names` a number, name or glob means; without a folder, those of the first folder that has any."
    folder, _, word = word.removesuffix('.ipynb').rpartition('/')
    hits = [n for n in names if fnmatch(stem := n.rpartition('/')[2], word) or word in stem.partition('_')[::2]]
    return [n for n in hits if fnmatch(folder_of(n), folder or folder_of(hits[0]))]


def chosen(folder, words):
    "{name: path} of the notebooks of `folder` that `words` mean, in order; all without words."
    every = notebooks(folder)
    if not every: sys.exit(f'no notebooks in {folder}')
    paths = {p: n for n, p in every.items()}
    hits = {w: [n] if (n := paths.get(Path(w).resolve())) else meant(w, every) for w in words}
    lost = [w for w, h in hits.items() if not h]
    if lost: raise ValueError(f'no notebook called {", ".join(lost)}; there are {", ".join(every)}')
    return {n: p for n, p in every.items() if not words or any(n in h for h in hits.values())}


async def run_one(a, name, flags, board, head, threads):
    "Run the notebook called `name` and say how it ended; the error that stopped it, if any."
    path = a.notebooks[name]
    before = path.read_bytes()
    nb = nbformat.reads(before.decode(), as_version=4)
    cells = code_cells(nb, flags)
    rest = sum(c.cell_type == 'code' and skipped(c, flags) for c in nb.cells)
    job, error = Job(head, len(cells)), None
    board.jobs.append(job)
    try: await execute(nb, cells, path.parent, job, a.timeout, threads)
    except asyncio.CancelledError: error = Interrupted()
    except Exception as e: error = Interrupted() if board.stopped else e   # nbclient calls a cancellation "Kernel died"
    if a.out:
        copy = a.out/f'{name}.ipynb'
        copy.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(nb, copy)
    if error is None:
        word = write_back(path, before, nb, cells) if a.refresh else 'ok'
        board.end(job, word + (f' ({rest} cell{"s"*(rest > 1)} skipped)' if rest else ''))
    elif isinstance(error, Interrupted): board.end(job, f'interrupted in code cell {job.k} of {job.total}')
    else:
        board.end(job, 'FAILED')
        print(explain(f'{name}.ipynb', error), flush=True)
    return error


async def run_all(a, flags):
    "Run all of `a.notebooks`, up to `a.jobs` at once; the names of those that failed, and how many were tried."
    loop, board, failed, n = asyncio.get_running_loop(), Board(), [], len(a.notebooks)
    waiting, running = deque(enumerate(a.notebooks, 1)), {}   # running: {task: name}
    def stop():
        board.stopped = True
        for task in running: task.cancel()
    for s in (signal.SIGINT, signal.SIGTERM): loop.add_signal_handler(s, stop)
    def may_start():
        if board.stopped or not waiting or (failed and not a.keep_going): return False
        return not running or len(running) < a.jobs and not ALONE & {waiting[0][1], *running.values()}
    ticker = asyncio.ensure_future(board.ticking())
    while may_start() or running:
        while may_start():
            k, name = waiting.popleft()
            threads = CORES if name in ALONE else max(1, CORES//a.jobs)
            running[asyncio.ensure_future(run_one(a, name, flags, board, f'[{k:2}/{n}] {name}', threads))] = name
        for task in (await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED))[0]:
            name, error = running.pop(task), task.result()
            if error is not None: failed.append(name)
    ticker.cancel()
    if board.stopped: raise Interrupted
    return failed, n - len(waiting)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('names', nargs='*', metavar='NOTEBOOK', help='number, name, glob or path; all of them without')
    p.add_argument('--keep-going', action='store_true', help='go on after a notebook that failed')
    p.add_argument('--refresh', action='store_true', help='write the outputs back, cleaned, and copy figures')
    p.add_argument('--jobs', type=int, metavar='N',
                   help='notebooks at once (default: 2 where there are two cores; 1 with --refresh)')
    p.add_argument('--out', type=Path, metavar='DIR', help='folder for the executed copies')
    p.add_argument('--timeout', type=float, metavar='S', help='seconds that one cell may take (default: no limit)')
    p.add_argument('--flags', default='', help='skipped kinds of cells to run all the same, such as "slow gpu"')
    p.add_argument('--nbs', type=Path, default=ROOT/'nbs', metavar='DIR', help='where they are (default: nbs/)')
    a = p.parse_args()
    try: a.notebooks = chosen(a.nbs.resolve(), a.names)
    except ValueError as e: p.error(str(e))
    if a.jobs is None: a.jobs = 1 if a.refresh or CORES < 2 else 2
    if a.jobs < 1: p.error(f'--jobs {a.jobs}: at least 1')
    a.jobs = min(a.jobs, len(a.notebooks))
    if a.refresh:
        import importlib.util
        if importlib.util.find_spec('nbdev') is None: p.error('--refresh needs nbdev: pip install -e .[dev]')
        for k, v in {'PCAM_TP_SOURCE': 'synthetic', 'PCAM_TP_BUDGET': 'quick'}.items():
            if os.environ.setdefault(k, v) != v:
                p.error(f'{k}={os.environ[k]}: committed outputs come from the embedded data; unset it')
    home = Path(os.environ.get('PCAM_TP_HOME') or (ROOT if a.nbs.resolve().is_relative_to(ROOT) else a.nbs))
    start, clock, failed, ran, code = time.time(), time.monotonic(), [], 0, 0
    signal.signal(signal.SIGINT, signal.default_int_handler)   # a shell ignores it for background jobs
    try:
        failed, ran = asyncio.run(run_all(a, skip_flags() - set(a.flags.split())))
        code = int(bool(failed))
    except (Interrupted, KeyboardInterrupt):
        print('interrupted: no kernel is left, finished notebooks keep what they made')
        return 130
    lines = list(made(home, start))
    print('\nnew files:', *lines, sep='\n  ') if lines else print('\nno new files in figures/ and data/')
    if a.refresh and not failed and copy_figures(home) and not a.names: code = 1
    left = len(a.notebooks) - ran
    print(f'{ran - len(failed)} of {len(a.notebooks)} notebooks ran in {duration(time.monotonic() - clock)}'
          + (f'; failed: {", ".join(failed)}' if failed else '')
          + (f'; {left} not tried (--keep-going tries them)' if left else ''))
    return code


if __name__ == '__main__': sys.exit(main())
