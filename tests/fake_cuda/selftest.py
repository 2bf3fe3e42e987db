"The simulated device behaves as a GPU does; test_cuda.py runs it in a process that has the device."
import copy, io, pickle, threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import fake_cuda   # after torch, which installs it

DEVICE = torch.device('cuda:0')
MIX = 'Expected all tensors to be on the same device'
cpu = lambda *shape: torch.randn(*shape)
gpu = lambda *shape: torch.randn(*shape, device='cuda')


@pytest.fixture(autouse=True)
def seeded(): torch.manual_seed(0)


def refused(f, text, error=RuntimeError):
    with pytest.raises(error) as e: f()
    assert text in str(e.value)


def test_helpers():
    c = torch.cuda
    assert c.is_available() and c.device_count() == 1 and c.current_device() == 0 and c.is_initialized()
    assert isinstance(c.get_device_name(), str) and c.get_device_capability()[0] >= 7 and c.is_bf16_supported()
    assert c.get_device_properties(0).total_memory > 0 and c.max_memory_allocated() >= 0 and len(c.mem_get_info()) == 2
    start, end = c.Event(enable_timing=True), c.Event(enable_timing=True)
    start.record()
    end.record()
    assert start.elapsed_time(end) >= 0
    with c.device(0), c.stream(c.Stream()): c.synchronize()
    refused(lambda: c.get_device_name(1), 'invalid device ordinal')
    assert torch.accelerator.is_available() and torch.accelerator.current_accelerator().type == 'cuda'
    assert fake_cuda.why_not() == 'it is installed already'


def test_device_of_a_tensor():
    x = cpu(2, 3).to('cuda')
    assert x.device == DEVICE and x.is_cuda and str(x.device) == 'cuda:0' and x.get_device() == 0
    assert x.device != torch.device('cuda') and x.to('cuda') is x and x.to(x.device) is x and x.cuda() is x
    assert x.type() == 'torch.cuda.FloatTensor' and isinstance(x, torch.Tensor) and x.cpu().device.type == 'cpu'


FACTORIES = dict(
    zeros=lambda: torch.zeros(3, device='cuda'), tensor=lambda: torch.tensor([1, 2], device='cuda'),
    arange=lambda: torch.arange(4, device='cuda'), full=lambda: torch.full((2,), 1., device='cuda'),
    eye=lambda: torch.eye(3, device='cuda'), linspace=lambda: torch.linspace(0, 1, 5, device='cuda'),
    as_tensor=lambda: torch.as_tensor(np.ones(3), device='cuda'), randperm=lambda: torch.randperm(5, device='cuda'),
    empty_like=lambda: torch.empty_like(cpu(2), device='cuda'), zeros_like=lambda: torch.zeros_like(gpu(2)),
    new_zeros=lambda: gpu(2).new_zeros(3), new_ones=lambda: cpu(2).new_ones(2, device='cuda'),
    number=lambda: torch.tensor(1., device='cuda'), rand=lambda: torch.rand(2, device=gpu(1).device))

@pytest.mark.parametrize('name', FACTORIES)
def test_factories(name): assert FACTORIES[name]().device == DEVICE


def test_factories_elsewhere():
    assert torch.zeros_like(gpu(2), device='cpu').device.type == gpu(3).new_empty(1, device='cpu').device.type == 'cpu'
    with torch.device('cuda'): assert torch.ones(2).is_cuda and nn.Linear(2, 2).weight.is_cuda
    assert torch.arange(4, device='cuda').tolist() == [0, 1, 2, 3]


def test_no_numpy():
    x, text = gpu(2), "can't convert cuda:0 device type tensor to numpy"
    for f in (x.numpy, x.__array__, lambda: np.asarray(x), lambda: np.array(x), lambda: np.allclose(x, np.zeros(2))):
        refused(f, text, TypeError)
    refused(lambda: gpu(2).requires_grad_().numpy(), text, TypeError)
    refused(lambda: memoryview(x), 'memoryview', TypeError)
    assert x.cpu().numpy().shape == x.numpy(force=True).shape == (2,)


