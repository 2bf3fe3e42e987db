"""What tools/00_many_maps cannot show: maps of processes that are killed, and of two at once, are those of one left alone;
what has no recipe is refused before anything is explained."""
import functools, os, signal, subprocess, sys, time

import h5py
import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from conftest import ROOT, python, run
from pcam_tp.classifier import predict
from pcam_tp.data import open_split, open_splits, subset, to_float
from pcam_tp.many_maps import read_maps, split_leaderboard, write_maps
from pcam_tp.methods import METHODS
from pcam_tp.models import build
from pcam_tp.questions import explainer
from pcam_tp.release import raw_file
from pcam_tp.synthetic import write_synthetic

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
    predict(model, to_float(split.patches([0])))   # names the classes, and looks at the network once
    passed = []
    hook = model.register_forward_hook(lambda *a: passed.append(1))   # a hook that encloses a list is part of the network
    for chosen, word in ((dict(a=explainer(signed=True, source='mine')(lambda q: generator.random()*q.x[:, 0])), 'no description'), ({'a/b': METHODS['gradcam']}, 'slash'), ({'.': METHODS['gradcam']}, 'slash'),
                         (dict(a=functools.partial(METHODS['gradcam'], layer='net.conv1')), '@explainer'),
                         (dict(a=METHODS['occlusion'].using(baseline=torch.rand(4, 3, 96, 96))), 'each patch'),
                         (dict(a=METHODS['lime'].using(segmentation=torch.zeros(4, 96, 96).long())), 'each patch')):
        with pytest.raises(ValueError, match=word): write_maps(model, split, chosen, '/nowhere')
    assert len(passed) <= 1, 'one pass names the classes; nothing was explained'
    hook.remove()


def test_other_data_are_not_taken_for_these(tmp_path, monkeypatch):
    "A patch or a mask that was mended in its file: maps and values are made anew, each in a folder of its own."
    monkeypatch.setenv('PCAM_TP_HOME', str(tmp_path/'home'))
    folder, model = write_synthetic(tmp_path/'data', dict(test=70)), build('small_cnn', width=.1)
    def both():
        split = open_split('test', folder)
        maps = read_maps(write_maps(model, split, ['saliency']))[0]['saliency']
        table = split_leaderboard(model, split, ['saliency'], ['relevance_mass'], controls=['untrained'])
        return maps, table[(table.group == 'all') & (table.control == 'none')]['mean'].item()
    maps, mass = both()
    with h5py.File(raw_file(folder, 'test', 'mask'), 'r+') as f:   # only the centre is drawn now
        centre = f['mask'][:, 32:64, 32:64]
        f['mask'][:] = False; f['mask'][:, 32:64, 32:64] = centre
    again, less = both()
    near = dict(rtol=1e-4, atol=1e-8) if torch.cuda.is_available() else dict(rtol=0, atol=0)   # a card sums otherwise
    assert_allclose(again, maps, **near); assert less < mass
    with h5py.File(raw_file(folder, 'test', 'x'), 'r+') as f: f['x'][34] = 255 - f['x'][34]
    other, _ = both()
    assert not np.allclose(other[34], maps[34], **near)
    assert_allclose(np.delete(other, 34, 0), np.delete(maps, 34, 0), **near)
