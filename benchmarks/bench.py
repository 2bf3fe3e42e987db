"""Our work beside the peers', or beside an older checkout of this project.

Each number is the median of interleaved repeats, and each repeat of each arm runs in a fresh process (arms.py).
Prints a table and keeps its rows, by device, in benchmarks/results.json; rows that were not measured keep their
figures. Ratios can be compared between machines, seconds cannot. A quiet machine, please.

examples
  python benchmarks/bench.py                                 all that this machine's best device can do
  python benchmarks/bench.py --device cpu --only IG resnet18
  python benchmarks/bench.py --device cuda --repeats 1 --only occlusion bare
  git worktree add /tmp/before HEAD~20
  python benchmarks/bench.py --device cpu --against /tmp/before    is a row of ours slower than it was?
"""
import argparse
import json
import os
import subprocess
import sys
from collections import namedtuple
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import pandas as pd

from arms import BUDGETS, DEVICES, NETWORKS, sizes
from pcam_tp.core import atomic, best_device, progress

HERE = Path(__file__).resolve().parent
SLOWER = .97   # --against marks what is not as many times as fast as before
AIM = 3*7_500  # patches a second of small_cnn in training on an H200: three times those of commit 3a0c511
# target: how many times as fast as the peer
Case = namedtuple('Case', 'name work ours peer theirs target')


def data_cases():
    "What no GPU is needed for."
    batches = 'batches', '6,000 patches, shuffled float32 batches of 64', 'batches_ours'
    one_piece, rows, blocks = (f'2,000 of 20,000 patches, {s}' for s in
                               ('one piece', 'gzip, one a chunk', "gzip, h5py's chunks"))
    return [Case(*c) for c in [
        (*batches, 'torchvision.datasets.PCAM', 'batches_torchvision', 50),
        (*batches, 'array in memory', 'batches_ram', .8),
        ('subset', one_piece, 'cut_contiguous_ours', 'one by one into gzip', 'cut_contiguous_one_by_one', 2),
        ('subset', rows, 'cut_rows_ours', 'one by one into gzip', 'cut_rows_one_by_one', 4),
        ('subset', blocks, 'cut_blocks_ours', 'whole array, then index', 'cut_blocks_whole', 1.5),
        ('subset', blocks, 'cut_blocks_ours', 'one pass by h5py, no output', 'cut_blocks_pass', 1/1.15),
        ('subset', blocks, 'cut_blocks_ours', 'one by one into gzip (from 20)', 'cut_blocks_one_by_one', None)]]


def step_cases(device):
    fast = dict(small_cnn=5, resnet18=1.8) if device == 'cpu' else {}
    return [Case(f'training step, {title}', f'{m}, batch of 64', f'step_{m}_{ours}', 'plain loop, fp32',
                 f'step_{m}_plain', target) for m in NETWORKS
            for title, ours, target in (('fp32', 'fp32', None), ('defaults', 'default', fast.get(m)))]


def train_cases():
    steps = BUDGETS['quick']['n_train']//64
    return [Case('training', f'{64*steps:,} patches, small_cnn of the course', 'train_small_cnn',
                 'as many steps on one batch', 'train_small_cnn_bare', None)]


def cam_cases(device):
    "One patch at a time only on the processor: 256 of them on a GPU take a minute and teach nothing."
    peers = [('one patch at a time', 'single', 10)]*(device == 'cpu') + [('batch of 32', 'batch', 6)]
    return [Case('four CAMs, fp32', f'{m}, {sizes(device).patches} patches', f'cam_{m}_ours', f'grad-cam, {peer}',
                 f'cam_{m}_{theirs}', target) for m in NETWORKS for peer, theirs, target in peers]


TITLES = dict(integrated_gradients=('IG of 50 steps', 'captum'), smoothgrad=('SmoothGrad of 25', 'captum'),
              occlusion=('occlusion 16/8', 'captum'), rise=('RISE of 2,000', None), lime=('LIME of 1,000', 'lime'))


def columns(device, model, library):
    "(column, our arm, peer, its arm, target) of one method and network."
    least = None if device == 'mps' else 1/1.15
    bare = 'bare passes, best batch'
    if not library: return [('fp32', 'ours', bare, 'bare', least), ('fast', 'fast', bare, 'bare', None)]
    slowest, fast = (1.5, 5) if model == 'small_cnn' else (1, None)
    default = f'{library}, defaults'
    if device == 'cpu':
        return [('fp32', 'ours', f'{library}, batches of 32', 'same', slowest),
                ('defaults', 'ours', default, 'library', None),
                ('fast', 'fast', default, 'library', fast), ('fp32', 'ours', bare, 'bare', least)]
    return [('defaults', 'ours', default, 'library', 1), ('fp32', 'ours', f'{library}, best batch', 'best', None),
            ('fast', 'fast', default, 'library', None), ('fp32', 'ours', bare, 'bare', least)]