def test_numbers_come_over():
    x = torch.tensor(2.5, device='cuda')
    assert x.item() == 2.5 and float(x) == 2.5 and int(x) == 2 and bool(x) and f'{x:.2f}' == '2.50' and round(x.item()) == 2
    assert [1, 2, 3][torch.tensor(1, device='cuda')] == 2 and torch.tensor([1., 2.], device='cuda').max() == 2
    assert len(gpu(3)) == 3 and all(t.is_cuda for t in gpu(3, 2)) and len(gpu(2, 2).tolist()) == 2


MIXED = dict(
    add=lambda x, y: x + y, mul=lambda x, y: y*x, matmul=lambda x, y: x @ y, stack=lambda x, y: torch.stack([x, y]),
    cat=lambda x, y: torch.cat([x, y]), where=lambda x, y: torch.where(x > 0, x, y), add_=lambda x, y: x.add_(y),
    into_cpu=lambda x, y: y.add_(x), conv=lambda x, y: F.conv2d(x[None, None], y[None, None, :2, :2]),
    linear=lambda x, y: F.linear(x, y), mse=lambda x, y: F.mse_loss(x, y), equal=lambda x, y: torch.equal(x, y),
    index_select=lambda x, y: x.index_select(0, torch.tensor([0])), allclose=lambda x, y: torch.allclose(x, y),
    gather=lambda x, y: x.gather(0, torch.zeros(3, 3, dtype=torch.long)), lerp=lambda x, y: torch.lerp(x, x, y),
    embedding=lambda x, y: F.embedding(torch.tensor([0]), x), masked_fill=lambda x, y: x.masked_fill(y > 0, 0.),
    cross_entropy=lambda x, y: F.cross_entropy(x, torch.tensor([0, 1, 2])),
    net_on_cuda=lambda x, y: nn.Linear(3, 3).cuda()(y), net_on_cpu=lambda x, y: nn.Linear(3, 3)(x))

@pytest.mark.parametrize('name', MIXED)
def test_mixing_is_refused(name): refused(lambda: MIXED[name](gpu(3, 3), cpu(3, 3)), MIX)


def test_assert_close_sees_the_device(): refused(lambda: assert_close(gpu(3), cpu(3)), 'device', AssertionError)


def test_cpu_numbers_are_allowed():
    x, n = gpu(3), torch.tensor(2.)
    for y in (x*n, n + x, x > n, torch.where(x > 0, x, n), x.mul_(n), x.masked_fill(x > 0, n), x.clamp(n), torch.pow(x, n)):
        assert y.is_cuda
    x[0] = n
    assert x[0] == 2
    refused(lambda: torch.stack([torch.tensor(1., device='cuda'), n]), MIX)
    refused(lambda: cpu(3) + torch.tensor(1., device='cuda'), MIX)
    refused(lambda: torch.tensor(1.).add_(torch.tensor(1., device='cuda')), MIX)


def test_indices():
    x, i, m = gpu(4, 2), torch.tensor([0, 2]), torch.tensor([True, False, True, False])
    assert x[i].is_cuda and x[m].shape == (2, 2) and x[i.cuda()].is_cuda and x[[0, 1]].is_cuda
    assert x[np.array([0, 1])].is_cuda and x[i, i % 2].is_cuda
    x[i] = 0.
    x[m] = 1.
    x[i] = gpu(2, 2)
    refused(lambda: cpu(4)[i.cuda()], 'indices should be either on cpu or on the same device as the indexed tensor (cpu)')
    refused(lambda: x.__setitem__(i, cpu(2, 2)), MIX)


def test_slices_copy_from_anywhere():
    x, y = gpu(4, 2), cpu(4, 2)
    x[:2] = cpu(2, 2)
    y[1:3] = x[:2]
    y.copy_(x)
    x.copy_(y)
    assert torch.equal(x.cpu(), y) and y.device.type == 'cpu'


