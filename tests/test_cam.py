"""What 03_gradcam leaves out: theory and parity with the field's libraries, token grids, other outputs and layers,
several layers, no trace, a pass that breaks."""
import warnings

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch.testing import assert_close

from conftest import settled
from pcam_tp.cam import CAMS, _alpha, cam_grids, gradcam
from pcam_tp.classifier import Classifier, class_score, get_layer, layer_output
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


def test_alpha_of_tiny_gradients():
    "1/(2 + g·ΣA) where |g| is well above √eps = .001; below it the eps of grad-cam decides."
    def found(g): return _alpha(torch.full((1, 1, 1, 1), 10.), torch.full((1, 1, 1, 1), g)).item()
    assert abs(found(.1) - 1/3) < 1e-4 and abs(found(1e-4) - .0098) < 1e-4 and abs(1/(2 + 1e-3) - .4998) < 1e-4


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


# ---------------------------------------------------------------- formulas: theory and the field's libraries

LOGIT = dict(score='logit', methods=('gradcam', 'hirescam'))
off = lambda a, b: float((a - b).norm()/b.norm())


def test_behind_an_average_grad_cam_is_cam():
    "A ResNet's score is the mean of CAM plus a bias, and Grad-CAM is CAM divided by the number of cells."
    model = settled(build('resnet18'))
    target, fc = torch.tensor([0, 1, 1]), model.net.fc
    w = (fc.weight[target] - fc.weight[1 - target]).detach()
    cam = torch.einsum('nk,nkhw->nhw', w, layer_output(model, 'layer4', X).detach())
    score = class_score(model(X), target).detach()
    assert_close(cam.mean((1, 2)) + (fc.bias[target] - fc.bias[1 - target]).detach(), score, rtol=1e-4, atol=1e-4)
    ours = cam_grids(model, X, target)['layer4']
    for method in ('gradcam', 'hirescam'): assert off(cam.shape[1:].numel()*ours[method], cam) < .01


def test_what_the_head_proves():
    "Average: one map. One linear layer: HiResCAM adds up to the logit less its bias, Grad-CAM does not. Two: neither."
    nets = {h: settled(build('small_cnn', head=h, width=.25)) for h in ('gap', 'flatten', 'mlp')}
    grids = {h: cam_grids(n, X, 1, **LOGIT)['conv4'] for h, n in nets.items()}
    def missed(h, method):
        rest = (nets[h](X)[:, 1] - nets[h].net.head[-1].bias[1]).detach()
        return off(grids[h][method].sum((1, 2)), rest)
    assert off(grids['gap']['gradcam'], grids['gap']['hirescam']) < 1e-4
    assert off(grids['flatten']['gradcam'], grids['flatten']['hirescam']) > .01
    assert missed('flatten', 'hirescam') < 1e-3 and missed('gap', 'hirescam') < 1e-3
    assert missed('flatten', 'gradcam') > .01 and missed('mlp', 'hirescam') > .01


@each_cam
def test_the_other_class(f):
    "One logit is two classes; of two, the log-odds maps are opposite where the formula is linear in the gradient."
    model = settled(build('small_cnn', width=.2))
    one = settled(Classifier(small_cnn(n_classes=1, width=.1), layers='conv4'))
    if f.__name__ in ('gradcam', 'hirescam'):
        for m in (model, one): assert off(f(m, X, 0), -f(m, X, 1)) < 1e-3
    else: assert off(f(model, X, 0), -f(model, X, 1)) > .01


@each_cam
def test_a_common_term_in_both_logits(f):
    "It changes no probability, and so no map of the log-odds; it does change that of a logit."
    class Common(nn.Module):
        def __init__(self, net): super().__init__(); self.net = net
        def forward(self, x):
            features = self.net[:-1](x)
            return self.net.head(features) + features.mean((2, 3)).sum(1, keepdim=True)
    model = settled(build('small_cnn', head='mlp', width=.2))
    common = Classifier(Common(model.net), layers='net.conv4').eval()
    assert_close(common(X).softmax(1), model(X).softmax(1), rtol=1e-4, atol=1e-4)
    assert off(f(common, X, 1), f(model, X, 1)) < .01
    assert off(f(common, X, 1, score='logit'), f(model, X, 1, score='logit')) > .05


def test_grad_cam_plus_plus_alpha():
    "1/(2 + g·ΣA): it falls with the gradient and does not know the cell's own activation."
    A, g = torch.tensor([0., 5., 0., 5.]).view(1, 1, 2, 2), torch.tensor([.1, .1, 1., 1.]).view(1, 1, 2, 2)
    assert_close(_alpha(A, g).flatten(), 1/(2 + 10*g.flatten()), rtol=1e-3, atol=1e-5)
    assert (_alpha(A, 0*g) == 0).all()


