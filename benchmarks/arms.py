"""One arm of a benchmark, alone in a fresh process: prints the seconds of its work.

Allocator and threads are settings of a whole process, so two arms must never share one.

examples
  python benchmarks/arms.py occlusion_resnet18_ours
  python benchmarks/arms.py integrated_gradients_small_cnn_best --device cuda
  python benchmarks/arms.py train_small_cnn --device cuda --quick
"""
import argparse
import time
from functools import partial
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import h5py
import numpy as np
import torch
import torch.nn.functional as F

from pcam_tp import core
from pcam_tp.core import BUDGETS, best_device, home, make_once
from pcam_tp.synthetic import synthetic_folder

DEVICES = 'cpu', 'cuda', 'mps'
ARMS = {}
METHODS = dict(integrated_gradients='integrated_gradients', smoothgrad='saliency', occlusion='occlusion',
               rise='occlusion', lime='superpixels')   # explainer → its module
NETWORKS = 'small_cnn', 'resnet18'
COURSE = dict(width=.5, dropout=.3)   # small_cnn as the course trains it
OPTIONS = dict(integrated_gradients=dict(n_steps=50), smoothgrad=dict(n_samples=25, noise=.15),
               occlusion=dict(window=16, stride=8), rise=dict(n_masks=2000), lime=dict(n_samples=1000))
TINY = dict(integrated_gradients=dict(n_steps=2), smoothgrad=dict(n_samples=2, noise=.15),
            occlusion=dict(window=48, stride=48), rise=dict(n_masks=4), lime=dict(n_samples=8))


def sizes(device, quick=False):
    "How much work there is: enough for a clock, and on a GPU enough to fill it; with `quick`, hardly any."
    s = dict(rows=20_000, batch=64, steps=1, epochs=6, patches=32, images=2, fewer=dict(rise=1, lime=1),
             batches=(8, 16, 32, 64), of_peers=32, bare=200, repeats=1, width=1., options=OPTIONS, curve=50, flips=48,
             draws=10)
    if device == 'mps': s |= dict(patches=64, images=4, batches=(32, 64, 128, 256))
    if device == 'cuda':
        s |= dict(steps=50, patches=256, images=16, fewer=dict(lime=8), batches=(32, 64, 128, 256, 512, 1024),
                  bare=4_096, repeats=3)
    if quick:
        s |= dict(rows=200, batch=8, steps=2, epochs=2, patches=4, images=2, fewer={}, batches=(4, 8), of_peers=4,
                  bare=8, repeats=1, width=.1, options=TINY, curve=3, flips=3, draws=2)
    return SimpleNamespace(device=torch.device(device), quick=quick, **s)


S = sizes('cpu')


def use(device, quick=False):
    "From now on arms run on `device`; nobody's float32 is TF32."
    global S
    S = sizes(device, quick)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def setup(**options):
    "The project's own settings, for our arms; peers run in a plain process."
    return core.setup(device=S.device, verbose=False, **options)


def arm(f):
    ARMS[f.__name__] = f
    return f


def layout(low=False):
    "Of images and weights, where a network runs without our classifier: the faster one, with 16 bits or with 32."
    return torch.contiguous_format if S.device.type == 'cuda' and not low else torch.channels_last


def folder():
    "The quick budget's synthetic patches."
    return synthetic_folder({s: BUDGETS['quick'][f'n_{s}'] for s in ('train', 'valid', 'test')})


def clock():
    "The time when the device has done all that it was told."
    if S.device.type != 'cpu': getattr(torch, S.device.type).synchronize()
    return time.perf_counter()


def seconds(work, repeats=3):
    "The fastest of `repeats` calls after one that warms up."
    work()
    times = []
    for _ in range(repeats):
        start = clock()
        work()
        times.append(clock() - start)
    return min(times)


# Shuffled float32 batches of the training patches, page cache warm

@arm
def batches_ours():
    from pcam_tp.data import Batches, open_split
    setup()
    batches = Batches(open_split('train', folder()), 64, shuffle=True)
    return seconds(lambda: [None for _ in batches])


@arm
def batches_ram():
    "The same batches from an array that lies in memory as a whole."
    from pcam_tp.data import open_split, to_float
    setup()
    split = open_split('train', folder())
    x, y, rng = split.raw[:], torch.from_numpy(split.y), np.random.default_rng(0)

    def epoch():
        order = rng.permutation(len(x))
        for i in range(0, len(x), 64): yield to_float(x[order[i:i + 64]]), y[order[i:i + 64]]
    return seconds(lambda: [None for _ in epoch()])