def test_views_share_memory():
    x = torch.zeros(4, 3, device='cuda')
    x[1].fill_(1)
    x[:, 2] += 5
    x.view(-1)[0] = 7
    x.t()[1, 3] = 9
    assert x.tolist() == [[7, 0, 5], [1, 1, 6], [0, 0, 5], [0, 9, 5]]
    assert x.t_().shape == (3, 4) and x.stride() == (1, 3) and x.unsqueeze_(0).shape == (1, 3, 4)
    assert x.squeeze_().transpose_(0, 1).shape == (4, 3)
    y = torch.empty(0, device='cuda')
    assert torch.cat([gpu(2), gpu(3)], out=y) is y and y.shape == (5,)
    assert y.resize_(2, 2).shape == (2, 2) and y[:1].untyped_storage().data_ptr() == y.untyped_storage().data_ptr()
    z = gpu(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in (z, z.to('cpu')))


def test_autograd_agrees():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 2))
    twin, x, y = copy.deepcopy(net).cuda(), cpu(5, 3, 8, 8), torch.tensor([0, 1, 0, 1, 1])
    F.cross_entropy(net(x), y).backward()
    F.cross_entropy(twin(x.cuda()), y.cuda()).backward()
    assert all(q.grad.is_cuda for q in twin.parameters()) and all(b.is_cuda for b in twin.buffers())
    for p, q in zip(net.parameters(), twin.parameters()): assert_close(p.grad, q.grad.cpu(), rtol=1e-5, atol=1e-6)
    for p, q in zip(net.buffers(), twin.buffers()): assert_close(p, q.cpu())


def test_second_derivatives_and_functions():
    x = gpu(3).requires_grad_()
    g, = torch.autograd.grad((x**3).sum(), x, create_graph=True)
    assert_close(torch.autograd.grad(g.sum(), x)[0], 6*x.detach())
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return 2*x
        @staticmethod
        def backward(ctx, g):
            assert g.is_cuda and ctx.saved_tensors[0].is_cuda
            return 2*g
    Double.apply(x).sum().backward()
    assert x.grad.tolist() == [2]*3
    assert torch.autograd.functional.jacobian(lambda v: v**2, gpu(2)).is_cuda
    assert torch.func.vmap(lambda t: (t*t).sum())(gpu(3, 2)).shape == (3,)


def test_hooks_and_in_place():
    x, seen = gpu(3).requires_grad_(), []
    y = x*2
    y.register_hook(lambda g: seen.append(g.device.type))
    y.retain_grad()
    y.sum().backward()
    assert seen == ['cuda'] and y.grad.is_cuda and y.grad_fn is not None
    refused(lambda: setattr(x, 'grad', cpu(3)), 'device')
    refused(lambda: x.add_(1), 'leaf Variable')
    with torch.no_grad(): assert not (x*2).requires_grad
    b = (x*1).exp()
    b.mul_(2)
    refused(lambda: b.sum().backward(), 'modified by an inplace operation')
    net, got = nn.Linear(3, 2).cuda(), []
    net.register_full_backward_hook(lambda m, i, o: got.append(o[0].device.type))
    net.register_forward_hook(lambda m, i, o: got.append(o.device.type))
    net(x).sum().backward()
    assert got == ['cuda']*2


def test_inference_mode():
    x = gpu(4, 1, 4, 4)
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(.5), nn.Flatten(), nn.Linear(8, 2)).cuda().eval()
    with torch.inference_mode():
        assert all(net(b).is_cuda for b in x.split(2)) and x.view(4, 16).t().is_cuda
        assert not x[1:].is_inference() and (x[:2] + 1).is_inference()
        y = net(gpu(2, 1, 4, 4))
        assert y.is_cuda and y.is_inference() and y.softmax(1).cpu().numpy().shape == (2, 2)
        assert y.to('cpu').device.type == 'cpu' and y.to('cuda').is_cuda and y.type(torch.float64).is_cuda
        refused(lambda: net(cpu(2, 1, 4, 4)), MIX)
        assert torch.zeros(2, device='cuda').is_cuda


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    x = gpu(2, 3, 4, 4)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)).cuda()
    with torch.autocast('cuda', dtype):
        y = net(x)
        assert y.dtype == dtype and y.softmax(1).dtype == F.mse_loss(y, y).dtype == torch.float32
    y.float().sum().backward()
    assert net[0].weight.grad.dtype == torch.float32
    with torch.autocast('cpu', dtype): assert (x.flatten(1) @ x.flatten(1).T).dtype == torch.float32


