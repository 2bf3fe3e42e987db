"What is too heavy or too faulty for 01_models: every architecture, weights from a fake or silent internet, a frozen training run."
import hashlib, http.server, json, re, shutil, socket, threading, time, warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from conftest import settled
from pcam_tp.cam import CAMS
from pcam_tp.classifier import (IMAGENET_MEAN, IMAGENET_STD, PCAM_MEAN, Classifier, class_score, evaluating, get_layer,
                                layer_output, predict, trainable_parameters)
from pcam_tp.models import MODELS, build, imagenet_weights, layer_table, load_model, save_model
from pcam_tp.questions import answers

X = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
TORCHVISION = [n for n, a in MODELS.items() if not a.make]
same = lambda a, b, rtol=1e-5: torch.testing.assert_close(a, b, rtol=rtol, atol=rtol*float(b.abs().max()))


class Stop(Exception): pass


def recomputed(model, layer, x):
    "What a layer gives in a pass that ends there: nothing behind it can have changed the values."
    def stop(module, inputs, out): raise Stop(out)
    hook = get_layer(model, layer).register_forward_hook(stop)
    try:
        with evaluating(model), torch.no_grad(): model(x)
    except Stop as e: return e.args[0]
    finally: hook.remove()


def plain_hooks(model, layers, x, grad=False):
    "What ordinary hooks hold after the pass, and the logits."
    kept = {}
    hooks = [get_layer(model, l).register_forward_hook(lambda m, i, out, l=l: kept.update({l: out})) for l in layers]
    with evaluating(model), torch.set_grad_enabled(grad): logits = model(x)
    for h in hooks: h.remove()
    return kept, logits


@pytest.mark.parametrize('name', MODELS)
def test_architecture(name, tmp_path):
    model, x = build(name, seed=1), X[:1].clone().requires_grad_()
    with evaluating(model): logits = model(x)
    assert logits.shape == (1, 2) and logits.isfinite().all() and model.classes == ('normal', 'tumour')
    g, = torch.autograd.grad(class_score(logits, torch.ones(1, dtype=torch.long)).sum(), x)
    assert g.isfinite().all() and (g != 0).any(1).float().mean() > .9, 'the gradient reaches the pixels'

    kept, again = plain_hooks(model, model.layers, X[:1])   # what grad-cam, captum and every home-made hook see
    for layer in model.layers: assert torch.equal(kept[layer], recomputed(model, layer, X[:1])), f'{layer} is overwritten after the hook'
    last = model.layers[-1]
    with torch.no_grad(): grid = layer_output(model, last, X[:1])
    assert torch.equal(grid, model.grid(kept[last], last, X[:1].shape)) and grid.shape[2] == grid.shape[3] > 2

    save_model(model, tmp_path/name)
    other = load_model(tmp_path/name)
    shutil.rmtree(tmp_path/name)   # up to 560 MB
    assert torch.equal(predict(other, X[:1]), again) and other.card == model.card and not other.training


@pytest.mark.parametrize('name', MODELS)
def test_every_network_has_class_activation_maps(name):
    for m, _ in answers(CAMS, settled(build(name)), X).values(): assert m.shape == (2, 96, 96) and m.isfinite().all() and m.any(), name


@pytest.mark.parametrize('name', MODELS)
def test_shapes_for_many_classes_in_both_modes(name):
    "On the meta device: five logits, one tensor in training as in evaluation, layers from fine to coarse, one head."
    with torch.device('meta'):
        model, x = build(name, n_classes=5), torch.empty(2, 3, 96, 96)
        for mode in (True, False):
            out = model.train(mode)(x)
            assert torch.is_tensor(out) and out.shape == (2, 5)
        cells = [layer_output(model, l, x).shape[2] for l in model.layers]
        assert cells == sorted(cells, reverse=True)
        assert 0 < trainable_parameters(model.freeze()) == sum(p.numel() for p in get_layer(model, model.head).parameters())
    assert model.classes == tuple(f'class {k}' for k in range(5))


