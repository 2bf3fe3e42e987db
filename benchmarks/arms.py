"""One arm of a benchmark, alone in a fresh process: `python benchmarks/arms.py ARM` prints the seconds of its work.

Allocator and threads are settings of a whole process, so two arms must never share one.
"""
import sys
import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import h5py
import numpy as np
import torch
import torch.nn.functional as F

from pcam_tp.core import BUDGETS, home, make_once, setup
from pcam_tp.synthetic import synthetic_folder

BATCH, STEPS, PATCHES = 64, 3, 32
ARMS = {}


def arm(f):
    ARMS[f.__name__] = f
    return f


def folder():
    "The quick budget's synthetic patches."
    return synthetic_folder({s: BUDGETS['quick'][f'n_{s}'] for s in ('train', 'valid', 'test')})


def seconds(work, repeats=3):
    "The fastest of `repeats` calls after one that warms up."
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


# Shuffled float32 batches of the training patches, page cache warm

@arm
def batches_ours():
    from pcam_tp.data import Batches, open_split
    setup(verbose=False)
    batches = Batches(open_split('train', folder()), BATCH, shuffle=True)
    return seconds(lambda: [None for _ in batches])


@arm
def batches_ram():
    "The same batches from an array that lies in memory as a whole."
    from pcam_tp.data import open_split, to_float
    setup(verbose=False)
    split = open_split('train', folder())
    x, y, rng = split.raw[:], torch.from_numpy(split.y), np.random.default_rng(0)

    def epoch():
        order = rng.permutation(len(x))
        for i in range(0, len(x), BATCH): yield to_float(x[order[i:i + BATCH]]), y[order[i:i + BATCH]]
    return seconds(lambda: [None for _ in epoch()])


@arm
def batches_torchvision():
    from torch.utils.data import DataLoader
    from torchvision.datasets import PCAM
    from torchvision.transforms import ToTensor
    with TemporaryDirectory() as root:
        (Path(root)/'pcam').symlink_to(folder())
        loader = DataLoader(PCAM(root, 'train', transform=ToTensor()), BATCH, shuffle=True)
        return seconds(lambda: [None for _ in loader], repeats=1)


# 2,000 of 20,000 patches into a file of their own, in random order, from three layouts

LAYOUTS = dict(contiguous={}, rows=dict(chunks=(1, 96, 96, 3), compression='gzip'), blocks=dict(compression='gzip'))
CUT = np.random.default_rng(1).permutation(20_000)[:2_000]


def stored(name):
    "A file with 20,000 patches, made once: 2,000 synthetic ones, each copy with its own noise in the three lowest bits."
    def write(path):
        from pcam_tp.data import raw_file
        from pcam_tp.storage import read_rows
        base, rng = read_rows(raw_file(folder(), 'train', 'x'), 'x', slice(2_000)) & 0b11111000, np.random.default_rng(0)
        with h5py.File(path, 'w') as f:
            x = f.create_dataset('x', (20_000, 96, 96, 3), 'uint8', **LAYOUTS[name])
            step = x.chunks[0] if name == 'blocks' else len(base)
            for i in range(0, len(x), step): x[i:i + step] = base[np.arange(i, i + step) % len(base)] | rng.integers(0, 8, (step, 96, 96, 3), np.uint8)
    return make_once(home('data', 'benchmark')/f'{name}.h5', write)


def cut(name, work, repeats=3):
    "Seconds of `work(source, out)`; the source is in the page cache."
    source = stored(name)
    with open(source, 'rb') as f:
        while f.read(2**24): pass
    with TemporaryDirectory(dir=source.parent) as tmp:
        times = []
        for i in range(repeats):
            start = time.perf_counter()
            work(source, Path(tmp)/f'{i}.h5')
            times.append(time.perf_counter() - start)
    return min(times)