def seeded_rand(device):
    torch.manual_seed(3)
    return torch.rand(4, device=device)


def test_random_numbers():
    "The same seed, other numbers than the processor's, whose generator is left alone."
    a, b, c = seeded_rand('cuda'), seeded_rand('cuda'), seeded_rand('cpu')
    assert torch.equal(a, b) and not torch.equal(a.cpu(), c)
    torch.manual_seed(3)
    for f in (lambda: torch.rand(9, device='cuda'), lambda: F.dropout(gpu(5)), lambda: torch.randn_like(gpu(3))): f()
    assert torch.equal(torch.rand(4), c)
    state = torch.cuda.get_rng_state()
    d = gpu(3)
    torch.cuda.set_rng_state(state)
    assert torch.equal(d, gpu(3))


@pytest.mark.parametrize('devices, kept', [([0], True), ([DEVICE], True), ([], False)])
def test_fork_rng(devices, kept):
    state = torch.cuda.get_rng_state()
    with torch.random.fork_rng(devices=devices): F.dropout(gpu(3))
    assert torch.equal(state, torch.cuda.get_rng_state()) == kept


DRAWS = dict(rand=lambda **k: torch.rand(2, **k), randn=lambda **k: torch.randn(2, **k),
             randint=lambda **k: torch.randint(5, (2,), **k), randperm=lambda **k: torch.randperm(3, **k))

@pytest.mark.parametrize('name', DRAWS)
def test_generators(name):
    f, g, h = DRAWS[name], torch.Generator('cuda').manual_seed(1), torch.Generator().manual_seed(1)
    assert f(device='cuda', generator=g).is_cuda and not f(generator=h).is_cuda
    refused(lambda: f(device='cuda', generator=h), "Expected a 'cuda' device type for generator but found 'cpu'")
    refused(lambda: f(generator=g), "Expected a 'cpu' device type for generator but found 'cuda'")


def test_generators_keep_their_state():
    g, h = torch.Generator('cuda').manual_seed(1), torch.Generator().manual_seed(1)
    assert g.device == DEVICE and h.device.type == 'cpu' and g.initial_seed() == 1
    assert isinstance(g, torch.Generator) and isinstance(h, torch.Generator)
    refused(lambda: gpu(2).normal_(generator=h), "Expected a 'cuda' device")
    refused(lambda: cpu(2).normal_(generator=g), "Expected a 'cpu' device")
    refused(lambda: torch.multinomial(torch.ones(3, device='cuda'), 2, generator=h), "Expected a 'cuda' device")
    state = g.get_state()
    a = torch.rand(2, device='cuda', generator=g)
    g.set_state(state)
    assert torch.equal(a, torch.rand(2, device='cuda', generator=g))


def test_modules_move_in_place():
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    before, opt = [id(p) for p in net.parameters()], torch.optim.SGD(net.parameters(), .1, momentum=.9)
    assert net.to('cuda') is net and [id(p) for p in net.parameters()] == before and net[1].running_mean.is_cuda
    assert all(isinstance(p, nn.Parameter) and p.is_cuda and p.requires_grad for p in net.parameters())
    net(gpu(4, 2)).sum().backward()
    opt.step()
    assert net[0].weight.grad.is_cuda
    net.half()
    assert net[0].weight.dtype == net[0].weight.grad.dtype == torch.float16 and net[0].weight.is_cuda
    net.float().cpu()
    assert type(net[0].weight) is nn.Parameter and net[0].weight.grad.device.type == 'cpu'
    assert [id(p) for p in net.parameters()] == before


def test_data_of_a_tensor():
    net, x = nn.Linear(2, 3).cuda(), gpu(3).requires_grad_()
    assert net.weight.data.is_cuda and not net.weight.data.requires_grad
    net.weight.data = torch.zeros(3, 2, device='cuda')
    assert net.weight.sum() == 0 and 'cuda:0' in repr(net.weight)
    net.weight.data.fill_(1)
    assert net.weight.sum() == 6
    y = x*2
    y.data = torch.ones(3, device='cuda')
    y.sum().backward()
    assert y.tolist() == [1]*3 and x.grad.tolist() == [2]*3


