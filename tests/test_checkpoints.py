"Checkpoints of four families, saved small and random: the same logits as transformers gives, maps where the network looked."
import json, re, shutil, warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

transformers, timm = pytest.importorskip('transformers'), pytest.importorskip('timm')
from pcam_tp.cam import CAMS
from pcam_tp.checkpoints import as_classifier, find_layers, load_checkpoint
from pcam_tp.classifier import IMAGENET_MEAN, IMAGENET_STD, Classifier, Resize, layer_output, predict
from pcam_tp.methods import METHODS, explain
from pcam_tp.questions import answers

T, NAMES = transformers, ('cat', 'dog', 'owl')
T.logging.set_verbosity_error()
T.logging.disable_progress_bar()
square = lambda side: T.ViTImageProcessor(size=dict(height=side, width=side))
cropping = lambda side: T.ConvNextImageProcessor(size=dict(shortest_edge=side))   # resizes to side/.875, cuts out the middle
tokens = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=64, patch_size=8)
stages = dict(hidden_sizes=[8, 16, 24, 32], depths=[1]*4)
swin = dict(embed_dim=16, depths=[1, 1], num_heads=[2, 2], image_size=64, window_size=4, patch_size=4)
MADE = dict(
    convnextv2=lambda: (T.ConvNextV2ForImageClassification, T.ConvNextV2Config(**stages, image_size=128), cropping(128)),
    vit=lambda: (T.ViTForImageClassification, T.ViTConfig(**tokens), square(64)),
    swin=lambda: (T.SwinForImageClassification, T.SwinConfig(**swin), square(64)),
    resnet=lambda: (T.ResNetForImageClassification, T.ResNetConfig(embedding_size=8, layer_type='basic', **stages), cropping(96)),
    deit=lambda: (T.DeiTForImageClassification, T.DeiTConfig(**tokens),
                  T.DeiTImageProcessor(size=dict(height=80, width=72), crop_size=dict(height=64, width=64))),
    swinv2=lambda: (T.Swinv2ForImageClassification, T.Swinv2Config(**swin), square(64)))
LAYER = dict(convnextv2='convnextv2.encoder.stages.3', vit='layernorm_before', swin='swin.layernorm', resnet='resnet.encoder.stages.3',
             deit='layernorm_before', swinv2='swinv2.layernorm')
each = pytest.mark.parametrize('name', MADE)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A folder with one checkpoint of each family; `folder(name)` is its path."
    root = tmp_path_factory.mktemp('checkpoints')
    def one(name):
        if not (root/name).exists():
            torch.manual_seed(0)
            kind, config, processor = MADE[name]()
            config.id2label, config.label2id = dict(enumerate(NAMES)), {n: i for i, n in enumerate(NAMES)}
            config.initializer_range = .2   # answers that differ from image to image
            kind(config).save_pretrained(root/name)
            processor.save_pretrained(root/name)
        return root/name
    return one


@pytest.fixture
def copy(folder, tmp_path): return lambda name: shutil.copytree(folder(name), tmp_path/name)


def photo(h, w, seed=0):
    "A coarse random picture, as Pillow and as ours."
    image = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (h//4, w//4, 3), dtype=np.uint8)).resize((w, h))
    return image, torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]/255


def change(folder, file, **values):
    "Other values in a JSON file; None removes one."
    d = json.loads((folder/file).read_text()) | values
    (folder/file).write_text(json.dumps({k: v for k, v in d.items() if v is not None}))
    return folder


# ---------------------------------------------------------------- the same numbers

@each
def test_same_logits_as_transformers(folder, name):
    "On images of other sizes and shapes; what is left is the processor's rounding to bytes."
    ours = load_checkpoint(folder(name))
    net = T.AutoModelForImageClassification.from_pretrained(folder(name)).eval()
    processors = [T.AutoImageProcessor.from_pretrained(folder(name), backend=b) for b in ('torchvision', 'pil')]
    answers = []
    for i, shape in enumerate(((200, 150), (73, 131))):
        image, x = photo(*shape, i)
        answers.append(predict(ours, x))
        for p in processors:
            with torch.no_grad(): theirs = net(**p(image, return_tensors='pt')).logits
            torch.testing.assert_close(answers[-1], theirs, rtol=0, atol=.02*theirs.abs().max().item())
    assert ours.classes == NAMES and ours.net.config.model_type == name
    assert torch.cat(answers).std(0).max() > .05*torch.cat(answers).abs().max(), 'answers differ: the tolerance means something'


