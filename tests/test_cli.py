"""What tools/09_cli cannot show: the command as a process, its exit status and streams, Ctrl-C, several processes at once;
that each option does something; that shell and notebook agree."""
import json, os, re, shlex, signal, subprocess, sys, time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import torchvision
from typer.testing import CliRunner

from conftest import ROOT, run
from pcam_tp.agreement import model_agreement
from pcam_tp.cli import app
from pcam_tp.data import open_splits, subset, to_float
from pcam_tp.many_maps import read_maps
from pcam_tp.methods import explain
from pcam_tp.models import build, load_model, save_model
from pcam_tp.synthetic import write_synthetic

pytestmark = pytest.mark.xdist_group('cli')   # one worker draws the patches
PATCHES, CHUNK = 24, 2


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    "A home with few patches and two tiny networks."
    home = tmp_path_factory.mktemp('cli')
    source = write_synthetic(home/'few', dict(train=48, valid=16, test=PATCHES))
    for k in (0, 1): save_model(build('small_cnn', width=.1, seed=k), home/f'net{k}')
    return SimpleNamespace(home=home, source=source, nets=[home/'net0', home/'net1'])


@pytest.fixture
def shell(place, monkeypatch):
    "Run a line in this process."
    monkeypatch.setenv('PCAM_TP_HOME', str(place.home))
    monkeypatch.setenv('PCAM_TP_SOURCE', str(place.source))
    def call(line, ok=True):
        r = CliRunner().invoke(app, shlex.split(line), prog_name='pcam-tp')
        assert not ok or r.exit_code == 0, r.output
        return r
    return call


def environment(place, **more):
    return {**os.environ, 'PCAM_TP_HOME': str(place.home), 'PCAM_TP_SOURCE': str(place.source), 'OMP_NUM_THREADS': '1',
            'ACCELERATE_USE_CPU': '1', **more}


def process(place, line, **kw):
    "The command in a process of its own; the streams apart."
    return run(sys.executable, '-m', 'pcam_tp.cli', *shlex.split(line), ok=False, env=environment(place), stderr=subprocess.PIPE, **kw)


def listed(group=''):
    "The commands that `--help` lists."
    text = CliRunner().invoke(app, [*group.split(), '--help']).stdout
    return re.findall(r'^  ([a-z-]+) ', text.split('Commands:')[1], re.M)


def test_help_is_light_and_whole():
    "Help needs no torch: it comes at once. Every command says what it does and how."
    code = 'import sys; import pcam_tp.cli as c\ntry: c.main(["--help"])\nexcept SystemExit as e: print(e.code, [m for m in ("torch", "numpy", "pandas") if m in sys.modules])'
    out = run(sys.executable, '-c', code).stdout
    assert out.strip().endswith('0 []'), out
    assert set('download synthetic subset assets models train test explain measure agree plan report'.split()) <= set(listed())
    for group, names in (('', listed()), ('data', listed('data')), ('course', listed('course'))):
        for name in set(names) - {'data', 'course'}:
            r = CliRunner().invoke(app, [*group.split(), name, '--help'])
            assert r.exit_code == 0 and '--json' in r.stdout and '--debug' in r.stdout, name
            assert name == 'models' or f'    pcam-tp {group} {name} '.replace('  ', ' ') in re.sub(' +', ' ', r.stdout).replace('\n', ' '), f'{name} has no example'


def test_status_and_streams(place):
    "0, 1, 2; results on the standard output, all else on the other; one sentence, and a traceback on request."
    good = process(place, f'test --model {place.nets[0]} --num-images 8 --json')
    assert good.returncode == 0 and json.loads(good.stdout)['patches'] == 8 and 'torch' in good.stderr
    bad = process(place, 'test --model no-such --json')
    assert (bad.returncode, bad.stdout) == (1, '') and bad.stderr.splitlines()[-1].startswith("pcam-tp test: model 'no-such'")
    assert 'Traceback' not in bad.stderr
    assert 'Traceback' in process(place, 'test --model no-such --debug').stderr
    wrong = process(place, 'explain --no-such')
    assert (wrong.returncode, wrong.stdout) == (2, '') and '--no-such' in wrong.stderr