OPTIMISERS = dict(adamw=lambda p: torch.optim.AdamW(p, .1), adam=lambda p: torch.optim.Adam(p, .1, foreach=False),
                  sgd=lambda p: torch.optim.SGD(p, .1, momentum=.9, nesterov=True), rms=lambda p: torch.optim.RMSprop(p))

@pytest.mark.parametrize('name', OPTIMISERS)
def test_optimisers(name):
    net, x = nn.Linear(2, 2), cpu(3, 2)
    twin = copy.deepcopy(net).cuda()
    opts = [OPTIMISERS[name](n.parameters()) for n in (net, twin)]
    for _ in range(3):
        for n, opt, batch in zip((net, twin), opts, (x, x.cuda())):
            opt.zero_grad()
            n(batch).pow(2).sum().backward()
            nn.utils.clip_grad_norm_(n.parameters(), 1.)
            opt.step()
    assert_close(net.weight, twin.weight.cpu(), rtol=1e-5, atol=1e-6)
    again = OPTIMISERS[name](twin.parameters())
    again.load_state_dict(opts[1].state_dict())
    assert all(v.is_cuda for s in again.state.values() for k, v in s.items() if torch.is_tensor(v) and k != 'step')


def test_grad_scaler():
    net, scaler = nn.Linear(2, 2).cuda(), torch.amp.GradScaler('cuda')
    opt, before = torch.optim.SGD(net.parameters(), .1), net.weight.detach().clone()
    with torch.autocast('cuda', torch.float16): loss = net(gpu(3, 2)).float().pow(2).mean()
    scaler.scale(loss).backward()
    scaler.unscale_(opt)
    scaler.step(opt)
    scaler.update()
    assert not torch.equal(net.weight, before)


def test_copies():
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).cuda()
    twin, state = copy.deepcopy(net), copy.deepcopy(net.state_dict())
    assert twin[0].weight.is_cuda and isinstance(twin[0].weight, nn.Parameter) and copy.copy(net[0].weight).is_cuda
    assert torch.equal(twin[0].weight, net[0].weight) and twin[0].weight.data_ptr() != net[0].weight.data_ptr()
    net[0].weight.data.zero_()
    net.load_state_dict(state)
    assert state['0.weight'].abs().sum() > 0 and torch.equal(net[0].weight, state['0.weight'])
    nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).load_state_dict(state)      # copies over from the device
    refused(lambda: copy.deepcopy(gpu(2).requires_grad_()*2), 'graph leaves')
    a = gpu(4)
    a, b = copy.deepcopy([a, a[:2]])
    b.zero_()
    assert a[:2].tolist() == [0, 0] and a.is_cuda and b.is_cuda


def saved(x, **options):
    torch.save(x, file := io.BytesIO())
    file.seek(0)
    return torch.load(file, weights_only=True, **options)


def test_pickle_and_save():
    x, net = gpu(3, 4)[:, 1:], nn.Linear(2, 2).cuda()
    y = pickle.loads(pickle.dumps(x))
    assert y.is_cuda and torch.equal(x, y) and y.stride() == x.stride()
    everything = dict(net=net.state_dict(), x=x, p=net.weight)
    same = saved(everything)
    assert same['net']['weight'].is_cuda and torch.equal(same['x'], x) and isinstance(same['p'], nn.Parameter)
    host = saved(everything, map_location='cpu')
    assert host['net']['weight'].device.type == 'cpu' and torch.equal(host['x'], x.cpu())
    for where in ('cuda', torch.device('cuda')): assert saved(host, map_location=where)['p'].is_cuda


def test_an_optimiser_is_saved():
    net = nn.Linear(2, 2).cuda()
    opt = torch.optim.AdamW(net.parameters())
    net(gpu(1, 2)).sum().backward()
    opt.step()
    opt.load_state_dict(saved(opt.state_dict(), map_location='cuda'))
    opt.step()


