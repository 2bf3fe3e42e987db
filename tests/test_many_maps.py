"""What tools/00_many_maps cannot show: maps of processes that are killed, and of two at once, are those of one left alone;
a recipe is the same in every process, and another for whatever shapes a map."""
import datetime, functools, os, random, signal, subprocess, sys, threading, time

import captum.attr
import h5py
import numpy as np
import pytest
import torch
from torch import nn

from conftest import ROOT, python, run
from pcam_tp.classifier import Classifier
from pcam_tp.core import fingerprint
from pcam_tp.data import open_splits, subset
from pcam_tp.many_maps import described, network_id, write_maps
from pcam_tp.methods import METHODS, from_captum
from pcam_tp.models import build
from pcam_tp.questions import explainer
from pcam_tp.saliency import smoothed

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


def different(values):
    "Are the recipes of all values different, and each the same again?"
    found = {k: fingerprint(described(v)) for k, v in values.items()}
    assert found == {k: fingerprint(described(v)) for k, v in values.items()}
    same = {f: [k for k in found if found[k] == f] for f in found.values()}
    assert len(same) == len(values), [k for k in same.values() if len(k) > 1]


def scaled(by, power=1):
    @explainer(signed=True, source='mine')
    def mine(q, *, times=1): return by*times*q.x.mean(1)**power
    return mine


class Scale:
    def __init__(self, by): self.by = by
    def __call__(self, q): return self.by*q.x.mean(1)


def test_recipes_of_methods():
    adapted = lambda cls, **o: from_captum(getattr(captum.attr, cls), **o)
    zeros, ones = (torch.full((3, 96, 96), v) for v in (0., 1.)); near = zeros.clone(); near[1, 50, 50] = 1e-3
    occlusion, lime = METHODS['occlusion'], METHODS['lime']
    made = explainer(signed=True, source='mine')
    different(METHODS | dict(
        two=adapted('IntegratedGradients', n_steps=2), fifty=adapted('IntegratedGradients', n_steps=50),
        rule=adapted('IntegratedGradients', n_steps=2, method='riemann_trapezoid'), unsigned=adapted('IntegratedGradients', n_steps=2, signed=False),
        network=adapted('IntegratedGradients', n_steps=2, space='network'), saliency2=adapted('Saliency'),
        first=adapted('LayerGradientXActivation', layer='0'), last=adapted('LayerGradientXActivation', layer='last'),
        image=adapted('IntegratedGradients', baselines=zeros), near_image=adapted('IntegratedGradients', baselines=near),
        made_image=adapted('IntegratedGradients', baselines=torch.zeros_like), other_image=adapted('IntegratedGradients', baselines=torch.ones_like),
        black=occlusion.using(baseline=zeros), nearly=occlusion.using(baseline=near), number=occlusion.using(baseline=0), array=occlusion.using(baseline=ones.numpy(force=True)),
        cut=lime.using(segmentation=torch.zeros(2, 96, 96, dtype=torch.long)),
        mine=scaled(1), mine2=scaled(2), square=scaled(1, 2), times=scaled(1).using(times=2),
        smooth=smoothed(METHODS['saliency']), smooth_ig=smoothed(METHODS['integrated_gradients']), smooth_few=smoothed(METHODS['saliency'], 3),
        a=made(lambda q: q.x[:, 0]), b=made(lambda q: q.x[:, 1]), c=made(lambda q: q.x[:, 0] + 1)))
    different(dict(one=Scale(1), two=Scale(2), partial=functools.partial(Scale(1), 1), bound=Scale(1).__call__, cls=Scale, sin=np.sin, cos=np.cos,
                   tensor_sin=torch.sin, tensor_cos=torch.cos, method=torch.Tensor.sin, text='sin', number=1., word=b'sin', day=datetime.date(2026, 1, 1), next_day=datetime.date(2026, 1, 2)))


class Net(nn.Sequential):
    def __init__(self, *more, by=1.):
        super().__init__(nn.Conv2d(3, 4, 3), *more, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        self.by = by
    def forward(self, x): return super().forward(x)*self.by


def test_recipes_of_networks():
    "The weights and their names are the same in all of them."
    torch.manual_seed(0)
    def hooked(net):
        net[0].register_forward_hook(lambda m, i, out: out.abs())
        return net
    padded = Net(); padded[0].padding = (1, 1)
    kinds = dict(plain=Classifier(Net()), by=Classifier(Net(by=2.)), padded=Classifier(padded), hooked=Classifier(hooked(Net())),
                 layer=Classifier(Net(), layers='0'), layers=Classifier(Net(), layers=('0', '3')), crop=Classifier(Net(), crop=64),
                 size=Classifier(Net(), size=64), fold=Classifier(Net(), layers={'0': lambda a: a}), other_fold=Classifier(Net(), layers={'0': lambda a: -a}),
                 output=Classifier(Net(), output=lambda out: -out), classes=Classifier(Net(), classes='ab'))
    different(kinds)
    different(dict(relu=Classifier(Net(nn.ReLU())), gelu=Classifier(Net(nn.GELU())), tanh=Classifier(Net(nn.GELU('tanh')))))
    for name in ('small_cnn', 'resnet18', 'vit_b_16'):
        fresh, used = build(name), build(name).train()
        METHODS['gradcam'](used, torch.rand(1, 3, 96, 96), 1)   # an explanation leaves no trace in the recipe
        assert network_id(fresh) == network_id(used)


def test_what_has_no_recipe_is_refused():
    generator, model, split = np.random.default_rng(0), build('small_cnn', width=.1), subset(open_splits()[2], 4)
    passed = []
    with open(__file__) as file:
        for thing in (generator, iter([1]), file, torch.Generator(), random.Random(0), threading.Lock(), np.array([generator])):
            mine = explainer(signed=True, source='mine')(lambda q: q.x[:, 0]*(thing is None))
            with pytest.raises(ValueError, match='no description|array of objects'): described(mine)
    hook = model.register_forward_hook(lambda *a: passed.append(1))   # a hook that encloses a list is part of the network
    for chosen, word in ((dict(a=scaled(generator)), 'no description'), ({'a/b': METHODS['gradcam']}, 'slash'), ({'.': METHODS['gradcam']}, 'slash'),
                         (dict(a=functools.partial(METHODS['gradcam'], layer='net.conv1')), '@explainer'),
                         (dict(a=METHODS['occlusion'].using(baseline=torch.rand(4, 3, 96, 96))), 'each patch'),
                         (dict(a=METHODS['lime'].using(segmentation=torch.zeros(4, 96, 96).long())), 'each patch')):
        with pytest.raises(ValueError, match=word): write_maps(model, split, chosen, '/nowhere')
    assert len(passed) <= 1, 'one pass names the classes; nothing was explained'
    hook.remove()
    generator_with_recipe = type('Seeded', (), dict(recipe='seed 0'))()
    assert described(generator_with_recipe) == 'seed 0'