@pytest.mark.parametrize('name', ['small_cnn', 'resnet18'])
def test_the_same_as_grad_cam(name):
    "grad-cam cuts at 0, scales each image to [0, 1], enlarges and scales again: so do we here with our raw grids."
    from pytorch_grad_cam import GradCAM, GradCAMPlusPlus, HiResCAM, LayerCAM
    from pytorch_grad_cam.utils.image import scale_cam_image
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    theirs = dict(gradcam=GradCAM, hirescam=HiResCAM, gradcam_pp=GradCAMPlusPlus, layercam=LayerCAM)
    model, target = settled(build(name)), [1, 0, 1]
    (layer, ours), = cam_grids(model, X, target, score='logit').items()
    for method, grid in ours.items():
        mine = scale_cam_image(scale_cam_image(grid.relu().cpu().numpy(), (X.shape[3], X.shape[2])))
        with theirs[method](model=model, target_layers=[get_layer(model, layer)]) as cam:
            found = cam(input_tensor=X.clone(), targets=[ClassifierOutputTarget(t) for t in target])
        assert np.linalg.norm(mine - found) < .01*np.linalg.norm(found), method
    assert hooks(model) == 0


def test_the_same_as_captum():
    from captum.attr import LayerGradCam, LayerGradientXActivation
    model, target = settled(build('small_cnn', width=.3)), torch.tensor([1, 0, 1])
    ours = cam_grids(model, X, target, **LOGIT)['conv4']
    assert off(ours['gradcam'], LayerGradCam(model, model.net.conv4).attribute(X, target).detach()[:, 0]) < .01
    assert off(ours['hirescam'], LayerGradientXActivation(model, model.net.conv4).attribute(X, target).detach().sum(1)) < .01


def test_grids_and_pixels():
    "`cam_grids` in small batches, stretched, are the maps; details hold the grid."
    model = settled(build('resnet18'))
    grids = cam_grids(model, X, 1, layers=['layer3', 'layer4'], batch_size=2)
    for method, f in CAMS.items():
        for layer in ('layer3', 'layer4'):
            maps, info = f(model, X, 1, layer=layer, details=True)
            assert off(model.to_pixels(grids[layer][method], X.shape[2:]), maps) < .01
            assert off(info['grid'], grids[layer][method]) < .01


@each_cam
def test_no_trace_in_a_network_that_learns(f):
    "Modes, requires_grad, grads, hooks and images stay; `no_grad` and `inference_mode` do not matter, nor does the batch."
    m = settled(build('small_cnn', width=.1)).train()
    m.net.conv1.eval(); m.net.conv2.requires_grad_(False)
    state = lambda: ([k.training for k in m.modules()], [(p.requires_grad, p.grad) for p in m.parameters()], hooks(m), X._version)
    before = state()
    with torch.no_grad(): alone = f(m, X[:1], 1)
    with torch.inference_mode(): inside = f(m, X, 1)
    assert state() == before
    assert off(inside[:1], alone) < .01 and off(f(m, X, 1, batch_size=2), inside) < .01


@each_cam
def test_a_frozen_network_that_crops(f):
    frozen = settled(build('small_cnn', width=.1, geometry=dict(crop=32))).requires_grad_(False)
    maps = f(frozen, X, 1)
    assert maps.shape == (3, 48, 64) and not maps[:, :8].any() and not maps[:, :, :16].any() and maps.any()


def test_a_hook_sees_what_the_layer_gave():
    "An in-place ReLU behind a layer overwrites what a hook stored; `Classifier` switches it off."
    torch.manual_seed(0)
    raw, kept = torchvision.models.resnet18().eval(), {}
    assert raw.relu.inplace
    model = Classifier(raw, layers='bn1').eval()
    hook = raw.bn1.register_forward_hook(lambda m, i, out: kept.update(stored=out, copy=out.clone()))
    with torch.no_grad(): model(X)
    hook.remove()
    assert kept['copy'].min() < 0 and torch.equal(kept['stored'], kept['copy'])


def test_words_of_cam_grids():
    model = build('small_cnn', width=.1)
    for options, said in ((dict(methods=('eigencam',)), 'some of gradcam'), (dict(methods='gradcam'), 'in a tuple'),
                          (dict(methods=()), 'in a tuple'), (dict(layers='conv9'), 'conv1, conv2'), (dict(layers='head'), 'no plain grid')):
        with pytest.raises(ValueError, match=said): cam_grids(model, X, **options)