@arm
def batches_torchvision():
    from torch.utils.data import DataLoader
    from torchvision.datasets import PCAM
    from torchvision.transforms import ToTensor
    with TemporaryDirectory() as root:
        (Path(root)/'pcam').symlink_to(folder())
        loader = DataLoader(PCAM(root, 'train', transform=ToTensor()), 64, shuffle=True)
        return seconds(lambda: [None for _ in loader], repeats=1)


# A tenth of 20,000 patches into a file of their own, in random order, from three layouts

LAYOUTS = dict(contiguous={}, rows=dict(chunks=(1, 96, 96, 3), compression='gzip'), blocks=dict(compression='gzip'))


def chosen(): return np.random.default_rng(1).permutation(S.rows)[:S.rows//10]


def stored(name):
    "A file of 20,000 patches, made once: copies of 2,000 synthetic ones with noise of their own in the lowest bits."
    def write(path):
        from pcam_tp.data import raw_file
        from pcam_tp.storage import read_rows
        base = read_rows(raw_file(folder(), 'train', 'x'), 'x', slice(S.rows//10)) & 0b11111000
        rng = np.random.default_rng(0)
        with h5py.File(path, 'w') as f:
            x = f.create_dataset('x', (S.rows, 96, 96, 3), 'uint8', **LAYOUTS[name])
            step = x.chunks[0] if name == 'blocks' else len(base)
            for i in range(0, len(x), step):
                rows = np.arange(i, min(i + step, len(x)))
                x[rows[0]:rows[-1] + 1] = base[rows % len(base)] | rng.integers(0, 8, (len(rows), 96, 96, 3), np.uint8)
    return make_once(home('data', 'benchmark')/f'{"quick-"*S.quick}{name}.h5', write)


def cut(name, work, repeats=3):
    "Seconds of `work(source, out)`; the source is in the page cache."
    source = stored(name)
    with open(source, 'rb') as f:
        while f.read(2**24): pass
    with TemporaryDirectory(dir=source.parent) as tmp:
        times = []
        for i in range(repeats):
            start = clock()
            work(source, Path(tmp)/f'{i}.h5')
            times.append(clock() - start)
    return min(times)


def _one_by_one(source, out, most=None):
    "One read and one append to a gzip array for each patch."
    with h5py.File(source) as f, h5py.File(out, 'w') as g:
        x = g.create_dataset('x', (0, 96, 96, 3), 'uint8', maxshape=(None, 96, 96, 3), **LAYOUTS['rows'])
        for i, row in enumerate(chosen()[:most]):
            x.resize(i + 1, 0)
            x[i] = f['x'][row]


def _whole(source, out):
    with h5py.File(source) as f, h5py.File(out, 'w') as g: g['x'] = f['x'][:][chosen()]


def _pass(source, out):
    "Decompress everything once, in blocks of the chunks' height, and keep nothing."
    with h5py.File(source) as f:
        for i in range(0, len(f['x']), f['x'].chunks[0]): f['x'][i:i + f['x'].chunks[0]]


def _cut_ours(source, out):
    from pcam_tp.storage import write_subset
    write_subset(source, out, chosen())


for name in LAYOUTS: ARMS[f'cut_{name}_ours'] = partial(cut, name, _cut_ours, 1 if name == 'blocks' else 3)
for name in ('contiguous', 'rows'): ARMS[f'cut_{name}_one_by_one'] = partial(cut, name, _one_by_one, 1)
ARMS['cut_blocks_one_by_one'] = lambda: len(chosen())/20*cut('blocks', partial(_one_by_one, most=20), 1)
ARMS['cut_blocks_whole'] = partial(cut, 'blocks', _whole, 1)
ARMS['cut_blocks_pass'] = partial(cut, 'blocks', _pass, 1)


# A training step, and an epoch of `train`

def _network(name, **options):
    "A network on the device; hardly any with --quick."
    from pcam_tp.models import build
    if S.quick and name == 'small_cnn': options['width'] = S.width
    return build(name, **options).to(S.device)


def _step(name, form, precision='no', options={}, **adam):
    "Seconds of a step of the bare network on one batch that lies on the device, both in a layout `form`."
    model = _network(name, **options).net.train().to(memory_format=form)
    opt = torch.optim.AdamW(model.parameters(), **adam)
    x = torch.rand(S.batch, 3, 96, 96, device=S.device).contiguous(memory_format=form)
    y, low = torch.randint(0, 2, (S.batch,), device=S.device), dict(bf16=torch.bfloat16, fp16=torch.float16)

    def step():
        with torch.autocast(S.device.type, low.get(precision), enabled=precision in low): logits = model(x)
        F.cross_entropy(logits.float(), y).backward()
        opt.step()
        opt.zero_grad()
    return seconds(lambda: [step() for _ in range(S.steps)])/S.steps


for name in NETWORKS:
    def plain(name=name): return _step(name, torch.contiguous_format)
    def fp32(name=name): return _step(name, layout(), setup(precision='no').precision)
    def default(name=name): return _step(name, layout((p := setup().precision) != 'no'), p)
    ARMS.update({f'step_{name}_plain': plain, f'step_{name}_fp32': fp32, f'step_{name}_default': default})


def epoch_steps():
    "Batches in an epoch: all full ones."
    return (128 if S.quick else BUDGETS['quick']['n_train'])//S.batch


@arm
def train_small_cnn():
    "An epoch of `train` with the course's small_cnn and the full budget's recipe: the fastest after the first."
    from pcam_tp.data import open_split, subset
    from pcam_tp.training import train
    setup()
    learn, watch = (open_split(s, folder()) for s in ('train', 'valid'))
    if S.quick: learn, watch = subset(learn, 128), subset(watch, 32)
    recipe = dict(batch_size=S.batch, stain=BUDGETS['full']['stain'])
    return train(_network('small_cnn', **COURSE), learn, watch, S.epochs, device=S.device, **recipe).seconds[1:].min()


@arm
def train_small_cnn_bare():
    "As many steps of the same network on one batch that lies on the device: no loading, no augmentation."
    fused = S.device.type == 'cuda'
    precision = setup().precision
    return epoch_steps()*_step('small_cnn', layout(precision != 'no'), precision, COURSE, fused=fused)


# Four class activation maps of each patch, fp32

def _cam_scene(name): return _network(name).eval(), torch.rand(S.patches, 3, 96, 96).to(S.device)


def _cam_ours(name):
    from pcam_tp.cam import CAMS
    from pcam_tp.questions import answers
    setup()
    model, x = _cam_scene(name)
    return seconds(lambda: answers(CAMS, model, x, 1, score='logit'))


def _cam_library(name, single=False):
    "The library's four explainers, one patch at a time or in batches of 32."
    from pytorch_grad_cam import GradCAM, GradCAMPlusPlus, HiResCAM, LayerCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    from pcam_tp.classifier import get_layer
    model, x = _cam_scene(name)
    layers = [get_layer(model, model.layers[-1])]
    explainers = [C(model=model, target_layers=layers) for C in (GradCAM, HiResCAM, GradCAMPlusPlus, LayerCAM)]

    def work():
        for xb in x.split(1 if single else S.of_peers):
            for e in explainers: e(input_tensor=xb, targets=[ClassifierOutputTarget(1)]*len(xb))
    return seconds(work, 3 if S.device.type == 'cpu' else 1)


for name in NETWORKS:
    ARMS.update({f'cam_{name}_ours': partial(_cam_ours, name), f'cam_{name}_batch': partial(_cam_library, name),
                 f'cam_{name}_single': partial(_cam_library, name, single=True)})


# Explanations by many passes, hidden pixels white: ours at its defaults, in fp32 and in bf16; the library's at its
# defaults, in batches of 32 images and at its best batch; the bare passes at their best batch

def _explainer(method): return getattr(import_module(f'pcam_tp.{METHODS[method]}'), method)


def images(method): return S.fewer.get(method, S.images)


def _scene(method, name):
    torch.manual_seed(0)
    x = F.interpolate(F.avg_pool2d(torch.rand(images(method), 3, 96, 96), 8), (96, 96), mode='bicubic').clamp(0, 1)
    return _network(name).eval(), x.to(S.device)


def _explained(method, name, precision):
    explain = _explainer(method)
    setup()
    model, x = _scene(method, name)
    options = dict(score='probability' if method == 'lime' else 'logit', precision=precision, **S.options[method])
    return seconds(lambda: explain(model, x, 1, **options), S.repeats)


def _bare(method, name):
    "As many passes as the method needs with no method around them, at the best batch size; from `S.bare` of them."
    explain = _explainer(method)
    setup()
    model, x = _scene(method, name)
    return _passes_alone(model, x, len(x)*explain.passes(x.shape[2:], **S.options[method]), explain.backward)


def _passes_alone(model, x, total, backward):
    some = min(total, S.bare)

    def work(batch):
        for n in range(0, some, batch):
            size = min(batch, some - n), -1, -1, -1
            one = x[:1].expand(size).contiguous(memory_format=layout()).requires_grad_(backward)
            with torch.set_grad_enabled(backward): out = model(one)
            if backward: torch.autograd.grad(out[:, 1].sum(), one)
    return total/some*min(seconds(partial(work, b), S.repeats) for b in S.batches)


def _library(method, name, batches):
    "The fastest of captum's or lime's own code with each of `batches` images a pass; None is the library's default."
    model, x = _scene(method, name)
    call = dict(lime=_lime_library).get(method, _captum)(method, model, x)
    return min(seconds(partial(call, batch), S.repeats) for batch in batches)


def _captum(method, model, x):
    "`call(batch)`: captum's counterpart, with a baseline of white pixels as ours."
    import captum.attr
    o = S.options[method]
    if method == 'smoothgrad':
        f = captum.attr.NoiseTunnel(captum.attr.Saliency(model)).attribute
        given = dict(nt_samples=o['n_samples'], stdevs=o['noise'], abs=False)
    elif method == 'integrated_gradients':
        f, given = captum.attr.IntegratedGradients(model).attribute, dict(n_steps=o['n_steps'], baselines=1.)
    else:
        f, given = captum.attr.Occlusion(model).attribute, dict(baselines=1., strides=(3, *[o['stride']]*2),
                                                               sliding_window_shapes=(3, *[o['window']]*2))

    def batched(batch):
        if batch is None: return {}
        if method == 'integrated_gradients': return dict(internal_batch_size=batch)
        key = 'nt_samples_batch_size' if method == 'smoothgrad' else 'perturbations_per_eval'
        return {key: max(1, batch//len(x))}
    return lambda batch: f(x, target=1, **given, **batched(batch))


def _lime_library(method, model, x):
    "`call(batch)`: the library lime, superpixels hidden white."
    from lime.lime_image import LimeImageExplainer
    patches = (255*x).byte().permute(0, 2, 3, 1).cpu().numpy()

    def probabilities(a):
        with torch.no_grad(): z = model(torch.from_numpy(a).to(S.device).permute(0, 3, 1, 2).float()/255)
        return z.softmax(1).cpu().numpy()

    def call(batch):
        given = dict(labels=(1,), top_labels=None, hide_color=255, num_samples=S.options['lime']['n_samples'])
        given |= {} if batch is None else dict(batch_size=batch)
        for p in patches: LimeImageExplainer(random_state=0).explain_instance(p, probabilities, **given)
    return call


for method in METHODS:
    for name in NETWORKS:
        arms = dict(ours=partial(_explained, precision='fp32'), fast=partial(_explained, precision='bf16'), bare=_bare)
        if method != 'rise':   # no library here has it
            arms |= dict(library=partial(_library, batches=(None,)),
                         same=lambda *a: _library(*a, batches=(S.of_peers,)),
                         best=lambda *a: _library(*a, batches=S.batches))
        ARMS.update({f'{method}_{name}_{k}': partial(f, method, name) for k, f in arms.items()})


# Max-Sensitivity of the gradient, as many draws for both; captum's default is all draws of all images in one batch

def _sensitivity_ours(name):
    from pcam_tp.robustness import max_sensitivity
    from pcam_tp.saliency import saliency
    setup()
    model, x = _cam_scene(name)
    return seconds(lambda: max_sensitivity(model, x, saliency, 1, draws=S.draws, score='logit'), S.repeats)


def _sensitivity_captum(name, most=None):
    "`most` images a pass; None is captum's default."
    from captum.attr import Saliency
    from captum.metrics import sensitivity_max
    model, x = _cam_scene(name)

    def maps(images):
        images = images[0] if isinstance(images, tuple) else images
        return (Saliency(model).attribute(images, target=1).amax(1),)

    def work(): sensitivity_max(maps, x, perturb_radius=.05, n_perturb_samples=S.draws, max_examples_per_batch=most)
    return seconds(work, S.repeats)


for name in NETWORKS:
    ARMS.update({f'sensitivity_{name}_ours': partial(_sensitivity_ours, name),
                 f'sensitivity_{name}_library': partial(_sensitivity_captum, name),
                 f'sensitivity_{name}_same': lambda name=name: _sensitivity_captum(name, S.patches)})


# ROAD of nine shares, most and least relevant first: half of the maps smooth, half independent numbers

def _road_scene():
    torch.manual_seed(0)
    model, (_, x) = _network('small_cnn', **COURSE).eval(), _scene('lime', 'small_cnn')
    n = 2 if S.quick else 4*S.images if S.device.type != 'cpu' else 4
    x = x[:1].expand(n, -1, -1, -1) + .05*torch.rand(n, 3, 96, 96).to(S.device)
    smooth = F.interpolate(torch.rand(n - n//2, 1, 6, 6), (96, 96), mode='bilinear')[:, 0]
    return model, x.clamp(0, 1), torch.cat([smooth, torch.rand(n//2, 96, 96)])


PERCENTILES = 10, 20, 30, 40, 50, 60, 70, 80, 90


@arm
def road_course_ours():
    from pcam_tp.removal import road
    setup()
    model, x, maps = _road_scene()
    return seconds(lambda: road(model, x, maps.to(S.device), 1), S.repeats)


@arm
def road_course_library():
    from pytorch_grad_cam.metrics.road import ROADCombined
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputSoftmaxTarget
    model, x, maps = _road_scene()
    targets = [ClassifierOutputSoftmaxTarget(1)]*len(x)
    return seconds(lambda: ROADCombined([*PERCENTILES])(x, maps.numpy(), targets, model), 1)


@arm
def road_course_bare():
    "As many passes without any removal."
    setup()
    model, x, _ = _road_scene()
    x = x.repeat(2*len(PERCENTILES), 1, 1, 1).contiguous(memory_format=layout())

    def work(batch):
        with torch.no_grad(): return [model(part) for part in x.split(batch)]
    return min(seconds(partial(work, b), S.repeats) for b in S.batches)


# Insertion and deletion of the same maps, hidden pixels white; Quantus has deletion alone, in steps that divide the image

def _curve_scene(name):
    model, x = _scene('curves', name)
    return model, x, torch.rand(len(x), 96, 96, device=S.device)


def _curve_ours(metric, steps, name):
    "A metric of ours, and the name of its number of steps."
    measure = getattr(import_module('pcam_tp.faithfulness'), metric)
    setup()
    model, x, maps = _curve_scene(name)
    return seconds(lambda: measure(model, x, maps, 1, steps=getattr(S, steps)), S.repeats)


def _curves_loop(name):
    "One image and one threshold at a time, on ranks rather than on the map's values."
    model, x, maps = _curve_scene(name)

    def work():
        for image, m in zip(x, maps):
            rank = m.flatten().argsort().argsort().view_as(m)/m.numel()
            for t in np.linspace(1, 0, S.curve + 1):
                for seen in (rank >= t, rank < t):
                    with torch.no_grad(): model(torch.where(seen, image, 1.)[None]).softmax(1)[0, 1].item()
    return seconds(work, S.repeats)


def _curves_bare(name):
    setup()
    model, x, _ = _curve_scene(name)
    return _passes_alone(model, x, 2*len(x)*(S.curve + 1), False)


def _flips_quantus(name):
    "Quantus' PixelFlipping at its defaults; its steps count values of channels."
    if not hasattr(np, 'trapz'): np.trapz = np.trapezoid   # gone in NumPy 2.4, and Quantus 0.6 looks for it
    PixelFlipping = import_module('quantus').PixelFlipping   # no requirement: bench.py leaves its rows out without it
    model, x, maps = _curve_scene(name)
    flip = PixelFlipping(features_in_step=3*96*96//S.flips, perturb_baseline='white', disable_warnings=True)
    given = dict(x_batch=x.cpu().numpy(), y_batch=np.ones(len(x), int), a_batch=maps[:, None].cpu().numpy())
    return seconds(lambda: flip(model=model, device=S.device.type, channel_first=True, **given), S.repeats)


for name in NETWORKS:
    arms = dict(curves_ours=partial(_curve_ours, 'srg', 'curve'), curves_loop=_curves_loop, curves_bare=_curves_bare,
                flips_ours=partial(_curve_ours, 'deletion', 'flips'), flips_quantus=_flips_quantus)
    for k, f in arms.items():
        kind, _, who = k.partition('_')
        ARMS[f'{kind}_{name}_{who}'] = partial(f, name)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('arm', choices=ARMS, metavar='ARM', help=f'one of {", ".join(ARMS)}')
    parser.add_argument('--device', choices=DEVICES, default=best_device().type, help='the best there is by default')
    parser.add_argument('--quick', action='store_true', help='hardly any work: shows that the arm runs')
    args = parser.parse_args()
    use(args.device, args.quick)
    print(ARMS[args.arm]())


if __name__ == '__main__':
    main()