def method_cases(device):
    s = sizes(device)
    n = {m: s.fewer.get(m, s.images) for m in TITLES}
    return [Case(f'{title}, {column}', f'{model}, {n[method]} patch{"es"*(n[method] > 1)}', f'{method}_{model}_{ours}',
                 peer, f'{method}_{model}_{theirs}', target)
            for method, (title, library) in TITLES.items() for model in NETWORKS
            for column, ours, peer, theirs, target in columns(device, model, library)]


def sensitivity_cases(device):
    s = sizes(device)
    return [Case(f'Max-Sensitivity of {s.draws} draws, fp32', f'{m}, gradient, {s.patches} patches', f'sensitivity_{m}_ours',
                 f'captum, {peer}', f'sensitivity_{m}_{theirs}', 1) for m in NETWORKS
            for peer, theirs in (('defaults', 'library'), (f'batches of {s.patches}', 'same'))]


def removal_cases(device):
    s = sizes(device)
    n = 4*s.images if device != 'cpu' else 4
    work, ours = f'small_cnn of the course, {n} patches', 'road_course_ours'
    return [Case('ROAD of 9 shares, fp32', work, ours, 'grad-cam, ROADCombined', 'road_course_library', 5),
            Case('ROAD of 9 shares, fp32', work, ours, 'bare passes, best batch', 'road_course_bare', None)]


def curve_cases(device):
    s, quantus = sizes(device), 'Quantus, PixelFlipping'
    return [Case(f'{name}, fp32', f'{model}, {s.images} patches, {steps} steps', f'{arms}_{model}_ours', peer,
                 f'{arms}_{model}_{theirs}', target) for model in NETWORKS
            for name, steps, arms, peer, theirs, target in (
                ('insertion + deletion', s.curve, 'curves', 'one pass at a time', 'loop', 1.5),
                ('insertion + deletion', s.curve, 'curves', 'bare passes, best batch', 'bare', 1/1.15),
                ('deletion', s.flips, 'flips', quantus, 'quantus', 4))]


def cases(device):
    "Everything that is measured on a device."
    data, train = (data_cases(), []) if device == 'cpu' else ([], train_cases())
    metrics = curve_cases(device) + removal_cases(device) + sensitivity_cases(device)
    return data + train + step_cases(device) + cam_cases(device) + method_cases(device) + metrics


def measure(checkout, arm, options):
    "Seconds of one arm of a checkout, with its own library, in a fresh process."
    path = os.pathsep.join(filter(None, [str(checkout), os.environ.get('PYTHONPATH')]))
    command = [sys.executable, checkout/'benchmarks'/'arms.py', arm, *options]
    env = os.environ | dict(PYTHONPATH=path)
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=HERE.parent)   # one data/ for both
    if done.returncode: sys.exit(f'{arm} of {checkout} failed:\n{done.stderr[-2000:]}')
    return float(done.stdout.split()[-1])


def rounds(pairs, repeats, options):
    """After each round the seconds of every (checkout, arm) so far; every other round runs backwards. Ctrl-C ends with
    the whole rounds."""
    times = {p: [] for p in pairs}
    with progress(total=repeats*len(pairs), desc='benchmark', unit='arm') as bar:
        for whole in range(repeats):
            try:
                for p in pairs:
                    times[p].append(measure(*p, options))
                    bar.update()
            except KeyboardInterrupt:
                if not whole: raise
                for t in times.values(): del t[whole:]
                return
            pairs = pairs[::-1]
            yield times


def repeated(times): return min(map(len, times.values()))