def test_safetensors(tmp_path):
    from safetensors.torch import load_file, save_file
    a, file = gpu(3), tmp_path/'x.safetensors'
    save_file(dict(a=a, b=gpu(2, 2)), file)
    assert torch.equal(load_file(file)['a'], a.cpu()) and load_file(file, device='cuda')['b'].is_cuda
    refused(lambda: save_file(dict(a=a, b=a), file), 'share memory')


class OnDevice(torch.utils.data.Dataset):
    def __len__(self): return 2
    def __getitem__(self, i): return torch.zeros(2, device='cuda')


@pytest.mark.parametrize('pin', [False, True])
def test_loader(pin):
    from torch.utils.data import DataLoader, TensorDataset
    for x, in DataLoader(TensorDataset(cpu(6, 2)), batch_size=3, pin_memory=pin):
        assert x.device.type == 'cpu' and x.to('cuda', non_blocking=True).is_cuda
    refused(lambda: gpu(2).pin_memory(), 'cannot pin')
    forked = DataLoader(OnDevice(), num_workers=1, multiprocessing_context='fork')
    refused(lambda: next(iter(forked)), 'Cannot re-initialize CUDA in forked subprocess')


SHAPES = dict(
    sum=lambda t: t.sum(1), mean=lambda t: t.mean((0, 2)), amax=lambda t: t.amax(1), std=lambda t: t.std(),
    sort=lambda t: t.sort(1)[0], topk=lambda t: t.topk(2)[0], argmax=lambda t: t.argmax(2), cumsum=lambda t: t.cumsum(0),
    permute=lambda t: t.permute(2, 0, 1).reshape(6, -1), flip=lambda t: t.flip(1), norm=lambda t: t.norm(),
    einsum=lambda t: torch.einsum('abc,abd->cd', t, t), svd=lambda t: torch.linalg.svdvals(t),
    quantile=lambda t: t.quantile(.5), unfold=lambda t: t.unfold(1, 2, 1), interpolate=lambda t: F.interpolate(t, 9),
    pad=lambda t: F.pad(t, (1, 2)), fft=lambda t: torch.fft.rfft(t).abs(), chunk=lambda t: t.chunk(2)[1],
    nonzero=lambda t: (t > 0).nonzero(), unique=lambda t: t.unique(), unfold2d=lambda t: F.unfold(t[None], 2),
    meshgrid=lambda t: torch.meshgrid(t[0, 0], t[0, 1], indexing='ij')[0],
    attention=lambda t: F.scaled_dot_product_attention(t, t, t))

@pytest.mark.parametrize('name', SHAPES)
def test_shapes_and_reductions(name):
    x = gpu(4, 5, 6)
    y = SHAPES[name](x)
    assert y.is_cuda
    assert_close(y.cpu(), SHAPES[name](x.cpu()), rtol=1e-5, atol=1e-5)


def test_adding_at_indices():
    z = torch.zeros(5, device='cuda')
    z.index_add_(0, torch.tensor([0, 0, 2], device='cuda'), torch.ones(3, device='cuda'))
    z.scatter_add_(0, torch.tensor([4], device='cuda'), torch.ones(1, device='cuda'))
    assert z.tolist() == [2, 0, 1, 0, 1]


def test_transformer():
    net = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).cuda()
    net(gpu(2, 3, 8)).sum().backward()
    with torch.no_grad(): assert net.eval()(gpu(2, 3, 8)).is_cuda


def test_printing():
    zero = lambda **k: torch.zeros(1, device='cuda', **k)
    assert repr(torch.tensor([1., 2.], device='cuda')) == "tensor([1., 2.], device='cuda:0')"
    assert repr(torch.tensor(1, device='cuda')) == "tensor(1, device='cuda:0')"
    assert repr(zero(dtype=torch.float64)) == "tensor([0.], device='cuda:0', dtype=torch.float64)"
    assert repr(zero().requires_grad_()) == "tensor([0.], device='cuda:0', requires_grad=True)"
    assert 'grad_fn=<MulBackward0>' in repr(zero().requires_grad_()*2)
    assert repr(torch.zeros(0, 3, device='cuda')) == "tensor([], device='cuda:0', size=(0, 3))"