GRADIENTS = ['densenet121', 'vit_b_16', 'convnext_tiny', 'resnet50', 'alexnet']   # untrained EfficientNets hardly answer at all
@pytest.mark.parametrize('name', GRADIENTS)
def test_the_score_hangs_on_the_hooked_tensor(name):
    "A step along the gradient at the layer for maps changes the score as the gradient says: it is the tensor that the head reads."
    model = build(name).eval()
    layer = model.layers[-1]
    kept, logits = plain_hooks(model, [layer], X[:1], grad=True)
    score = class_score(logits, torch.zeros(1, dtype=torch.long)).sum()
    g, = torch.autograd.grad(score, kept[layer])
    step = (.02*kept[layer].norm()/g.norm()*g).detach()
    hook = get_layer(model, layer).register_forward_hook(lambda m, i, out: out + step)
    with torch.no_grad(): change = class_score(model(X[:1]), torch.zeros(1, dtype=torch.long)).sum() - score
    hook.remove()
    expected = (g*step).sum()
    assert expected > 1e-6 and abs(change/expected - 1) < .3
    if name.startswith('vit'): assert model.grid(g, layer, X[:1].shape)[0].abs().sum(0).min() > 0, 'every patch token has a gradient'


@pytest.mark.parametrize('name, head', [('resnet34', 'fc'), ('densenet121', 'classifier'), ('efficientnet_b1', 'classifier')])
def test_an_averaging_head_reads_the_layer_for_maps(name, head):
    model = settled(build(name))
    A = layer_output(model, model.layers[-1], X).detach()
    logits = predict(model, X)
    assert logits.std(0).min() > 1e-3
    with torch.no_grad(): same(get_layer(model, head)(A.mean((2, 3))), logits)


def test_hooks_before_in_place_activations():
    "What `Classifier` is for: the convolution's own output is still there after the pass."
    for name, layer in (('alexnet', 'features.0'), ('resnet18', 'bn1'), ('efficientnet_b0', 'features.0.1')):
        model = build(name)
        assert torch.equal(plain_hooks(model, [layer], X)[0][layer], recomputed(model, layer, X))


@pytest.mark.parametrize('name, layer', [('resnet18', 'layer2.1.bn2'), ('inception_v3', 'Mixed_7c.branch1x1.bn'), ('efficientnet_b0', 'features.3.1.block'),
                                         ('convnext_tiny', 'features.1.0.stochastic_depth')])
def test_layer_output_survives_functional_in_place_operations(name, layer):
    model = build(name)
    truth = recomputed(model, layer, X[:1])
    assert not torch.equal(plain_hooks(model, [layer], X[:1])[0][layer], truth), 'a plain hook loses it: otherwise this test shows nothing'
    assert torch.equal(layer_output(model, layer, X[:1]), truth)


def test_torchvision_densenet_overwrites_and_ours_does_not():
    theirs = Classifier(torchvision.models.densenet121())
    assert not torch.equal(plain_hooks(theirs, ['features'], X)[0]['features'], recomputed(theirs, 'features', X))
    ours = build('densenet121', n_classes=1000)
    missing = ours.net.load_state_dict(theirs.net.state_dict())
    assert not missing.missing_keys and not missing.unexpected_keys
    same(predict(ours, X), predict(theirs, X))
    assert torch.equal(plain_hooks(ours, ['features'], X)[0]['features'], recomputed(ours, 'features', X))


def test_the_transformer_sees_everything_from_the_start():
    model = build('vit_b_16', geometry=dict(crop=64))
    model.layers = model.layers[:1]
    row, = layer_table(model).to_dict('records')
    assert (row['grid'], row['receptive_field'], row['pixels_per_cell']) == ('14×14', 64, 4.6)


# ---------------------------------------------------------------- errors

@pytest.mark.parametrize('options, said', [
    (dict(name='resnet19'), 'convnext_tiny'), (dict(name='vgg19', width=.5), 'vgg19 has no option width: it takes n_classes, seed'),
    (dict(name='small_cnn', depth=3), 'freeze, head, width, dropout'), (dict(name='small_cnn', pretrained=True), 'no ImageNet weights: resnet18'),
    (dict(name='resnet18', geometry=dict(scale=2)), 'no geometry scale: it takes crop, size, mean, std'),
    (dict(name='vit_b_16', geometry=dict(size=96)), 'takes 224 pixels only'), (dict(name='resnet18', classes=('a', 'b', 'c')), 'each of the 2 logits')])
