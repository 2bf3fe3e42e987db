"""What tools/00_many_maps cannot show: maps of processes that are killed, and of two at once, are those of one left alone;
what has no recipe is refused before anything is explained."""
import functools, os, signal, subprocess, sys, time

import h5py
import numpy as np
import pytest
import torch

from conftest import ROOT, python, run
from pcam_tp.data import open_splits, subset
from pcam_tp.many_maps import write_maps
from pcam_tp.methods import METHODS
from pcam_tp.models import build
from pcam_tp.questions import explainer

SCRIPT = '''
import sys, captum.attr, torch
torch.set_num_threads(1)
from pcam_tp.data import open_splits, subset
from pcam_tp.methods import METHODS, from_captum
from pcam_tp.many_maps import write_maps
from pcam_tp.models import build
from pcam_tp.questions import explainer
split = subset(open_splits()[2], 60)
FACTORS = {'one', 'two', 'three', 'four'}   # in another order in every process
@explainer(signed=True, source='mine')
def mine(q): return q.x.mean(1)*len(FACTORS | {'five', 'six', 'seven'})
methods = dict(gradcam=METHODS['gradcam'], smooth=METHODS['smoothgrad'].using(n_samples=4), mine=mine,
               ig=from_captum(captum.attr.IntegratedGradients, n_steps=2))
print(write_maps(build('small_cnn', width=.1), split, methods, sys.argv[1], chunk=6, batch_size=8))
'''


def content(index):
    names = 'maps/gradcam', 'maps/smooth', 'maps/mine', 'maps/ig', 'target', 'score', 'row'
    with h5py.File(index) as f: return {n: f[n][:] for n in names}


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


def test_what_has_no_recipe_is_refused():
    generator, model, split = np.random.default_rng(0), build('small_cnn', width=.1), subset(open_splits()[2], 4)
    passed = []
    hook = model.register_forward_hook(lambda *a: passed.append(1))   # a hook that encloses a list is part of the network
    for chosen, word in ((dict(a=explainer(signed=True, source='mine')(lambda q: generator.random()*q.x[:, 0])), 'no description'), ({'a/b': METHODS['gradcam']}, 'slash'), ({'.': METHODS['gradcam']}, 'slash'),
                         (dict(a=functools.partial(METHODS['gradcam'], layer='net.conv1')), '@explainer'),
                         (dict(a=METHODS['occlusion'].using(baseline=torch.rand(4, 3, 96, 96))), 'each patch'),
                         (dict(a=METHODS['lime'].using(segmentation=torch.zeros(4, 96, 96).long())), 'each patch')):
        with pytest.raises(ValueError, match=word): write_maps(model, split, chosen, '/nowhere')
    assert len(passed) <= 1, 'one pass names the classes; nothing was explained'
    hook.remove()