def _one_by_one(source, out, rows=CUT):
    "One read and one append to a gzip array for each patch."
    with h5py.File(source) as f, h5py.File(out, 'w') as g:
        x = g.create_dataset('x', (0, 96, 96, 3), 'uint8', maxshape=(None, 96, 96, 3), chunks=(1, 96, 96, 3), compression='gzip')
        for i, row in enumerate(rows):
            x.resize(i + 1, 0)
            x[i] = f['x'][row]


def _whole(source, out):
    with h5py.File(source) as f, h5py.File(out, 'w') as g: g['x'] = f['x'][:][CUT]


def _pass(source, out):
    "Decompress everything once, in blocks of the chunks' height, and keep nothing."
    with h5py.File(source) as f:
        for i in range(0, len(f['x']), f['x'].chunks[0]): f['x'][i:i + f['x'].chunks[0]]


def _cut_ours(source, out):
    from pcam_tp.storage import write_subset
    write_subset(source, out, CUT)


for name in LAYOUTS: ARMS[f'cut_{name}_ours'] = lambda name=name: cut(name, _cut_ours, 1 if name == 'blocks' else 3)
for name in ('contiguous', 'rows'): ARMS[f'cut_{name}_one_by_one'] = lambda name=name: cut(name, _one_by_one, 1)
ARMS['cut_blocks_one_by_one'] = lambda: len(CUT)/20*cut('blocks', lambda source, out: _one_by_one(source, out, CUT[:20]), 1)
ARMS['cut_blocks_whole'] = lambda: cut('blocks', _whole, 1)
ARMS['cut_blocks_pass'] = lambda: cut('blocks', _pass, 1)


# A training step

def _step(model, precision, layout):
    model = model.train().to(memory_format=layout)
    opt = torch.optim.AdamW(model.parameters())
    x, y = torch.rand(BATCH, 3, 96, 96).contiguous(memory_format=layout), torch.randint(0, 2, (BATCH,))

    def step():
        with torch.autocast('cpu', torch.bfloat16, enabled=precision == 'bf16'): loss = F.cross_entropy(model(x).float(), y)
        loss.backward()
        opt.step()
        opt.zero_grad()
    return seconds(step, STEPS)


def _network(name):
    "The bare network, in fp32 and PyTorch's default layout."
    from pcam_tp.models import build
    return build(name).net.to(memory_format=torch.contiguous_format)


for name in ('small_cnn', 'resnet18'):
    def plain(name=name): return _step(_network(name), 'no', torch.contiguous_format)
    def fp32(name=name): return _step(_network(name), setup(precision='no', verbose=False).precision, torch.channels_last)
    def default(name=name): return _step(_network(name), setup(verbose=False).precision, torch.channels_last)
    ARMS.update({f'step_{name}_plain': plain, f'step_{name}_fp32': fp32, f'step_{name}_default': default})


# Four class activation maps of each patch, fp32

def _cam_model(name):
    from pcam_tp.models import build
    return build(name).eval(), torch.rand(PATCHES, 3, 96, 96)


def _cam_ours(name):
    from pcam_tp.cam import CAMS
    from pcam_tp.questions import answers
    setup(verbose=False)
    model, x = _cam_model(name)
    return seconds(lambda: answers(CAMS, model, x, 1, score='logit'))


def _cam_library(name, batch):
    from pytorch_grad_cam import GradCAM, GradCAMPlusPlus, HiResCAM, LayerCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    from pcam_tp.classifier import get_layer
    model, x = _cam_model(name)
    model = model.to(memory_format=torch.contiguous_format)
    explainers = [C(model=model, target_layers=[get_layer(model, model.layers[-1])]) for C in (GradCAM, HiResCAM, GradCAMPlusPlus, LayerCAM)]

    def work():
        for xb in x.split(batch):
            for e in explainers: e(input_tensor=xb, targets=[ClassifierOutputTarget(1)]*len(xb))
    return seconds(work)


