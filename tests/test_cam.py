"What 03_gradcam cannot show on two networks: token grids, other outputs and layers, several layers, a pass that breaks."
import warnings

import pytest
import torch
import torchvision
from torch import nn
from torch.testing import assert_close

from conftest import settled
from pcam_tp.cam import CAMS, cam_grids, gradcam
from pcam_tp.classifier import Classifier, class_score
from pcam_tp.models import build, small_cnn
from pcam_tp.questions import answers

X = torch.rand(3, 3, 48, 64, generator=torch.Generator().manual_seed(0))
near = dict(rtol=1e-3, atol=1e-6)
each_cam = pytest.mark.parametrize('f', CAMS.values(), ids=CAMS)
hooks = lambda model: sum(len(m._forward_hooks) for m in model.modules())


def by_hand(model, layer, x, fold, f):
    "Formula `f` of the layer's output and its gradient, folded to (N, C, h, w) by hand."
    kept = {}
    hook = model.net.get_submodule(layer).register_forward_hook(lambda m, i, out: kept.update(a=out))
    score = class_score(model.eval()(x), torch.ones(len(x), dtype=torch.long))
    hook.remove()
    g, = torch.autograd.grad(score.sum(), kept['a'])
    A, g = fold(kept['a']).detach(), fold(g)
    return dict(gradcam=(g.mean((2, 3), keepdim=True)*A).sum(1), hirescam=(g*A).sum(1), layercam=(g.relu()*A).sum(1))[f]


class Tokens(nn.Module):
    "Patches of 8×8, a class token in front: 1 + 6·8 = 49 tokens of an image of 48×64, which a guess takes for 7×7."
    def __init__(self):
        super().__init__()
        self.patches, self.first, self.mix = nn.Conv2d(3, 16, 8, 8), nn.Parameter(torch.randn(1, 1, 16)), nn.Linear(16, 16)
        self.head = nn.Linear(16, 2)
    def forward(self, x):
        t = self.patches(x).flatten(2).mT
        t = self.mix(torch.cat([self.first.expand(len(x), -1, -1), t], 1))
        return self.head(t.tanh().mean(1))


@pytest.mark.parametrize('name', ['gradcam', 'hirescam', 'layercam'])
def test_tokens_of_an_oblong_image(name):
    torch.manual_seed(0)
    model = Classifier(Tokens(), layers='mix')
    right = by_hand(model, 'mix', X, lambda a: a[:, 1:].mT.unflatten(2, (6, 8)), name)
    assert_close(cam_grids(model, X, 1)['mix'][name], right, **near)
    assert_close(CAMS[name](model, X, 1), model.to_pixels(right, X.shape[2:]), **near)


def test_swin_has_its_channels_last():
    "(N, 12, 16, 24) is 12 rows of 16 columns, not 12 channels."
    torch.manual_seed(0)
    swin = torchvision.models.SwinTransformer([4, 4], 24, depths=[1, 1], num_heads=[1, 2], window_size=[4, 4], num_classes=2)
    model = Classifier(swin, layers=('features.1', 'features.3'))
    for layer, cells in (('features.1', (12, 16)), ('features.3', (6, 8))):
        right = by_hand(model, layer, X, lambda a: a.permute(0, 3, 1, 2), 'gradcam')
        assert right.shape[1:] == cells
        assert_close(gradcam(model, X, 1, layer=layer), model.to_pixels(right, X.shape[2:]), **near)


@each_cam
def test_a_fold_that_only_the_user_knows(f):
    "Tokens in columns, not in rows: nobody can see it, so it is said; and tokens without a plain grid are refused."
    torch.manual_seed(0)
    class Columns(Tokens):
        def forward(self, x): return super().forward(x.mT)
    fold = lambda a: a[:, 1:].mT.unflatten(2, (8, 6)).mT
    torch.manual_seed(1); columns = Columns()
    rows = Tokens(); rows.load_state_dict(columns.state_dict())
    said = f(Classifier(columns, layers=dict(mix=fold)), X, 1)
    assert_close(said, f(Classifier(rows, layers='mix'), X.mT.contiguous(), 1).mT, **near)
    cut = nn.Sequential(nn.Conv2d(3, 5, 8, 8), nn.Flatten(2), nn.Linear(48, 35), nn.Flatten(), nn.Linear(175, 2))
    with pytest.raises(ValueError, match='no plain grid'): f(Classifier(cut, layers='2'), X)


@each_cam
def test_several_layers(f):
    "Each layer has the same say, in every image; a layer without a map has none, and nothing becomes NaN."
    model = settled(build('small_cnn', width=.2))
    parts = [f(model, X, 1, layer=l) for l in ('conv2', 'conv4')]
    scaled = [m/m.abs().amax((1, 2), keepdim=True) for m in parts]
    both = f(model, X, 1, layer=('conv2', 'conv4'))
    off = lambda a, b: (a - b).norm()/b.norm()   # of all pixels: rounding turns a few ReLUs on or off
    assert off(both, (scaled[0] + scaled[1])/2) < .005
    assert off(f(model, X[1:2], 1, layer=['conv2', 'conv4']), both[1:2]) < .005
    assert 'grid' not in f(model, X, 1, layer=('conv2', 'conv4'), details=True)[1]
    assert_close(f(model, X, 1, layer=('conv2', 'conv2')), parts[0], **near)   # said twice: one layer


