"What 02_training cannot show in one process: runs that are killed, and two processes that train one network."
import json, sys
from pathlib import Path

from conftest import python, run

FEW = '''
import hashlib, os, random, signal, sys
import torch
from pcam_tp import training
from pcam_tp.data import open_split, subset
from pcam_tp.models import Classifier, build
torch.set_num_threads(1)
def fingerprint(model):
    return hashlib.sha256(b''.join(v.contiguous().numpy().tobytes() for v in model.state_dict().values())).hexdigest()
'''

KILLS = FEW + '''
train, valid = subset(open_split('train'), 64), subset(open_split('valid'), 16)
def run_in_child(file, kill_after):
    "Train in a forked process that kills itself at its `kill_after`-th batch, if it gets there; True when it was killed."
    pid = os.fork()
    if pid: return os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    batches, augment = 0, training.augment
    def count(*args):
        nonlocal batches
        batches += 1
        if batches == kill_after: os.kill(os.getpid(), signal.SIGKILL)
        return augment(*args)
    training.augment = count
    model = build('small_cnn', width=.05, dropout=.3)
    history = training.train(model, train, valid, epochs=30, batch_size=16, precision='no', device='cpu', checkpoint=file)
    with open(f'{file}.result', 'w') as f: f.write(f'{fingerprint(model)} {len(history)} {history.train_loss.tolist()}')
    os._exit(0)
undisturbed, disturbed = sys.argv[1:]
assert not run_in_child(undisturbed, 0)
random.seed(0)
kills = 0
while kills < 20 and run_in_child(disturbed, random.randint(1, 7)): kills += 1
assert kills == 20, f'the run was over after {kills} kills'
assert not run_in_child(disturbed, 0)
'''


def test_twenty_kills(tmp_path):
    "A run that was killed twenty times ends with the weights and losses of an undisturbed one, and leaves no half-written file."
    python(KILLS, tmp_path/'a.pt', tmp_path/'b.pt')
    assert (tmp_path/'a.pt.result').read_text() == (tmp_path/'b.pt.result').read_text()
    assert {f.name for f in tmp_path.iterdir()} == {'a.pt', 'b.pt', 'a.pt.result', 'b.pt.result'}


PROCESSES = FEW + '''
import json
from torch import nn
from pcam_tp.core import home
train, valid = subset(open_split('train'), 256), subset(open_split('valid'), 64)
colour = Classifier(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)))   # no augmentation changes what it sees
for v in colour.net.parameters(): nn.init.zeros_(v)
training.train(colour, train, valid, epochs=2, stain=0, precision='no', device='cpu')
model = training.trained('small_cnn', train, valid, width=.05, epochs=2)
rank = int(os.environ.get('RANK', 0))
row = dict(colour=colour.net[2].weight.detach().tolist(), small_cnn=fingerprint(model), folder=model.card['folder'], seconds=model.card['training']['seconds'])
with open(f'{sys.argv[1]}/{os.environ.get("WORLD_SIZE", 1)}-{rank}.json', 'w') as f: json.dump(row, f)
'''


def test_two_processes(tmp_path, monkeypatch):
    "Two processes see the batches of one: same weights where nothing depends on the share; one network, written once, loaded by both."
    script = tmp_path/'script.py'
    script.write_text(PROCESSES)
    monkeypatch.setenv('PCAM_TP_SOURCE', str(synthetic()))
    monkeypatch.setenv('ACCELERATE_USE_CPU', 'true')
    launch = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node']   # `accelerate launch` starts one process on a CPU
    for n in (1, 2):
        monkeypatch.setenv('PCAM_TP_HOME', str(tmp_path/f'home{n}'))
        run(*(launch + [n] if n > 1 else [sys.executable]), script, tmp_path)
    one, a, b = (json.loads((tmp_path/f'{k}.json').read_text()) for k in ('1-0', '2-0', '2-1'))
    assert a == b and Path(a['folder']).is_dir()
    assert all(abs(x - y) < 1e-6 for u, v in zip(one['colour'], a['colour']) for x, y in zip(u, v)), (one, a)
    assert any(x for v in a['colour'] for x in v)
    assert not list((tmp_path/'home2').rglob('*.run.pt'))


def synthetic():
    "The embedded patches, wherever this checkout keeps them."
    from pcam_tp.synthetic import synthetic_folder
    return synthetic_folder()
