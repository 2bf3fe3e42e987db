"""What foundation/18_identity cannot show: a description is another one for whatever shapes a result, for methods, networks
and objects of every kind, and what has none is refused, never passed over."""
import datetime, functools, random, threading, warnings

import captum.attr
import numpy as np
import pytest
import torch
from torch import nn

from pcam_tp.classifier import Classifier, predict
from pcam_tp.core import fingerprint
from pcam_tp.identity import described, kept_as, network_id, weights_id
from pcam_tp.leaderboard import METRICS, as_explainer
from pcam_tp.measures import metric
from pcam_tp.methods import METHODS, from_captum
from pcam_tp.models import MODELS, build
from pcam_tp.questions import explainer
from pcam_tp.saliency import smoothed


def different(values, name=lambda v: fingerprint(described(v))):
    "Are the names of all values different, and each the same again?"
    found = {k: name(v) for k, v in values.items()}
    assert found == {k: name(v) for k, v in values.items()}
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


class Remembers:
    def __init__(self, by): self.by = by
    @functools.cached_property
    def twice(self): return 2*self.by


def test_what_remembers_is_what_it_calls():
    times = lambda by: lambda a: by*a
    different(dict(one=functools.cache(times(1)), two=functools.cache(times(2)), a=Remembers(1), b=Remembers(2)))
    class Other(Remembers):
        @functools.cached_property
        def twice(self): return 3*self.by
    assert described(Remembers.__dict__['twice']) != described(Other.__dict__['twice'])


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
    different(kinds, network_id)
    different(dict(relu=Classifier(Net(nn.ReLU())), gelu=Classifier(Net(nn.GELU())), tanh=Classifier(Net(nn.GELU('tanh')))), network_id)
    for name in MODELS: assert network_id(build(name)) == network_id(build(name, seed=1))
    for name in ('small_cnn', 'resnet18', 'vit_b_16'):
        fresh, used = build(name), build(name).train()
        METHODS['gradcam'](used, torch.rand(1, 3, 96, 96), 1)   # an explanation leaves no trace in the recipe
        assert network_id(fresh) == network_id(used) and described(fresh) == described(used)


def test_numbers_of_networks():
    "They are no part of how a network is built, and part of all that holds one."
    one, two = (build('small_cnn', width=.1, seed=s) for s in (0, 1))
    assert network_id(one) == network_id(two) and weights_id(one) != weights_id(two)
    other_mean = Classifier(one.net, layers=one.layers, classes=one.classes, mean=(.5, .5, .5))
    different(dict(one=one, two=two, other_mean=other_mean, asks=as_explainer(lambda m, x, t: one(x)), asks_other=as_explainer(lambda m, x, t: two(x))))
    class Lists(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)
            self.again, self.hidden = [self.layer], [nn.Linear(2, 2)]   # what PyTorch does not see
    torch.manual_seed(0)
    assert network_id(Lists()) != network_id(Lists()), 'numbers of a part that nothing else counts'
    a, b = Lists(), Lists()
    b.hidden = a.hidden
    assert network_id(a) == network_id(b) and weights_id(a) != weights_id(b)


class Flat(nn.Module):
    "Finds out by use that it flattens."
    def __init__(self): super().__init__(); self.head = nn.Linear(3*16*16, 2)
    def forward(self, x): return self.head(x.view(len(x), -1))


def test_what_use_finds_out_counts_nothing():
    torch.manual_seed(0)
    model = Classifier(Flat(), classes='ab')
    before = described(model)
    predict(model, torch.rand(2, 3, 16, 16))
    assert model.flattens == (model.device.type == 'cpu'), 'channels_last shows it, and CUDA is not asked for that'
    assert described(model) == before


def test_metrics():
    "The same function that follows another score is another metric."
    def rough(q, maps, *, power=1): return maps.flatten(1).norm(dim=1)
    follows = {s: metric(higher=True, source='a test', score=s)(rough) for s in ('probability', 'logit')}
    different(METRICS | follows | dict(power=follows['logit'].using(power=2)))


def test_names():
    generator, model = np.random.default_rng(0), build('small_cnn', width=.1)
    drawn = scaled(generator)
    assert kept_as('maps', a=1, b=model) == kept_as('maps', b=build('small_cnn', width=.1), a=1) != kept_as('maps', a=2, b=model)
    with pytest.warns(UserWarning, match=r'maps: computed each time.*drawn.*method.*by.*no description'):
        assert kept_as('maps', model=model, drawn=drawn) is None
    endless = []
    endless.append(endless)
    with pytest.warns(UserWarning, match='nothing is kept'): assert kept_as('maps', options=endless) is None
    on_processor = build('small_cnn', width=.1).net.eval().cpu(), torch.rand(1, 3, 96, 96, device='cpu')
    scripted = Classifier(torch.jit.trace(*on_processor))   # the simulated device cannot be traced
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        kept_as('maps', model=scripted)   # a name or none, but no other error


def test_what_has_no_description_is_refused():
    generator = np.random.default_rng(0)
    with open(__file__) as file:
        for thing in (generator, iter([1]), file, torch.Generator(), random.Random(0), threading.Lock(), np.array([generator])):
            mine = explainer(signed=True, source='mine')(lambda q: q.x[:, 0]*(thing is None))
            with pytest.raises(ValueError, match='no description|array of objects'): described(mine)
    class Stubborn:
        def __reduce_ex__(self, protocol): raise RuntimeError('not me')
    with pytest.raises(ValueError, match='no description'): described(Stubborn())
    generator_with_recipe = type('Seeded', (), dict(recipe='seed 0'))()
    assert described(generator_with_recipe) == 'seed 0'