def test_an_error_that_nobody_foresaw_is_named(shell, monkeypatch):
    def broken(*args, **kwargs): raise KeyError('something')
    monkeypatch.setattr('pcam_tp.training.evaluate', broken)
    r = shell('test --model small_cnn --version none', ok=False)
    assert r.exit_code == 1 and "there are" in r.stderr
    r = shell(f'test --model {os.environ["PCAM_TP_HOME"]}/net0', ok=False)
    assert r.exit_code == 1 and "KeyError: 'something' (--debug shows where)" in r.stderr and 'Traceback' not in r.stderr


def wait_for_chunks(p, folder, n):
    while p.poll() is None and len(list(folder.glob('chunk-*.h5'))) < n: time.sleep(.02)


def explaining(place, out):
    return ['explain', '--models', place.nets[0], '--explanation', 'gradcam', 'smoothgrad', 'integrated_gradients', 'occlusion', '--chunk', CHUNK, '--batch-size', 2, '--device', 'cpu', '--out', out]


def content(out):
    maps, about = read_maps(out/'maps.h5')
    return maps | about


def furthest(a, b):
    "The largest difference between two sets of maps, relative to the largest value."
    assert a.keys() == b.keys()
    return max(np.abs(a[k] - b[k]).max()/max(np.abs(a[k]).max(), 1e-9) for k in a)


def test_ctrl_c_and_again(place, tmp_path):
    "130, no traceback, no half file; the same command goes on."
    line = [sys.executable, '-m', 'pcam_tp.cli', *map(str, explaining(place, tmp_path))]
    p = subprocess.Popen(line, cwd=ROOT, env=environment(place), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_chunks(p, tmp_path, 1)
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=120)
    assert p.returncode == 130 and out == '' and 'Traceback' not in err and 'stopped' in err.splitlines()[-1]
    done = {f: f.stat().st_mtime_ns for f in tmp_path.glob('chunk-*.h5')}
    assert 0 < len(done) < PATCHES//CHUNK and not list(tmp_path.glob('.*'))
    run(*line, env=environment(place))
    assert {f: f.stat().st_mtime_ns for f in done} == done and len(list(tmp_path.glob('chunk-*.h5'))) == PATCHES//CHUNK


