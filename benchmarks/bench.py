"""Our work beside the peers': `python benchmarks/bench.py [--repeats 5] [--only NAME]`.

Each number is the median of interleaved repeats, and each repeat of each arm runs in a fresh process.
Prints a table and writes benchmarks/results.json; with --only, the rows that it measured. Ratios can be compared between machines, seconds cannot.
"""
import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import pandas as pd

from pcam_tp.core import atomic, progress

HERE = Path(__file__).parent
# name, work, our arm, peer, the peer's arm, target: how many times as fast as the peer
CASES = [
    ('batches', '6,000 patches, shuffled float32 batches of 64', 'batches_ours', 'torchvision.datasets.PCAM', 'batches_torchvision', 50),
    ('batches', '6,000 patches, shuffled float32 batches of 64', 'batches_ours', 'array in memory', 'batches_ram', .8),
    ('subset', '2,000 of 20,000 patches, one piece', 'cut_contiguous_ours', 'one by one into gzip', 'cut_contiguous_one_by_one', 2),
    ('subset', '2,000 of 20,000 patches, gzip, one a chunk', 'cut_rows_ours', 'one by one into gzip', 'cut_rows_one_by_one', 4),
    ('subset', "2,000 of 20,000 patches, gzip, h5py's chunks", 'cut_blocks_ours', 'whole array, then index', 'cut_blocks_whole', 1.5),
    ('subset', "2,000 of 20,000 patches, gzip, h5py's chunks", 'cut_blocks_ours', 'one pass by h5py, no output', 'cut_blocks_pass', 1/1.15),
    ('subset', "2,000 of 20,000 patches, gzip, h5py's chunks", 'cut_blocks_ours', 'one by one into gzip (from 20)', 'cut_blocks_one_by_one', None),
    ('training step, fp32', 'small_cnn, batch of 64', 'step_small_cnn_fp32', 'plain loop, fp32', 'step_small_cnn_plain', None),
    ('training step, defaults', 'small_cnn, batch of 64', 'step_small_cnn_default', 'plain loop, fp32', 'step_small_cnn_plain', 5),
    ('training step, fp32', 'resnet18, batch of 64', 'step_resnet18_fp32', 'plain loop, fp32', 'step_resnet18_plain', None),
    ('training step, defaults', 'resnet18, batch of 64', 'step_resnet18_default', 'plain loop, fp32', 'step_resnet18_plain', 1.8),
    ('four CAMs, fp32', 'small_cnn, 32 patches', 'cam_small_cnn_ours', 'grad-cam, one patch at a time', 'cam_small_cnn_single', 10),
    ('four CAMs, fp32', 'small_cnn, 32 patches', 'cam_small_cnn_ours', 'grad-cam, batch of 32', 'cam_small_cnn_batch', 6),
    ('four CAMs, fp32', 'resnet18, 32 patches', 'cam_resnet18_ours', 'grad-cam, one patch at a time', 'cam_resnet18_single', 10),
    ('four CAMs, fp32', 'resnet18, 32 patches', 'cam_resnet18_ours', 'grad-cam, batch of 32', 'cam_resnet18_batch', 6)] + [
    (f'{title}, {column}', f'{model}, {images}', f'{method}_{model}_{ours}', peer, f'{method}_{model}_{theirs}', target)
    for method, title, images, library in (('integrated_gradients', 'IG of 50 steps', '2 patches', 'captum'), ('smoothgrad', 'SmoothGrad of 25', '2 patches', 'captum'),
                                           ('occlusion', 'occlusion 16/8', '2 patches', 'captum'), ('lime', 'LIME of 1,000', '1 patch', 'lime'))
    for model, slowest, fast in (('small_cnn', 1.5, 5), ('resnet18', 1, None))
    for column, ours, peer, theirs, target in (('fp32', 'ours', f'{library}, batches of 32', 'same', slowest), ('defaults', 'ours', f'{library}, defaults', 'library', None),
                                               ('fast', 'fast', f'{library}, defaults', 'library', fast), ('fp32', 'ours', 'bare passes, best batch', 'bare', 1/1.15))]


def measure(arm):
    "Seconds of one arm in a fresh process."
    done = subprocess.run([sys.executable, HERE/'arms.py', arm], capture_output=True, text=True)
    if done.returncode: sys.exit(f'{arm} failed:\n{done.stderr[-2000:]}')
    return float(done.stdout.split()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--repeats', type=int, default=5, help='interleaved repeats of every arm')
    parser.add_argument('--only', default='', help='cases whose name or work contains this')
    args = parser.parse_args()
    cases = [c for c in CASES if args.only in c[0] or args.only in c[1]]
    if not cases: sys.exit(f'--only {args.only!r} matches no case; names: {", ".join(sorted({c[0] for c in CASES}))}')
    arms = list(dict.fromkeys(a for c in cases for a in (c[2], c[4])))
    times = {a: [] for a in arms}
    for a in progress([a for _ in range(args.repeats) for a in arms], 'benchmark'): times[a].append(measure(a))
    rows = []
    for name, work, ours, peer, theirs, target in cases:
        o, p = statistics.median(times[ours]), statistics.median(times[theirs])
        limit = p/target if target else None
        rows.append(dict(name=name, work=work, ours_s=o, peer=peer, peer_s=p, ratio=p/o, limit_s=limit, over_limit=bool(limit and o > limit)))
    print(pd.DataFrame(rows).to_string(index=False, float_format='{:.3g}'.format, na_rep='–'))
    print(f'medians of {args.repeats} interleaved repeats; ratio = peer_s / ours_s; limit_s = peer_s / target')
    write(rows)


def write(rows):
    "Put `rows` into results.json, in the order of CASES; rows that were not measured this time keep their figures."
    key = lambda r: (r['name'], r['work'], r['peer'])
    file = HERE/'results.json'
    known = {key(r): r for r in (json.loads(file.read_text()) if file.exists() else []) + rows}
    kept = [known[k] for name, work, _, peer, *_ in CASES if (k := (name, work, peer)) in known]
    with atomic(file) as tmp: tmp.write_text(json.dumps(kept, indent=1) + '\n')


if __name__ == '__main__':
    main()