@each_cam
def test_a_layer_that_gives_nothing_beside_one_that_does(f):
    class Residual(nn.Module):
        def __init__(self): super().__init__(); self.a, self.b, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Linear(4, 2)
        def forward(self, x):
            a = self.a(x).relu()
            return self.head((a + self.b(a)).mean((2, 3)))
    torch.manual_seed(0)
    model = Classifier(Residual(), layers=('a', 'b'))
    with torch.no_grad(): model.net.b.weight.zero_(), model.net.b.bias.zero_()
    a = f(model, X, 1, layer='a')
    with warnings.catch_warnings():
        warnings.simplefilter('error')   # the mean is no blank map
        assert_close(f(model, X, 1, layer=('a', 'b')), a/a.abs().amax((1, 2), keepdim=True)/2, **near)


@each_cam
def test_maps_that_are_zero_everywhere_are_named(f):
    model = build('small_cnn', width=.1, head='gap')
    with torch.no_grad(): model.net.conv4[1].weight.zero_(), model.net.conv4[1].bias.zero_()
    with pytest.warns(UserWarning, match=f'{f.__name__} at conv4: maps that are zero') as said: f(model, X, 1)
    assert said[0].filename == __file__, 'the warning points at the caller'


def test_one_pass_for_all():
    "Four methods: one forward pass for the maps, one for the scores of `details`; the classes are given."
    model, seen = settled(build('small_cnn', width=.1)), []
    answers(CAMS, model, X[:1], 1)
    hook = model.net.register_forward_hook(lambda m, i, out: seen.append(len(out)))
    answers(CAMS, model, X, 1, batch_size=2)
    assert seen == [2, 1]
    maps, info = gradcam(model, X, [0, 1, 1], details=True)
    hook.remove()
    assert sum(seen) == 3 + 3*gradcam.passes(details=True) and gradcam.passes() == 1
    assert set(info) == {'grid', 'score', 'target'} and info['grid'].shape == (3, 12, 16) and maps.shape == (3, 48, 64)
    with torch.no_grad(): assert_close(info['score'], class_score(model(X), torch.tensor([0, 1, 1])), **near)
    assert not any(f.options != ['layer'] or not f.signed for f in CAMS.values())


@pytest.mark.filterwarnings('ignore:.*torch.jit.script:FutureWarning')
@each_cam
def test_layers_that_cannot_be_explained(f):
    net, passes = small_cnn(width=.1), []
    hook = net.register_forward_hook(lambda m, i, out: passes.append(len(out)))
    with pytest.raises(ValueError, match='its last convolutions are conv2.0, conv3.0, conv4.0'): f(Classifier(net), X)
    assert not passes, 'before anything is computed'
    hook.remove()
    assert f(Classifier(net), X, layer='conv4').shape == f(Classifier(net, layers='conv4'), X).shape == (3, 48, 64)
    for layer in ('conv9', ('conv4', 'conv9'), 'head.9'):
        with pytest.raises(ValueError, match='not in this model; try one of'): f(Classifier(net, layers='conv4'), X, layer=layer)
    with pytest.raises(ValueError, match='wrap it'): f(net, X)
    scripted = Classifier(torch.jit.script(small_cnn(width=.1, head='gap').eval()), layers='conv4')
    with pytest.raises(ValueError, match='scripted'): f(scripted, X)
    assert hooks(scripted) == 0


def test_a_layer_that_runs_twice_and_one_that_does_not():
    class Again(nn.Module):
        def __init__(self): super().__init__(); self.conv, self.idle, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1), nn.Linear(3, 2)
        def forward(self, x): return self.head(self.conv(self.conv(x)).mean((2, 3)))
    model = Classifier(Again())
    for layer, said in (('conv', 'more than once'), ('idle', 'did not run')):
        with pytest.raises(ValueError, match=said): gradcam(model, X, layer=layer)
        assert hooks(model) == 0


def test_a_pass_that_breaks_leaves_nothing():
    class Broken(nn.Module):
        def __init__(self): super().__init__(); self.conv = nn.Conv2d(3, 2, 3)
        def forward(self, x):
            out = self.conv(x).mean((2, 3))
            if out.requires_grad: raise RuntimeError('a fault of its own')
            return out
    model = Classifier(Broken(), layers='conv').train()
    for f in CAMS.values():
        with pytest.raises(RuntimeError, match='a fault of its own'): f(model, X)
        assert hooks(model) == 0 and all(m.training for m in model.modules()) and torch.is_grad_enabled()