def launch(place, *line, n=2):
    "Start the command in n processes; `accelerate launch` starts one on a processor, torchrun as many as it is told."
    many = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', n, '-m', 'pcam_tp.cli', *line]
    return subprocess.Popen([*map(str, many)], cwd=ROOT, env=environment(place), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def kill(p):
    "The launcher and the processes that it started, which have sessions of their own."
    parent = lambda d: int((d/'stat').read_text().rpartition(')')[2].split()[1])
    workers = [int(d.name) for d in Path('/proc').iterdir() if d.name.isdigit() and d.exists() and parent(d) == p.pid]
    for pid in (p.pid, *workers): os.kill(pid, signal.SIGKILL)
    p.communicate()


def finished(p):
    out, _ = p.communicate(timeout=300)
    assert p.returncode == 0, out[-3000:]
    return out


def test_processes_share_maps(place, shell, tmp_path):
    "Maps of one process, of two, and of two that were killed in the middle and started again."
    shell(shlex.join(map(str, explaining(place, tmp_path/'one'))))
    one = content(tmp_path/'one')
    p = launch(place, *explaining(place, tmp_path/'two'))
    wait_for_chunks(p, tmp_path/'two', 2)
    kill(p)
    done = {f: f.stat().st_mtime_ns for f in (tmp_path/'two').glob('chunk-*.h5')}
    assert 0 < len(done) and not (tmp_path/'two'/'maps.h5').exists(), 'it was not interrupted'
    finished(launch(place, *explaining(place, tmp_path/'two')))
    assert {f: f.stat().st_mtime_ns for f in done} == done
    far = furthest(one, content(tmp_path/'two'))
    print(f'largest difference between one process and two: {far:.2g} of the largest value')
    assert far < 1e-5


def test_processes_share_a_leaderboard(place, shell, tmp_path):
    line = ['measure', '--model', place.nets[0], '--explanation', 'saliency', '--metrics', 'relevance_mass', 'average_drop', '--chunk', 8, '--device', 'cpu']
    one = shell(shlex.join(map(str, [*line, '--out', tmp_path/'one'])))
    out = finished(launch(place, *line, '--out', tmp_path/'two'))
    heads = [len(re.findall(r'method +relevance_mass +average_drop', text)) for text in (out, one.stdout)]
    assert heads == [1, 1], 'one process tells'
    a, b = (pd.read_csv(tmp_path/k/'leaderboard.csv') for k in ('one', 'two'))
    pd.testing.assert_frame_equal(a, b, rtol=1e-5)


def test_shell_and_notebook_agree(place, shell):
    "`agree`: its numbers are those of the library's calls; each of its options changes them."
    few = subset(open_splits()[2], 12)
    nets = {p.name: load_model(p) for p in place.nets}
    x = to_float(few.patches()).cpu()
    maps = {k: explain(m, x, methods='saliency')['saliency'] for k, m in nets.items()}
    pred = {k: m(x).argmax(1) for k, m in nets.items()}
    expected = model_agreement(maps, by=few.slides, pred=pred, y=few.y, measures=['top_iou'], q=.1)
    line = f'agree --models {place.nets[0]} {place.nets[1]} --num-images 12 --device cpu --json'
    ask = lambda more: pd.DataFrame(json.loads(shell(f'{line} {more}').stdout))
    table = ask('--explanation saliency --similarity-measure top_iou --q 0.1')
    assert list(table.condition) == list(expected.condition)
    np.testing.assert_allclose(table.estimate.astype(float), expected.estimate, rtol=1e-5)
    both = ask('--explanation saliency gradcam --similarity-measure top_iou rank_correlation')
    assert set(zip(both.explanation, both.measure)) == {(e, m) for e in ('saliency', 'gradcam') for m in ('top_iou', 'rank_correlation')}


def trained(shell, line):
    told = json.loads(shell(f'train {line} --epochs 1 --precision no --device cpu --json').stdout)
    return told, load_model(told['folder'])


def body(model): return {k: v.cpu() for k, v in model.net.state_dict().items() if not k.startswith(f'{model.head}.')}
def head(model): return {k: v.cpu() for k, v in model.net.state_dict().items() if k.startswith(f'{model.head}.')}
def moved(a, b): return [k for k in a if not torch.equal(a[k], b[k])]


def test_frozen_means_frozen(shell):
    "Weights and running statistics of the body stand still, the head learns; without the flag everything learns."
    first = build('small_cnn', width=.5, dropout=.3)
    _, frozen = trained(shell, '--freeze --batch-size 16')
    _, free = trained(shell, '--batch-size 16')
    assert not moved(body(first), body(frozen)) and moved(head(first), head(frozen))
    assert len(moved(body(first), body(free))) > 20


def test_pretrained_from_a_file_or_not_at_all(shell, tmp_path, monkeypatch):
    torch.manual_seed(7)
    given = torchvision.models.resnet18()
    torch.save(given.state_dict(), tmp_path/'given.pth')
    told, net = trained(shell, f'--model resnet18 --pretrained {tmp_path/"given.pth"} --freeze --batch-size 16')
    assert not moved(body(net), {k: v.cpu() for k, v in given.state_dict().items()}) and net.card['pretrained'] is True
    address = torchvision.models.get_model_weights('resnet18').DEFAULT.value
    monkeypatch.setattr(address, 'url', 'http://localhost:9/resnet18-00000000.pth')
    r = shell('train --model resnet18 --pretrained --epochs 1', ok=False)
    assert r.exit_code == 1 and 'cannot be had' in r.stderr and '--pretrained weights.pth' in r.stderr


def test_every_option_of_training_counts(shell, place, monkeypatch):
    "Batch size, seed and rate make another network; threads that read do not."
    base, _ = trained(shell, '--batch-size 16')
    for other in ('--batch-size 8', '--batch-size 16 --seed 1', '--batch-size 16 --lr 0.01'):
        assert trained(shell, other)[0]['version'] != base['version'], other
    assert trained(shell, '--batch-size 16 --num-workers 3')[0]['version'] == base['version']
    import pcam_tp.data as d
    asked, ahead = [], d.ahead
    monkeypatch.setattr(d, 'ahead', lambda read, parts, n: (asked.append(n), ahead(read, parts, n))[1])
    shell('test --version {version} --num-workers 3 --device cpu'.format(**base))
    assert asked == [3]
    sizes, forward = [], torch.nn.Conv2d.forward
    monkeypatch.setattr(torch.nn.Conv2d, 'forward', lambda self, x: (sizes.append(len(x)), forward(self, x))[1])
    shell('test --version {version} --batch-size 5 --device cpu'.format(**base))
    assert max(sizes) == 5


def test_source_and_budget_are_options(place, shell, monkeypatch, tmp_path):
    monkeypatch.setenv('PCAM_TP_SOURCE', 'no/such/folder')
    r = shell(f'test --model {place.nets[0]} --source {place.source} --json')
    assert json.loads(r.stdout)['patches'] == PATCHES
    assert shell(f'test --model {place.nets[0]} --json', ok=False).exit_code == 1
    assert shell(f'test --model {place.nets[0]} --source {place.source} --budget huge', ok=False).exit_code == 1
    assert os.environ['PCAM_TP_SOURCE'] == 'no/such/folder'


def test_usual_metrics_fit_the_patches(place, shell, tmp_path, monkeypatch):
    "Without known regions the usual metrics leave out what needs them; asked for, it is refused before any work."
    from PIL import Image
    rng = np.random.default_rng(0)
    for i in range(18):
        (tmp_path/'own'/'abc'[i % 3]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (96, 96, 3), np.uint8)).save(tmp_path/'own'/'abc'[i % 3]/f'{i}.png')
    shell(f'data import {tmp_path/"own"} {tmp_path/"made"}')
    save_model(build('small_cnn', width=.1, n_classes=3, classes=['a', 'b', 'c']), tmp_path/'net')
    line = f'{tmp_path/"net"} --explanation saliency --device cpu --source {tmp_path/"made"}'
    page = Path(shell(f'report {tmp_path/"page"} --models {line}').stdout.strip()).read_text()
    assert 'deletion' in page and 'relevance_mass' not in page
    assert {r['metric'] for r in json.loads(shell(f'measure --model {line} --json').stdout)} == {'insertion', 'deletion'}
    monkeypatch.setattr('pcam_tp.cli._network', lambda *a: pytest.fail('work before the question is looked at'))
    r = shell(f'measure --model {line} --metrics relevance_mass', ok=False)
    assert r.exit_code == 1 and "'relevance_mass' needs the true regions" in r.stderr