def test_errors_say_what_is_possible(options, said):
    with pytest.raises(ValueError, match=said): build(**options)


# ---------------------------------------------------------------- ImageNet weights

@pytest.fixture
def hub(tmp_path, monkeypatch):
    "An empty torch hub folder."
    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path/'hub'))
    return tmp_path/'hub'


def publish(name, net, folder, monkeypatch, legacy=False):
    "Put a state dict where torchvision's enum points, under a name that carries its hash."
    torch.save(net.state_dict(), folder/'new', _use_new_zipfile_serialization=not legacy)
    digest = hashlib.sha256((folder/'new').read_bytes()).hexdigest()[:8]
    file = (folder/'new').rename(folder/f'{name}-{digest}.pth')
    point_at(name, file.as_uri(), monkeypatch)
    return file


def point_at(name, url, monkeypatch): monkeypatch.setattr(torchvision.models.get_model_weights(name).DEFAULT.value, 'url', url)


def old_names(net):
    "torchvision's DenseNet file has names like denselayer1.norm.1, from before dots were forbidden."
    state = {re.sub(r'(denselayer\d+\.(?:norm|relu|conv))(\d)', r'\1.\2', k): v for k, v in net.state_dict().items() if 'num_batches' not in k}
    assert any('.norm.1.' in k for k in state)
    net.state_dict = lambda: state
    return net


@pytest.mark.parametrize('name', ['resnet18', 'densenet121', 'inception_v3', 'convnext_tiny', 'efficientnet_b0'])
def test_pretrained_equals_torchvision(name, hub, tmp_path, monkeypatch):
    "The same features as torchvision's own loading and transforms; only the head is new, and the card says what was loaded."
    torch.manual_seed(5)
    extra, side = (dict(init_weights=False), 299) if name == 'inception_v3' else ({}, 96)
    source = settled(torchvision.models.get_model(name, weights=None, **extra), torch.randn(2, 3, side, side))
    publish(name, old_names(source) if name == 'densenet121' else source, tmp_path, monkeypatch, legacy=name == 'resnet18')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        model = build(name, pretrained=True)
    theirs = torchvision.models.get_model(name, weights='DEFAULT').eval().to(memory_format=torch.channels_last)   # from the hub folder that we filled; ours in layout, or rounding differs
    parent, _, last = MODELS[name].head.rpartition('.')
    setattr(theirs.get_submodule(parent), last, get_layer(model, model.head))
    x = X[:1]
    if model.size: x = F.interpolate(x, (model.size,)*2, mode='bilinear', antialias=True)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.no_grad(): same(predict(model, X[:1]), theirs(((x - mean)/std).contiguous(memory_format=torch.channels_last)), 1e-4)
    assert (predict(model, X[:1]) - predict(model, X[:1]**2)).abs().max() > 1e-3, 'the answer depends on the image'
    assert model.card['pretrained'] is True and 'mean' in model.card['geometry']
    if name != 'resnet18': return
    point_at(name, 'http://localhost:9/never-00000000.pth', monkeypatch)   # loading again needs neither the internet nor the hub
    saved = load_model(save_model(model, tmp_path/'m'))
    assert torch.equal(predict(saved, X), predict(model, X)) and saved.card['pretrained'] is True
    assert torch.equal(saved.mean, model.mean) and model.mean.flatten().tolist() == pytest.approx(IMAGENET_MEAN)


def fallback(name='resnet18', **options):
    "A model that asked for ImageNet weights, the sentence, and the seconds."
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        model = build(name, pretrained=True, **options)
    assert len(said) == 1 and said[0].filename == __file__, 'the warning points at the caller'
    assert model.card['pretrained'] is False and model.mean.flatten().tolist() == pytest.approx(PCAM_MEAN)
    assert torch.equal(predict(model, X), predict(build(name, **options), X))
    return str(said[0].message), time.perf_counter() - start