for name in ('small_cnn', 'resnet18'):
    ARMS.update({f'cam_{name}_ours': lambda name=name: _cam_ours(name),
                 f'cam_{name}_single': lambda name=name: _cam_library(name, 1),
                 f'cam_{name}_batch': lambda name=name: _cam_library(name, PATCHES)})


# Explanations by many passes: ours, in bf16, the library's at our batch size, at its defaults, and the bare passes

IMAGES, BATCHES = 2, (8, 16, 32, 64)
WORK = dict(integrated_gradients=(50, True), smoothgrad=(25, True), occlusion=(121, False), lime=(1000, False))   # passes, with gradients?


def _scene(method, name, layout=torch.channels_last):
    from pcam_tp.models import build
    torch.manual_seed(0)
    x = torch.rand(1 if method == 'lime' else IMAGES, 3, 96, 96)
    return build(name).eval().to(memory_format=layout), F.interpolate(F.avg_pool2d(x, 8), (96, 96), mode='bicubic').clamp(0, 1)


def _explained(method, name, precision):
    from pcam_tp.methods import METHODS
    setup(verbose=False)
    model, x = _scene(method, name)
    return seconds(lambda: METHODS[method](model, x, 1, score='probability' if method == 'lime' else 'logit', precision=precision), 1)


def _bare(method, name, most=200):
    "As many passes as the method needs with no method around them, at the best batch size; from `most` of them."
    setup(verbose=False)
    model, x = _scene(method, name)
    passes, backward = WORK[method]
    total = passes*len(x)

    def work(batch):
        for n in range(0, min(total, most), batch):
            images = x[:1].expand(min(batch, min(total, most) - n), -1, -1, -1).contiguous(memory_format=torch.channels_last)
            with torch.set_grad_enabled(backward): out = model(images.requires_grad_(backward))
            if backward: torch.autograd.grad(out[:, 1].sum(), images)
    return total/min(total, most)*min(seconds(lambda: work(b), 1) for b in BATCHES)


def _library(method, name, same):
    "captum's or lime's own code in a plain process; with `same`, batches of 32 images, as ours, else its defaults."
    import captum.attr
    model, x = _scene(method, name, torch.contiguous_format)
    if method == 'lime': return _lime_library(model, x, dict(batch_size=32) if same else {})
    if method == 'integrated_gradients':
        call = lambda: captum.attr.IntegratedGradients(model).attribute(x, target=1, n_steps=50, **(dict(internal_batch_size=32) if same else {}))
    elif method == 'occlusion':
        call = lambda: captum.attr.Occlusion(model).attribute(x, (3, 16, 16), (3, 8, 8), target=1, **(dict(perturbations_per_eval=32//IMAGES) if same else {}))
    else:
        tunnel = captum.attr.NoiseTunnel(captum.attr.Saliency(model))
        call = lambda: tunnel.attribute(x, nt_samples=25, stdevs=.15, target=1, abs=False, **(dict(nt_samples_batch_size=32//IMAGES) if same else {}))
    return seconds(call, 1)


def _lime_library(model, x, options):
    import lime.lime_image
    image = (255*x[0]).byte().permute(1, 2, 0).numpy()

    def probabilities(images):
        with torch.no_grad(): return model(torch.from_numpy(images).permute(0, 3, 1, 2).float()/255).softmax(1).numpy()
    return seconds(lambda: lime.lime_image.LimeImageExplainer(random_state=0).explain_instance(image, probabilities, labels=(1,), top_labels=None, num_samples=1000, **options), 1)


for method in WORK:
    for name in ('small_cnn', 'resnet18'):
        arms = dict(ours=partial(_explained, precision='fp32'), fast=partial(_explained, precision='bf16'), bare=_bare,
                    same=partial(_library, same=True), library=partial(_library, same=False))
        ARMS.update({f'{method}_{name}_{k}': partial(f, method, name) for k, f in arms.items()})


if __name__ == '__main__':
    print(ARMS[sys.argv[1]]())
