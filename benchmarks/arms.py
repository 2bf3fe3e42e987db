"""One arm of a benchmark, alone in a fresh process: `python benchmarks/arms.py ARM` prints the seconds of its work.

Allocator and threads are settings of a whole process, so two arms must never share one.
"""
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.nn.functional as F

from pcam_tp.core import BUDGETS, setup
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
    "The same conversion from an array that lies in memory as a whole."
    from pcam_tp.data import open_split, to_float
    split = open_split('train', folder())
    x, y, rng = np.array(split.raw), torch.from_numpy(split.y), np.random.default_rng(0)

    def epoch():
        order = rng.permutation(len(x))
        for i in range(0, len(x), BATCH): to_float(x[order[i:i + BATCH]]), y[order[i:i + BATCH]]
    return seconds(epoch)


@arm
def batches_torchvision():
    from torch.utils.data import DataLoader
    from torchvision.datasets import PCAM
    from torchvision.transforms import ToTensor
    with TemporaryDirectory() as root:
        (Path(root)/'pcam').symlink_to(folder())
        loader = DataLoader(PCAM(root, 'train', transform=ToTensor()), BATCH, shuffle=True)
        return seconds(lambda: [None for _ in loader], repeats=1)


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
    from pcam_tp.cam import cams
    setup(verbose=False)
    model, x = _cam_model(name)
    return seconds(lambda: cams(model, x, 1, score='logit'))


def _cam_library(name, batch):
    from pytorch_grad_cam import GradCAM, GradCAMPlusPlus, HiResCAM, LayerCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    from pcam_tp.models import get_layer
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


if __name__ == '__main__':
    print(ARMS[sys.argv[1]]())