def test_nobody_answers(hub, monkeypatch):
    point_at('resnet18', 'http://localhost:9/resnet18-00000000.pth', monkeypatch)
    said, seconds = fallback()
    assert 'resnet18 starts with random weights' in said and 'localhost:9' in said and '\n' not in said and seconds < 15


def test_an_address_that_accepts_and_stays_silent(hub, monkeypatch):
    before = socket.getdefaulttimeout()
    with socket.create_server(('127.0.0.1', 0)) as server:
        point_at('resnet18', f'http://127.0.0.1:{server.getsockname()[1]}/resnet18-00000000.pth', monkeypatch)
        start = time.perf_counter()
        with pytest.warns(UserWarning, match='timed out'): assert imagenet_weights('resnet18', timeout=.5) is None
        assert time.perf_counter() - start < 5
    assert socket.getdefaulttimeout() == before


class Serve(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(404 if 'missing' in self.path else 200)
        self.end_headers()
        self.wfile.write(b'<html>a page about a virus scan</html>')
    def log_message(self, *args): pass


@pytest.fixture
def server():
    s = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Serve)
    threading.Thread(target=s.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{s.server_port}'
    s.shutdown(); s.server_close()


@pytest.mark.parametrize('path, reason', [('missing-00000000.pth', '404'), ('page-00000000.pth', 'invalid hash')])
def test_wrong_answers(path, reason, server, hub, monkeypatch):
    point_at('resnet18', f'{server}/{path}', monkeypatch)
    assert reason in fallback()[0]
    assert not list(hub.rglob('*.pth*')), 'nothing broken is kept'


def test_a_broken_file_in_the_hub_folder(hub, monkeypatch):
    point_at('resnet18', 'http://localhost:9/resnet18-00000000.pth', monkeypatch)
    (hub/'checkpoints').mkdir(parents=True)
    (hub/'checkpoints'/'resnet18-00000000.pth').write_bytes(b'<html>')
    assert 'random weights' in fallback()[0]


def test_other_weights_than_expected_are_an_error(hub, tmp_path, monkeypatch):
    "A file that is whole but belongs to another network must not pass for the weights."
    publish('resnet18', torchvision.models.resnet34(), tmp_path, monkeypatch)
    with pytest.raises(ValueError, match='do not fit resnet18: 96 names'): build('resnet18', pretrained=True)


# ---------------------------------------------------------------- frozen

def test_frozen_survives_saving_and_training_mode(tmp_path):
    model = load_model(save_model(build('resnet18', freeze=True), tmp_path/'m'))
    assert model.card['freeze'] is True and trainable_parameters(model) == 1026
    model.train()
    assert model.training and not any(m.training for m in model.modules() if isinstance(m, nn.BatchNorm2d)) and model.net.fc.training
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad(): model(X)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    model.freeze(False)
    assert trainable_parameters(model) == 11_177_538 and model.net.bn1.training
    assert load_model(save_model(model, tmp_path/'n')).card['freeze'] is False


def test_old_cards_load(tmp_path):
    "Cards that know neither `pretrained` nor `freeze`."
    save_model(build('small_cnn', width=.1), tmp_path/'m')
    card = json.loads((tmp_path/'m'/'card.json').read_text())
    (tmp_path/'m'/'card.json').write_text(json.dumps({k: v for k, v in card.items() if k not in ('pretrained', 'freeze')}))
    assert trainable_parameters(load_model(tmp_path/'m')) == trainable_parameters(build('small_cnn', width=.1))


def test_training_moves_the_head_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setenv('PCAM_TP_HOME', str(tmp_path))
    from pcam_tp.data import open_splits
    from pcam_tp.synthetic import synthetic_folder
    from pcam_tp.training import train
    splits = open_splits(synthetic_folder(dict(train=64, valid=32, test=8)))
    model = build('efficientnet_b0', freeze=True)   # batch norm, dropout and stochastic depth
    before = {k: v.clone() for k, v in model.state_dict().items()}
    history = train(model, *splits[:2], epochs=2, batch_size=16, precision='no', device='cpu')
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v.cpu(), before[k])}
    assert changed == {'net.classifier.1.weight', 'net.classifier.1.bias'} and np.isfinite(history.train_loss).all()