def test_without_resizing_nothing_is_rounded(folder):
    ours = load_checkpoint(folder('vit'))
    image, x = photo(64, 64)
    net, p = T.AutoModelForImageClassification.from_pretrained(folder('vit')).eval(), T.AutoImageProcessor.from_pretrained(folder('vit'))
    with torch.no_grad(): torch.testing.assert_close(predict(ours, x), net(**p(image, return_tensors='pt')).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('change_to', [dict(rescale_factor=1/127.5, image_mean=[1, 1, 1], image_std=[1, 1, 1]), dict(do_normalize=False),
                                       dict(do_rescale=False, image_mean=[120, 110, 100], image_std=[60, 60, 60]), dict(resample=3)])
def test_other_ways_to_numbers(copy, change_to):
    where = change(copy('vit'), 'preprocessor_config.json', **change_to)
    image, x = photo(90, 120)
    theirs = T.AutoImageProcessor.from_pretrained(where)(image, return_tensors='pt')['pixel_values']
    ours = load_checkpoint(where)
    assert ((ours.preprocess(x) - theirs)*ours.std*255).abs().max() < 1.5


def test_a_processor_that_does_more_is_refused(copy):
    "Channels in another order: nothing that we read says so, only the comparison sees it."
    where, processor = copy('vit'), T.MobileViTImageProcessor(size=dict(height=64, width=64), do_center_crop=False, do_flip_channel_order=True)
    processor.save_pretrained(where)
    with pytest.raises(ValueError, match='more than resize, crop and normalise'): load_checkpoint(where)
    assert load_checkpoint(where, size=64, mean=(0,)*3, std=(1,)*3)   # who says it himself is believed


# ---------------------------------------------------------------- the layer and the place

@each
def test_layers_are_found(folder, name):
    model = load_checkpoint(folder(name))
    assert model.layers[-1].endswith(LAYER[name]), model.layers
    sizes = [layer_output(model, l, torch.rand(1, 3, 150, 200)).shape for l in model.layers]
    assert all(h*w > 1 for *_, h, w in sizes) and [h for _, _, h, w in sizes] == sorted([h for _, _, h, w in sizes], reverse=True)


PLAIN = .8

def planted(h, w, y, x, side=24):
    "Plain, with a red square whose middle is at row y, column x."
    image = torch.full((1, 3, h, w), PLAIN)
    image[..., y - side//2:y + side//2, x - side//2:x + side//2] = torch.tensor([1., 0, 0]).view(3, 1, 1)
    return image


QUIET = r'position_embeddings|pwconv2|fc2|mlp.*2\.|[qk]_proj|query|key|(swin.*(o_proj|\.output\.dense))'

def reads(model, image, plain):
    "Set by hand: blocks hand on what they get (attention, where it must act, is even); the head reads what the square adds."
    last, seen = [m for m in model.net.modules() if isinstance(m, nn.Linear)][-1], []
    for n, p in model.net.named_parameters():
        if re.search(QUIET, n): p.data.zero_()
    hook = last.register_forward_hook(lambda m, inputs, out: seen.append(inputs[0].detach()))
    predict(model, torch.cat([plain, image]))
    hook.remove()
    last.weight.data.zero_(), last.bias.data.zero_()
    last.weight.data[1] = nn.functional.normalize(seen[0][1] - seen[0][0], dim=0)
    return model


def peak(m, inside):
    "Where a map stands out from its median inside the crop: the weighted mean place of its upper half, (row, column)."
    m = (m - m[inside].median()).abs()*inside
    m = m*(m > .5*m.max())
    y, x = torch.meshgrid(torch.arange(m.shape[0]) + .5, torch.arange(m.shape[1]) + .5, indexing='ij')
    return torch.stack([(m*y).sum(), (m*x).sum()])/m.sum()


SCENES = (150, 300, 55, 190), (300, 150, 110, 95)   # far from square: what forgets the crop is 50 pixels off

@each
def test_a_planted_square_is_found_where_it_is(folder, name):
    "The head learns from a square at one place; maps find it at two others, on images that are cropped and no squares."
    model = load_checkpoint(folder(name))
    model = reads(model, planted(150, 300, 75, 150), planted(150, 300, 75, 150, 0))
    asked = CAMS | {'occlusion': METHODS['occlusion'].using(window=30, stride=30)}
    for h, w, y, x in SCENES:
        image = planted(h, w, y, x)
        for method, maps in explain(model, image, 1, asked, baseline=PLAIN).items():
            assert maps.shape == (1, h, w) and maps.isfinite().all()
            rows, cols = model.window(h, w)
            grid = layer_output(model, model.layers[-1], image).shape[2:]
            cell = max((rows.stop - rows.start)/grid[0], (cols.stop - cols.start)/grid[1])
            off = (peak(maps[0], model.inside(h, w)) - torch.tensor([y, x])).abs().max()
            near = cell/2 + 24/2 + 1   # the middle of a cell that the square touches
            assert off < near, f'{name}, {method}: {off:.0f} pixels off, a cell is {cell:.0f}'


@each
def test_every_method_that_fits(folder, name):
    quick = dict(smoothgrad=dict(n_samples=2), integrated_gradients=dict(n_steps=4), rise=dict(n_masks=16), lime=dict(n_samples=16),
                 kernelshap=dict(n_samples=16), occlusion=dict(window=40, stride=40))
    methods = {}
    for n, m in METHODS.items():
        try: m.fits(model := load_checkpoint(folder(name))) if not methods else m.fits(model)
        except ValueError: continue
        methods[n] = m.using(**quick.get(n, {}))
    maps = explain(model, photo(120, 90)[1], 2, methods)
    assert len(maps) >= 12 and all(m.shape == (1, 120, 90) and m.isfinite().all() and m.any() for m in maps.values())
    for n, m in maps.items(): assert not m[~model.inside(120, 90)[None]].any(), f'{n} speaks of what was cropped away'


@each
def test_parity_with_gradcam(folder, name):
    "The library on the bare network, with its own reshape_transform, against ours at the layer that was found."
    from pytorch_grad_cam import GradCAM, HiResCAM, LayerCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    model = load_checkpoint(folder(name))
    _, x = photo(150, 200)
    class Logits(nn.Module):
        def __init__(self, net): super().__init__(); self.net = net
        def forward(self, z): return self.net(z).logits
    layer = model.layers[-1]
    extra = dict(vit=1, deit=2).get(name, 0)
    def fold(a):
        if a.ndim == 4: return a
        a = a[:, extra:]
        side = int(a.shape[1]**.5)
        return a.reshape(len(a), side, side, -1).permute(0, 3, 1, 2)
    for cls, ours in ((GradCAM, 'gradcam'), (HiResCAM, 'hirescam'), (LayerCAM, 'layercam')):
        with cls(Logits(model.net), [model.net.get_submodule(layer)], reshape_transform=fold) as cam:
            theirs = torch.from_numpy(cam(model.preprocess(x), [ClassifierOutputTarget(1)]))
        m = CAMS[ours](model, x, 1, score='logit', details=True)[1]['grid'].relu()[:, None]
        m = nn.functional.interpolate(m, theirs.shape[1:], mode='bilinear', align_corners=False)[:, 0]   # cv2's rule
        low, high = m.amin(), m.amax()
        torch.testing.assert_close((m - low)/(high - low + 1e-7), theirs, rtol=0, atol=.02)


# ---------------------------------------------------------------- what is refused, and with which words

def broken(copy, how):
    "A folder with one thing wrong."
    if how == 'no folder': return copy('vit').parent/'drive'/'nothing'
    where = copy('vit')
    if how.startswith('no '): (where/how[3:]).unlink()
    if how == 'not JSON': (where/'config.json').write_text('{')
    if how == 'detection': change(where, 'config.json', architectures=['DetrForObjectDetection'], model_type='detr')
    if how == 'language': change(where, 'config.json', architectures=['BertForMaskedLM'], model_type='bert')
    if how == 'backbone': change(where, 'config.json', architectures=['ViTModel'])
    if how == 'unknown': change(where, 'config.json', model_type='vit3000')
    if how == 'deeper': change(where, 'config.json', num_hidden_layers=3)
    if how == 'shallower': change(where, 'config.json', num_hidden_layers=1)
    if how == 'wider': change(where, 'config.json', id2label={str(i): str(i) for i in range(5)}, label2id=None)
    if how == 'cut': (where/'model.safetensors').write_bytes((where/'model.safetensors').read_bytes()[:5000])
    if how == '384': change(where, 'preprocessor_config.json', size=dict(height=384, width=384))
    if how == 'lanczos': change(where, 'preprocessor_config.json', resample=1)
    if how == 'longest': change(where, 'preprocessor_config.json', size=dict(longest_edge=64))
    return where


@pytest.mark.parametrize('how, error, said', [
    ('no folder', FileNotFoundError, 'is Drive mounted'), ('no config.json', FileNotFoundError, 'config.json is missing; there is model'),
    ('no model.safetensors', FileNotFoundError, 'model.save_pretrained'), ('no preprocessor_config.json', FileNotFoundError, 'size, mean and std'),
    ('not JSON', ValueError, 'is no JSON'), ('detection', ValueError, 'DetrForObjectDetection: expected one for images'),
    ('language', ValueError, 'BertForMaskedLM'), ('backbone', ValueError, 'ViTModel: expected'), ('unknown', ValueError, 'vit3000'),
    ('deeper', ValueError, r'do not fit; missing: vit.*layer'), ('shallower', ValueError, 'do not fit; too many: vit.*layer'),
    ('wider', ValueError, r'of another shape: classifier.bias \(3,\) instead of \(5,\)'), ('cut', ValueError, 'cannot be read'),
    ('384', ValueError, r'makes 384×384, config.json says image_size 64×64. .*size=64 for the one'),
    ('lanczos', ValueError, 'expected height and width or shortest_edge, and bilinear'), ('longest', ValueError, 'expected height and width')])
def test_refused(copy, how, error, said):
    with pytest.raises(error, match=said): load_checkpoint(broken(copy, how))


def test_a_pickle_is_read_as_weights_or_not_at_all(copy):
    where = copy('resnet')
    weights = T.AutoModelForImageClassification.from_pretrained(where).state_dict()
    want = predict(load_checkpoint(where), x := photo(96, 96)[1])
    (where/'model.safetensors').unlink()
    torch.save(weights, where/'pytorch_model.bin')
    torch.testing.assert_close(predict(load_checkpoint(where), x), want)
    class Evil:
        def __reduce__(self): return open, (str(where/'was here'), 'w')
    torch.save(weights | dict(evil=Evil()), where/'pytorch_model.bin')
    with pytest.raises(ValueError, match='it could run code'): load_checkpoint(where)
    assert not (where/'was here').exists()


def test_another_size_is_refused_or_asked_for(copy, folder):
    x = photo(90, 90)[1]
    with pytest.raises(ValueError, match='fails on 96×96 images .*size=64, or interpolate=True'): load_checkpoint(folder('vit'), size=96)
    larger = load_checkpoint(folder('vit'), size=96, interpolate=True)
    assert layer_output(larger, larger.layers[-1], x).shape == (1, 32, 12, 12)
    with pytest.raises(ValueError, match='has no position embeddings'): load_checkpoint(folder('resnet'), interpolate=True)
    told = load_checkpoint(broken(copy, '384'), size=64)   # as it was trained: the whole image, squeezed
    assert told.sees(90, 120) == (64, 64) and not told.crops
    torch.testing.assert_close(predict(told, x), predict(load_checkpoint(folder('vit')), x))


def test_who_has_no_processor_may_say_it(copy):
    where = broken(copy, 'no preprocessor_config.json')
    ours = load_checkpoint(where, size=64, mean=(.5,)*3, std=(.5,)*3, layers='vit.layernorm', classes=('a', 'b', 'c'))
    assert ours.layers == ('vit.layernorm',) and ours.classes == ('a', 'b', 'c')
    with pytest.raises(ValueError, match='has no option interpolat: it takes interpolate'): load_checkpoint(where, interpolat=True)


def test_one_logit_and_classes_that_exclude_nothing(copy):
    where = change(copy('resnet'), 'config.json', problem_type='multi_label_classification')
    with pytest.warns(UserWarning, match='exclude nothing'): load_checkpoint(where)
    config = T.ResNetConfig(embedding_size=8, layer_type='basic', **stages, id2label={0: 'tumour'}, label2id=dict(tumour=0))
    T.ResNetForImageClassification(config).save_pretrained(where)
    assert load_checkpoint(where).classes == ('not tumour', 'tumour')


# ---------------------------------------------------------------- timm and bare modules

TIMM = [('resnet10t.c3_in1k', {}, 'layer4'), ('convnextv2_atto.fcmae_ft_in1k', dict(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16)), 'stages'),
        ('vit_tiny_patch16_224.augreg_in21k_ft_in1k', dict(depth=2, embed_dim=24, img_size=96, reg_tokens=3), 'blocks.1.norm1'),
        ('swin_tiny_patch4_window7_224.ms_in1k', dict(embed_dim=12, depths=(1, 1), num_heads=(2, 2)), 'norm')]

@pytest.mark.parametrize('name, options, layer', TIMM)
def test_timm(name, options, layer):
    ours = load_checkpoint(f'timm:{name}', pretrained=False, num_classes=3, **options)
    data = timm.data.resolve_data_config(dict(img_size=options['img_size']) if 'img_size' in options else {}, model=ours.net)
    image, x = photo(131, 210)
    with torch.no_grad(): theirs = ours.net(timm.data.create_transform(**data)(image)[None])
    torch.testing.assert_close(predict(ours, x), theirs, rtol=0, atol=.02*theirs.abs().max().item())
    maps, _ = answers(dict(gradcam=CAMS['gradcam']), ours, x, 1)['gradcam']
    assert ours.layers[-1] == layer and maps.shape == (1, 131, 210) and maps.isfinite().all() and maps.any()
    assert not maps[~ours.inside(131, 210)[None]].any()


@pytest.mark.parametrize('name, options, said', [
    ('no_such_net', {}, 'cannot be had'), ('resnet10t', dict(pretrained=False, colour=3), 'no such option'),
    ('vit_tiny_patch16_224', dict(pretrained=False, depth=1, size=96), 'fails on 96×96 images .*img_size')])
def test_timm_refuses(name, options, said):
    with pytest.raises(ValueError, match=said): load_checkpoint(f'timm:{name}', **options)


def test_bare_modules():
    usual = dict(mean=IMAGENET_MEAN, std=IMAGENET_STD)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    assert load_checkpoint(net, size=32, **usual).layers == ('1', '4')
    with pytest.raises(ValueError, match='what were the training images normalised with'): load_checkpoint(net, size=32)
    with pytest.raises(ValueError, match='expected an nn.Module'): as_classifier('net', **usual)
    with pytest.raises(ValueError, match='fails on 8×8 images'): as_classifier(nn.Sequential(nn.Flatten(), nn.Linear(3*64*64, 2)), size=8, **usual)
    flat = as_classifier(nn.Sequential(nn.Flatten(), nn.Linear(3*8*8, 2)), size=8, **usual)
    assert flat.layers == ()   # nothing is a picture here: the layer is asked for when one is needed
    with pytest.raises(ValueError, match='names no layer'): CAMS['gradcam'](flat, torch.rand(1, 3, 8, 8))


def test_looking_for_layers_leaves_no_trace():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).train()
    nn.init.zeros_(net[-1].weight)   # a new head of zeros lets no gradient through
    before = {k: v.clone() for k, v in net.state_dict().items()}
    assert find_layers(Classifier(net), (16, 16)) == ('1',)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()) and net.training
    assert all(p.grad is None for p in net.parameters()) and not any(m._forward_hooks for m in net.modules())