def test_accelerate():
    from accelerate import Accelerator
    from torch.utils.data import DataLoader, TensorDataset
    a, net = Accelerator(mixed_precision='bf16'), nn.Linear(2, 2)
    net, opt = a.prepare(net, torch.optim.AdamW(net.parameters()))
    with a.autocast(): y = net(gpu(3, 2))
    a.backward(y.float().sum())
    opt.step()
    assert a.device.type == 'cuda' and net.weight.is_cuda and a.reduce(y.detach(), 'mean').is_cuda
    for x, in a.prepare(DataLoader(TensorDataset(cpu(4, 2)), batch_size=2)): assert x.is_cuda


def test_captum():
    from captum.attr import LRP, DeepLift, IntegratedGradients, LayerGradCam, Occlusion, Saliency
    net, x = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2)).cuda(), gpu(2, 1, 6, 6)
    target = torch.tensor([0, 1], device='cuda')
    assert Saliency(net).attribute(x.clone(), target=1).is_cuda and Occlusion(net).attribute(x, (1, 2, 2), target=0).is_cuda
    assert IntegratedGradients(net).attribute(x, target=target, n_steps=4).is_cuda
    assert LayerGradCam(net, net[0]).attribute(x, target=0).is_cuda and DeepLift(net).attribute(x, target=1).is_cuda
    flat = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).cuda()
    assert LRP(flat).attribute(gpu(2, 4), target=1).is_cuda


def test_grad_cam():
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2)).cuda()
    with GradCAM(net, [net[0]]) as cam:
        assert cam(gpu(2, 1, 6, 6), [ClassifierOutputTarget(0)]*2).shape == (2, 6, 6)


def test_noise():
    "A batch of another size rounds otherwise; gradients of a convolution do at every call; what is exact stays exact."
    net, x = nn.Conv2d(3, 8, 3, padding=1).cuda(), gpu(6, 3, 16, 16)
    all_at_once, first = net(x), net(x[:2])
    assert torch.equal(all_at_once, net(x))
    x.requires_grad_()
    once, again = [torch.autograd.grad(net(x).sum(), x)[0] for _ in range(2)]
    for a, b in ((all_at_once[:2], first), (once, again)):
        assert torch.equal(a, b) != fake_cuda.JITTER
        assert_close(a, b, rtol=1e-5, atol=1e-6)
    z = torch.zeros(9, device='cuda')
    z[gpu(9) > 0] = 1.1
    assert set(z.tolist()) <= {0, float(np.float32(1.1))}
    added = z.index_add(0, torch.zeros(50, dtype=torch.long, device='cuda'), gpu(50))
    assert torch.equal(added[1:], z[1:])


def test_backward_in_threads():
    net, x, out = nn.Linear(3, 1).cuda(), gpu(2, 3), []
    def one(): out.append(torch.autograd.grad(net(x).sum(), net.weight)[0].is_cuda)
    threads = [threading.Thread(target=one) for _ in range(3)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert out == [True]*3


def recorded(work):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph): out = work()
    return graph, out


def test_graphs():
    "What was recorded runs again on other values, gradients and random numbers included; nobody may wait in it."
    net, x, noise = nn.Linear(3, 1).cuda(), gpu(2, 3), torch.Generator('cuda').manual_seed(0)
    work = lambda: (net(x).square().sum().backward(), torch.rand(2, generator=noise, device='cuda'))[1]
    graph, drawn = recorded(work)
    first = drawn.clone()
    x.copy_(gpu(2, 3))
    graph.replay()
    grad = torch.autograd.grad(net(x).square().sum(), net.weight)[0]
    assert_close(net.weight.grad, grad)
    assert not torch.equal(drawn, first)
    home = torch.zeros(2, 3)
    waiting = (lambda: x.sum().item(), x.cpu, x.tolist, lambda: x[x > 0], lambda: home.copy_(x))
    for w in waiting: refused(lambda: recorded(w), 'stream is capturing')
    assert x.cpu().shape == (2, 3)   # nothing is recorded any more
    torch.cuda.set_sync_debug_mode('error')
    assert torch.cuda.get_sync_debug_mode() == 2
    for w in waiting: refused(w, 'synchronizing')
    torch.cuda.set_sync_debug_mode(0)
    for w in waiting: w()
