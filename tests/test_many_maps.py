"What tools/00_many_maps cannot show: maps written by processes that are killed, and by two at once, are the maps of one that was left alone."
import os, signal, subprocess, sys, time

import h5py
import numpy as np

from conftest import ROOT, python, run

SCRIPT = '''
import sys, torch
torch.set_num_threads(1)
from pcam_tp.data import open_splits, subset
from pcam_tp.methods import METHODS
from pcam_tp.many_maps import write_maps
from pcam_tp.models import build
split = subset(open_splits()[2], 60)
methods = dict(gradcam=METHODS['gradcam'], smooth=METHODS['smoothgrad'].using(n_samples=4))
print(write_maps(build('small_cnn', width=.1), split, methods, sys.argv[1], chunk=6, batch_size=8))
'''


def content(index):
    with h5py.File(index) as f: return {n: f[n][:] for n in ('maps/gradcam', 'maps/smooth', 'target', 'score', 'row')}


def equal(a, b): return all(np.allclose(a[k], b[k], rtol=1e-4, atol=1e-6) for k in a)


def test_killed_and_shared(tmp_path):
    python(SCRIPT, tmp_path/'whole')
    whole, kills = content(tmp_path/'whole'/'maps.h5'), 0
    while not (tmp_path/'cut'/'maps.h5').exists():
        before = len(list((tmp_path/'cut').glob('chunk-*.h5')))
        p = subprocess.Popen([sys.executable, '-c', SCRIPT, str(tmp_path/'cut')], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while p.poll() is None and len(list((tmp_path/'cut').glob('chunk-*.h5'))) < before + 3: time.sleep(.01)
        if p.poll() is None: p.send_signal(signal.SIGKILL); kills += 1
        p.wait()
    assert kills >= 2, 'it was never interrupted'
    assert equal(whole, content(tmp_path/'cut'/'maps.h5'))

    script = tmp_path/'share.py'
    script.write_text(SCRIPT)
    run(sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', script, tmp_path/'shared',
        env={**os.environ, 'ACCELERATE_USE_CPU': '1'})
    assert equal(whole, content(tmp_path/'shared'/'maps.h5'))
    assert not [f for f in (tmp_path/'shared').iterdir() if f.name.startswith('.')]