def beside_peers(chosen, args, options):
    "Measure and print; the rows are kept after each round, unless they mean nothing."
    pairs = [(HERE.parent, arm) for arm in dict.fromkeys(a for c in chosen for a in (c.ours, c.theirs))]
    for times in rounds(pairs, args.repeats, options):
        took = {arm: median(times[HERE.parent, arm]) for _, arm in pairs}
        found = [row(args.device, c, took) for c in chosen]
        if not args.quick: write(found)
    show(found)
    print(f'medians of {repeated(times)} interleaved repeats; ratio = peer_s / ours_s; limit_s = peer_s / target')
    if 'train_small_cnn' in took and not args.quick:
        rate = 64*(BUDGETS['quick']['n_train']//64)/took['train_small_cnn']
        print(f'training: {rate:,.0f} patches of small_cnn a second; the aim on an H200 is {AIM:,}')


def row(device, case, took):
    ours, peer = took[case.ours], took[case.theirs]
    limit = peer/case.target if case.target else None
    return dict(device=device, name=case.name, work=case.work, ours_s=ours, peer=case.peer, peer_s=peer,
                ratio=peer/ours, limit_s=limit, over_limit=bool(limit and ours > limit))


def against(before, chosen, args, options):
    "Print how many times as fast as in another checkout each of our arms is, and the range over the repeats."
    known, ours = arms_of(before), list(dict.fromkeys(c.ours for c in chosen))
    new, ours = [a for a in ours if a not in known], [a for a in ours if a in known]
    if not ours: sys.exit(f'{before} has none of these arms')
    pairs = [(checkout, a) for a in ours for checkout in (before, HERE.parent)]
    for times in rounds(pairs, args.repeats, options): pass
    def compared(a):
        old, new = times[before, a], times[HERE.parent, a]
        each = [o/n for o, n in zip(old, new)]
        ratio = median(old)/median(new)
        return dict(arm=a, before_s=median(old), now_s=median(new), ratio=ratio, lowest=min(each), highest=max(each),
                    slower=ratio < SLOWER)
    show([compared(a) for a in ours])
    print(f'medians of {repeated(times)} interleaved repeats; ratio = before_s / now_s, with the lowest and highest of a '
          f'repeat; slower: ratio below {SLOWER}')
    if new: print(f'not there before: {", ".join(new)}')


def arms_of(checkout):
    "Names of a checkout's arms."
    code = 'import sys; sys.path[:0] = sys.argv[1:]; import arms; print(*arms.ARMS)'
    done = subprocess.run([sys.executable, '-c', code, checkout, checkout/'benchmarks'], capture_output=True, text=True)
    if done.returncode: sys.exit(f'no arms in {checkout}:\n{done.stderr[-2000:]}')
    return done.stdout.split()


def show(rows): print(pd.DataFrame(rows).to_string(index=False, float_format='{:.3g}'.format, na_rep='–'))


def merged(known, new):
    "The rows of `new`, and those of `known` that are still measured, by device and in the order of the cases."
    rows = {(r['device'], r['name'], r['work'], r['peer']): r for r in known + new}
    keys = [(device, c.name, c.work, c.peer) for device in DEVICES for c in cases(device)]
    return [rows[k] for k in keys if k in rows]


def write(rows):
    "Put `rows` into results.json."
    file = HERE/'results.json'
    known = json.loads(file.read_text()) if file.exists() else []
    with atomic(file) as tmp: tmp.write_text(json.dumps(merged(known, rows), indent=1) + '\n')


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', choices=DEVICES, default=best_device().type, help='the best there is by default')
    parser.add_argument('--repeats', type=int, default=5, help='interleaved repeats of every arm')
    parser.add_argument('--only', nargs='+', default=[], metavar='WORD',
                        help='cases whose name, work or peer contains each of these')
    parser.add_argument('--against', type=Path, metavar='DIR', help='another checkout, in place of the peers')
    parser.add_argument('--quick', action='store_true', help='hardly any work: shows that arms run, keeps nothing')
    args = parser.parse_args()
    if args.repeats < 1: parser.error(f'--repeats {args.repeats}: expected at least 1')
    return args


def main():
    args = arguments()
    options = ['--device', args.device, *['--quick']*args.quick]
    fits = lambda c: all(w.lower() in f'{c.name} {c.work} {c.peer}'.lower() for w in args.only)
    chosen = [c for c in cases(args.device) if fits(c)]
    if not find_spec('quantus'):
        left = [c for c in chosen if c.peer.startswith('Quantus')]
        if left: print(f'{len(left)} rows beside Quantus are left out: it is not installed, and no requirement')
        chosen = [c for c in chosen if c not in left]
    if not chosen:
        names = ', '.join(dict.fromkeys(c.name for c in cases(args.device)))
        sys.exit(f'--only {" ".join(args.only)} matches no case of {args.device}; names: {names}')
    if not args.against: return beside_peers(chosen, args, options)
    before = args.against.resolve()
    file = before/'benchmarks'/'arms.py'
    if not file.exists(): sys.exit(f'--against {args.against}: there is no {file}')
    if (args.quick or args.device != 'cpu') and '--device' not in file.read_text():
        sys.exit(f'--against {args.against}: its arms run on the processor only, in full; use --device cpu')
    against(before, chosen, args, options)


if __name__ == '__main__':
    main()