def test_patches_that_were_trained_on_are_not_for_validation(tmp_path, monkeypatch):
    "Of pcam-small, valid is cut in two: more patches than the budget's are not cut anew."
    from pcam_tp.cli import _part
    from pcam_tp.core import using
    monkeypatch.setenv('PCAM_TP_HOME', str(tmp_path))
    write_synthetic(tmp_path/'data'/'pcam', dict(valid=60, test=8))
    with using('pcam-small', 'quick'):
        trained_on, valid, _ = open_splits()
        for n in (5, 3_000):
            part = _part(dict(split='valid', num_images=n, seed=0))
            assert not set(part.rows) & set(trained_on.rows) and len(part) == min(n, len(valid))


def test_labels_go_by_name(place, shell):
    "Of a network that has the split's classes in another order, and one more."
    three = build('small_cnn', width=.1, n_classes=3, classes=['tumour', 'fat', 'normal'])
    save_model(three, place.home/'three')
    rows = place.home/'three.csv'
    shell(f'test --model {place.home/"three"} --split test --out {rows}')
    assert list(pd.read_csv(rows).y) == [2 if y == 0 else 0 for y in open_splits()[2].y]
    save_model(build('small_cnn', width=.1, classes=['benign', 'malignant']), place.home/'foreign')
    r = shell(f'test --model {place.home/"foreign"} --split test', ok=False)
    assert r.exit_code and 'benign' in r.output and 'Traceback' not in r.output
