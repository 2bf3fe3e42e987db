"""One CUDA device that is not there: `install()` makes this process see `cuda:0`; data and arithmetic stay on the CPU.

It finds "works on the processor, breaks on CUDA" without a GPU. A process that starts with `FAKE_CUDA=1` and this
folder on `PYTHONPATH` has the device (sitecustomize.py), Jupyter's kernels included; `FAKE_CUDA_JITTER=1` adds the
noise of a GPU's kernels, see `_jitter`. selftest.py shows that it behaves as a GPU does; test_cuda.py runs the
project on it.

A tensor "on CUDA" is a wrapper subclass whose C++ device is a true `cuda:0`, around a CPU tensor. Autograd, autocast
and all composite operators of PyTorch therefore take the paths they take on a GPU; what would launch a kernel comes
to `_run`, which checks the devices as CUDA does, computes on the wrapped tensors and wraps what comes out. Factories
come through `empty`, `empty_strided` and `copy_`, registered for the CUDA key. `torch.cuda`, generators,
serialization and `Tensor.data` (so that `module.cuda()` keeps its parameters' identity) are patched in `install`. The
no-op device guard and one slot of CUDA's table of hooks (`_patch_engine`) are private to PyTorch and may move: hence
`KNOWN`.

What it cannot show: faults of real kernels (TF32, overflow of half precision sums, operators that CUDA lacks, indices
out of range), memory, the order of launches, streams, speed; attention other than by its formula, LSTM and GRU
through cuDNN, sparse, quantized and nested tensors; the numbers that CUDA draws from a seed (they differ from the
processor's here too, but are not CUDA's own). `type(t) is torch.Tensor` is False. No `torch.compile`, Triton, NCCL,
second device.
"""
import atexit, copy, ctypes, functools, math, os, re, sys, time, types, warnings, weakref, zlib

import torch
from torch import Tensor, library
from torch._C import TensorBase

CPU, CUDA = torch.device('cpu'), torch.device('cuda', 0)
NAME, CAPABILITY, MEMORY = 'Fake CUDA', (9, 0), 80*2**30
KNOWN = '2.14', '2.15'   # versions of torch on which selftest.py passes
aten = torch.ops.aten
JITTER = os.environ.get('FAKE_CUDA_JITTER', '0') not in ('', '0')
NO_NUMPY = "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first."
TWO_DEVICES = 'Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!'
INDICES = 'indices should be either on cpu or on the same device as the indexed tensor (cpu)'
DEEPCOPY = 'Only Tensors created explicitly by the user (graph leaves) support the deepcopy protocol at the moment.'
GENERATOR = "Expected a '{}' device type for generator but found '{}'"
CAPTURING = 'CUDA error: operation not permitted when stream is capturing'
SYNCHRONIZING = 'called a synchronizing CUDA operation'
WAITING = '_local_scalar_dense', 'nonzero', 'masked_select', 'equal'


# ── the tensor ──────────────────────────────────────────────────────────────────────────────────────────────────────
class CudaTensor(Tensor):
    "A tensor that says it is on cuda:0; `_t` holds its data."
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, t):
        r = Tensor._make_wrapper_subclass(cls, t.size(), strides=t.stride(), storage_offset=t.storage_offset(),
                                          dtype=t.dtype, device=CUDA)
        r._t = t
        return r

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None): return _run(func, args, kwargs or {})

    # what a GPU refuses
    def numpy(self, *, force=False):
        if not force: raise TypeError(NO_NUMPY)
        return self.detach().cpu().resolve_conj().resolve_neg().numpy()
    def __array__(self, dtype=None, copy=None):
        raise TypeError(NO_NUMPY)
    def pin_memory(self, device=None):
        raise RuntimeError(f"cannot pin '{self.type()}' only dense CPU tensors can be pinned")
    def is_pinned(self, device=None): return False
    def share_memory_(self): return self

    # what reads the memory itself
    def data_ptr(self): return self._t.data_ptr()
    def untyped_storage(self): return _storage(self._t)
    def _typed_storage(self):
        return torch.storage.TypedStorage(wrap_storage=_storage(self._t), dtype=self.dtype, _internal=True)
    def storage(self): return self._typed_storage()
    def tolist(self):
        if _graph is not None or _strict: _refuse()
        return self._t.tolist()
    def record_stream(self, stream): pass

    # what asks whether the type is Tensor
    def __format__(self, spec): return format(self.item(), spec) if self.dim() == 0 else object.__format__(self, spec)
    def __repr__(self, *, tensor_contents=None):
        text = repr(self._t.detach())
        at = re.search(r'(, size=[^)]*\))?(, dtype=[\w.]+)?\)$', text).start()
        grad = ', requires_grad=True' if self.requires_grad else ''
        if self.grad_fn is not None: grad = f', grad_fn=<{type(self.grad_fn).__name__}>'
        return 'Parameter containing:\n'*_is_param(self) + f"{text[:at]}, device='cuda:0'{text[at:-1]}{grad})"

    def __deepcopy__(self, memo):
        if not self.is_leaf: raise RuntimeError(DEEPCOPY)
        if id(self) in memo: return memo[id(self)]
        t, key = self._t.detach(), ('storage', self._t.untyped_storage()._cdata)   # shared memory stays shared
        if key not in memo: memo[key] = _storage(t).cpu()
        with torch.no_grad():
            new = CudaTensor(torch.empty(0, dtype=t.dtype).set_(memo[key], t.storage_offset(), t.size(), t.stride()))
        new.requires_grad_(self.requires_grad)
        memo[id(self)] = new
        if self.grad is not None: new.grad = copy.deepcopy(self.grad, memo)
        new.__dict__.update({k: copy.deepcopy(v, memo) for k, v in self.__dict__.items() if k != '_t'})
        return new

    def __reduce_ex__(self, protocol):
        hooks = {}
        if _is_param(self): return torch._utils._rebuild_parameter, (self.detach(), self.requires_grad, hooks)
        return torch._utils._rebuild_tensor_v2, (self._typed_storage(), self._t.storage_offset(), tuple(self.size()),
                                                 self.stride(), self.requires_grad, hooks)


def _is_param(t): return bool(t.__dict__.get('_is_param'))


class CudaStorage(torch.UntypedStorage):
    "The memory of a CudaTensor."
    @property
    def device(self): return CUDA
    @property
    def is_cuda(self): return True
    def cpu(self): return torch.UntypedStorage(self.nbytes()).copy_(self)
    def clone(self):
        new = self.cpu()
        new.__class__ = CudaStorage
        return new


def _storage(t):
    s = t.untyped_storage()
    if type(s) is not CudaStorage: s.__class__ = CudaStorage
    return s


def _sync(w):
    "Give the wrapper the size and strides that its data have now."
    t = w._t
    guard = torch._C._DisableTorchDispatch()
    was = torch._C._meta_in_tls_dispatch_include()
    torch._C._set_meta_in_tls_dispatch_include(True)
    try:
        storage = TensorBase.untyped_storage(w)
        aten.set_.source_Storage_storage_offset(w, storage, t.storage_offset(), t.size(), t.stride())
    finally:
        torch._C._set_meta_in_tls_dispatch_include(was)
        del guard


def _become(old, new):
    "`old.data = new` across devices: the Python object stays, everything in it is that of `new`."
    param = isinstance(old, torch.nn.Parameter)
    extra = {k: v for k, v in old.__dict__.items() if k not in ('_t', '_is_param')}
    grad, old.grad = old.grad, None
    with torch.no_grad():
        tmp = torch.nn.Parameter(new, old.requires_grad) if param else new.detach().requires_grad_(old.requires_grad)
        old.__class__, tmp.__class__ = tmp.__class__, old.__class__
        old.__dict__, tmp.__dict__ = {**tmp.__dict__, **extra}, dict(old.__dict__)
        torch._C._swap_tensor_impl(old, tmp)
        if grad is not None: old.grad = grad.to(old.device, old.dtype)


def _set_data(self, new):
    there = type(self) is CudaTensor
    if there != (type(new) is CudaTensor): return _become(self, new)
    TensorBase.data.__set__(self, new)
    if there: self._t = new._t


# ── operators ───────────────────────────────────────────────────────────────────────────────────────────────────────
INDEXING = 'index', 'index_put', 'index_put_', '_index_put_impl_', '_unsafe_index', '_unsafe_index_put'

class _Facts:
    "What an operator's schema says."
    def __init__(self, func):
        names = [a.name for a in func._schema.arguments]
        self.mutable = func._schema.is_mutable
        self.written = [(i, a.name) for i, a in enumerate(func._schema.arguments)
                        if a.alias_info is not None and a.alias_info.is_write]
        self.composite = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), 'CompositeImplicitAutograd')
        self.base = base = func._schema.name.split('::')[1]
        self.view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        self.random = torch.Tag.nondeterministic_seeded in func.tags
        self.generator = 'generator' in names
        self.device = names.index('device') if 'device' in names else None
        self.cpu_indices = base in INDEXING
        self.numbers = base not in ('cat', 'stack')   # may a CPU tensor be a number beside CUDA tensors?
        self.noise = ('call' if base in RUN_TO_RUN else 'shape' if base in BY_SHAPE else None) if JITTER else None

_facts = functools.cache(_Facts)


def _run(func, args, kwargs):
    "`func` for a GPU."
    if _forked: raise RuntimeError(_forked)
    if (_graph is not None or _strict) and _waits(func, args, kwargs): _refuse()
    rule = RULES.get(func)
    out = rule(*args, **kwargs) if rule is not None else _run_plain(func, args, kwargs)
    if _graph is not None: _graph.tape.append((func, args, kwargs, out))
    return out


def _run_plain(func, args, kwargs={}):
    f = _facts(func)
    if f.composite: return func.decompose(*args, **kwargs)   # only in inference mode
    wrappers, host = [], []
    def strip(a):
        kind = type(a)
        if kind is CudaTensor:
            wrappers.append(a)
            return a._t
        if kind is list or kind is tuple: return [strip(v) for v in a]
        if isinstance(a, Tensor): host.append(a)
        return a
    inner = [strip(a) for a in args]
    named = {k: strip(v) for k, v in kwargs.items()}
    if host: _check_devices(f, args, kwargs, wrappers, host)
    to_cuda = True
    if f.device is not None:
        device = named.get('device')
        if device is not None:
            to_cuda = torch.device(device).type == 'cuda'
            if to_cuda: named['device'] = CPU
        named.pop('pin_memory', None)
    before = inner[0].detach().clone() if f.noise and f.base.startswith(INTO) else None
    if f.random: out = _random(func, f, inner, named)
    else: out = func(*inner, **named)
    if f.noise: out = _jitter(f, func, inner, out, before)
    if f.mutable:
        for w in wrappers:
            if w.shape != w._t.shape or w.stride() != w._t.stride(): _sync(w)
        same = {id(w._t): w for w in wrappers}
    else: same = {}
    def wrap(o):
        if type(o) is Tensor: return same.get(id(o)) if id(o) in same else CudaTensor(o) if to_cuda else o
        if type(o) in (list, tuple): return type(o)(wrap(v) for v in o)
        return o
    if f.view and torch.is_inference_mode_enabled() and not any(w.is_inference() for w in wrappers):
        # a view of a normal tensor is a normal tensor
        with torch.inference_mode(False): return wrap(out)
    return wrap(out)


def _check_devices(f, args, kwargs, wrappers, host):
    "A CPU tensor beside CUDA tensors may only be a number (0-dim) that is read, or an index."
    if f.cpu_indices:
        if type(args[0]) is not CudaTensor: raise RuntimeError(INDICES)
        host = [v for v in args[2:] if isinstance(v, Tensor) and type(v) is not CudaTensor]
    if any(t.dim() for t in host) or not f.numbers: raise RuntimeError(TWO_DEVICES)
    for i, name in f.written:
        a = args[i] if i < len(args) else kwargs.get(name)
        if isinstance(a, Tensor) and type(a) is not CudaTensor: raise RuntimeError(TWO_DEVICES)


def _random(func, f, args, kwargs):
    "Draw from the device's own generator: the processor's is left alone."
    g = kwargs.get('generator')
    if g is None: g = next((a for a in args if isinstance(a, torch._C.Generator)), None)
    if g is not None and g._cdata not in _generators: raise RuntimeError(GENERATOR.format('cuda', 'cpu'))
    if g is None and f.generator: kwargs['generator'] = default_generator
    if f.generator: return func(*args, **kwargs)
    state = torch.default_generator.get_state()
    torch.default_generator.set_state(default_generator.get_state())
    try: return func(*args, **kwargs)
    finally:
        default_generator.set_state(torch.default_generator.get_state())
        torch.default_generator.set_state(state)


# ── noise ───────────────────────────────────────────────────────────────────────────────────────────────────────────
# Kernels that add with atomics: another result at every call.
RUN_TO_RUN = {
    'convolution_backward', 'index_add', 'index_add_', 'scatter_add', 'scatter_add_', 'index_put', 'index_put_',
    '_index_put_impl_', 'embedding_dense_backward', 'upsample_bilinear2d_backward', 'upsample_bicubic2d_backward',
    'grid_sampler_2d_backward', 'max_pool2d_with_indices_backward'}
# Kernels whose order of addition is chosen by the shapes: the same result for the same shapes.
BY_SHAPE = {
    'convolution', 'mm', 'bmm', 'addmm', 'baddbmm', 'addmv', 'mv', 'dot', 'sum', 'mean', 'var', 'std', 'var_mean',
    'native_batch_norm', 'cudnn_batch_norm', 'native_layer_norm', '_softmax', '_log_softmax', 'linalg_vector_norm',
    '_linalg_solve_ex', 'logsumexp', 'cumsum'}
# These add into a tensor: what they do not touch stays exact.
INTO = ('index_add', 'scatter_add', 'index_put', '_index_put')
_pool, _calls = None, 0


def _terms(base, args, out):
    "About how many numbers each element of the result is the sum of; one or two add up to the same bits in any order."
    tensors = [a for a in args if isinstance(a, Tensor)]
    if base.startswith(INTO): return 8 if 'put' not in base or (len(args) > 3 and args[3]) else 1
    if base == 'convolution': return args[1][0].numel()
    if base == 'native_batch_norm' and not args[5]: return 1      # in evaluation mode nothing is summed
    if base == 'convolution_backward': return args[2].numel() // args[2].shape[1]
    if base == 'max_pool2d_with_indices_backward': return 4 if list(args[2]) != list(args[3] or args[2]) else 1
    if base in ('addmm', 'baddbmm', 'addmv'): return tensors[1].shape[-1]
    if base in ('mm', 'bmm', 'mv', 'dot') or 'solve' in base: return tensors[0].shape[-1]
    first = tensors[0]
    reduces = isinstance(out, Tensor) and out.numel() < first.numel()
    return first.numel() // max(1, out.numel()) if reduces else max(first.shape, default=1)


def _jitter(f, func, args, out, before):
    """Noise of up to 1.5 units in the last place, of the element and of a typical one, on float32 and float64.

    Less for short sums. It depends on the shapes (another batch size, another rounding; the same call, the same bits);
    kernels that use atomics (`RUN_TO_RUN`) get another noise at every call. Of what is larger than the cache a quarter
    gets it, in every layer another one: all of it would cost as much as the network's own arithmetic."""
    global _pool, _calls
    terms = _terms(f.base, args, out)
    if terms < 3: return out
    if _pool is None: _pool = torch.rand(1 << 22, generator=torch._C.Generator('cpu').manual_seed(1)).mul_(2).sub_(1)
    if f.noise == 'call':
        _calls += 1
        key = (_calls, os.getpid(), time.perf_counter_ns())
    else: key = (func.name(), [(tuple(a.shape), a.stride()) for a in args if isinstance(a, Tensor)])
    at, half = zlib.crc32(repr(key).encode()), len(_pool) // 2
    for o in out if isinstance(out, (list, tuple)) else [out]:
        if not (isinstance(o, Tensor) and o.numel() and o.dtype in (torch.float32, torch.float64)): continue
        unit = min(1.5, .25*math.log2(terms))*torch.finfo(o.dtype).eps
        o = o.detach() if o.dim() else o.detach()[None]
        images = max(1, (1 << 17) // o[0].numel())                # that fit into the processor's cache
        parts = o.split(images)
        every = 1 if len(parts) < 8 else 4
        for i, part in enumerate(parts):
            if (i + at) % every or _span(part) > half: continue
            noise = _pool.as_strided(part.shape, part.stride(), at % half)
            # the size of an image's numbers: what nearly cancels has the error of its terms
            typical = torch.linalg.vector_norm(part, dim=list(range(1, part.dim())) or 0, keepdim=True)
            typical *= (typical.numel()/part.numel())**.5
            # 0 where few bits follow the point (zero, whole numbers, halves …: their sums are exact in any order), else ±1;
            # a comparison and a mask would say it better, and take four times as long
            inexact = (part*4096).frac_().sign_()
            if before is not None: inexact *= part != before[i*images:(i + 1)*images]
            part.add_(part.abs().add_(typical).mul_(noise).mul_(inexact), alpha=unit)
            at += every*part.numel()
    return out


def _span(t): return 1 + sum((n - 1)*s for n, s in zip(t.shape, t.stride()))


# ── operators that need their own word ──────────────────────────────────────────────────────────────────────────────
def _data(t): return t._t if type(t) is CudaTensor else t


def _to_copy(t, *, dtype=None, layout=None, device=None, pin_memory=None, non_blocking=False, memory_format=None):
    to_cuda = device is None or device.type == 'cuda'
    options = dict(dtype=dtype, layout=layout, memory_format=memory_format)
    out = aten._to_copy.default(_data(t), device=CPU if to_cuda else device, **options)
    return CudaTensor(out) if to_cuda else out


def _copy_(dst, src, non_blocking=False):
    _data(dst).copy_(_data(src))
    return dst


def _set_(t, *source):
    t._t.set_(*[_data(s) for s in source])
    _sync(t)
    return t


def _softmax(op):
    "Under autocast softmax takes half and gives float in one step; the processor's kernel does not."
    def rule(x, dim, to_float): return _run_plain(op, (x.float() if to_float else x, dim, False))
    return rule


def _softmax_backward(op):
    def rule(grad, out, dim, dtype): return _run_plain(op, (grad, out, dim, grad.dtype)).to(dtype)
    return rule


def _cudnn_batch_norm(x, weight, bias, mean, var, training, momentum, eps):
    out = _run_plain(aten.native_batch_norm.default, (x, weight, bias, mean, var, training, momentum, eps))
    return (*out, CudaTensor(torch.empty(0, dtype=torch.uint8)))


def _cudnn_batch_norm_backward(x, grad, weight, mean, var, save_mean, save_var, eps, reserve):
    args = grad, x, weight, mean, var, save_mean, save_var, True, eps, [True]*3
    return _run_plain(aten.native_batch_norm_backward.default, args)


def _grid_sampler(x, grid): return _run_plain(aten.grid_sampler_2d.default, (x, grid, 0, 0, True))


def _rules():
    rules = {aten._to_copy.default: _to_copy, aten.copy_.default: _copy_,
             aten.cudnn_batch_norm.default: _cudnn_batch_norm,
             aten.cudnn_batch_norm_backward.default: _cudnn_batch_norm_backward,
             aten._fused_sdp_choice.default: lambda *a, **k: 0,      # attention by its formula
             aten._cudnn_rnn_flatten_weight.default: lambda weights, *a: weights[0],
             aten.is_pinned.default: lambda *a, **k: False, aten.record_stream.default: lambda *a: None,
             aten.cudnn_grid_sampler.default: _grid_sampler}
    rules |= {o: _softmax(o) for o in (aten._softmax.default, aten._log_softmax.default)}
    backward = aten._softmax_backward_data.default, aten._log_softmax_backward_data.default
    rules |= {o: _softmax_backward(o) for o in backward}
    return rules | {getattr(aten.set_, o): _set_ for o in aten.set_.overloads()}

RULES = _rules()


# Kernels that PyTorch calls for `device='cuda'` without a tensor at hand, or below the wrapper (torch.tensor does).
def _empty(size, *, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    if _forked: raise RuntimeError(_forked)
    memory_format = memory_format or torch.contiguous_format
    return CudaTensor(torch.empty(size, dtype=dtype, device=CPU, memory_format=memory_format))

def _empty_strided(size, stride, *, dtype=None, layout=None, device=None, pin_memory=None):
    if _forked: raise RuntimeError(_forked)
    return CudaTensor(torch.empty_strided(size, stride, dtype=dtype, device=CPU))


# ── random numbers ──────────────────────────────────────────────────────────────────────────────────────────────────
# by the address of the C++ object: an operator gets another Python object for it
_generators = weakref.WeakValueDictionary()

class CudaGenerator(torch._C.Generator):
    "A generator on cuda:0: its own numbers, not those the processor draws from the same seed."
    def __new__(cls, device='cuda'): return super().__new__(cls, 'cpu')
    def __init__(self, device='cuda'):
        _generators[self._cdata] = self
        self.manual_seed(67280421310721)
    @property
    def device(self): return CUDA
    def manual_seed(self, seed):
        self._seed = seed
        super().manual_seed((seed ^ 0x5DEECE66D) & (2**63 - 1))
        return self
    def initial_seed(self): return self._seed
    def seed(self):
        self.manual_seed(int.from_bytes(os.urandom(7), 'little'))
        return self._seed


class _GeneratorType(type):
    def __call__(cls, device='cpu'):
        if device is None: device = 'cpu'
        return CudaGenerator() if torch.device(device).type == 'cuda' else torch._C.Generator(device)
    def __instancecheck__(cls, g): return isinstance(g, torch._C.Generator)

class Generator(metaclass=_GeneratorType): "Stands in for torch.Generator."

default_generator = CudaGenerator()


def _guard_generator(function, method):
    "The processor must not draw from a CUDA generator, which is one of the processor's in truth."
    @functools.wraps(function)
    def guarded(*args, **kwargs):
        g = kwargs.get('generator')
        if isinstance(g, CudaGenerator):
            out = args[0] if method else kwargs.get('out')
            on = kwargs.get('device') if out is None else out.device
            if on is None: on = next((a.device for a in args if isinstance(a, Tensor)), torch.get_default_device())
            if torch.device(on).type != 'cuda': raise RuntimeError(GENERATOR.format(torch.device(on).type, 'cuda'))
        return function(*args, **kwargs)
    return guarded


# ── torch.cuda ──────────────────────────────────────────────────────────────────────────────────────────────────────
_forked = ''

def _after_fork():
    global _forked
    _forked = ('Cannot re-initialize CUDA in forked subprocess. To use CUDA with multiprocessing, '
               "you must use the 'spawn' start method")


class Stream:
    "A queue that is always empty."
    device, device_index, device_type, stream_id, cuda_stream, priority = CUDA, 0, 1, 0, 0, 0
    def __init__(self, *args, **kwargs): pass
    def synchronize(self): pass
    def query(self): return True
    def is_capturing(self): return False
    def wait_stream(self, other): pass
    def wait_event(self, event): pass
    def record_event(self, event=None):
        event = event or Event()
        event.record()
        return event
    def __enter__(self): return self
    def __exit__(self, *e): pass


class Event:
    "A time on the clock."
    def __init__(self, enable_timing=False, blocking=False, interprocess=False, external=False):
        self.timing, self.at = enable_timing, None
    def record(self, stream=None): self.at = time.perf_counter()
    def wait(self, stream=None): pass
    def synchronize(self): pass
    def query(self): return True
    def elapsed_time(self, end):
        if None in (self.at, end.at): raise RuntimeError('Both events must be recorded before elapsed time.')
        if not (self.timing and end.timing):
            raise RuntimeError('Both events must be created with argument enable_timing=True.')
        return 1e3*(end.at - self.at)


_graph = None   # the one that is being recorded
_strict = False   # is waiting an error, by torch.cuda.set_sync_debug_mode?

def _waits(func, args, kwargs):
    "Would the processor wait for the result?"
    to, base = kwargs.get('device'), _facts(func).base
    if base == 'copy_': return type(args[0]) is not CudaTensor   # to the processor
    if base == 'index' and any(getattr(i, 'dtype', None) == torch.bool for i in args[1]): return True
    return base in WAITING or (to is not None and torch.device(to).type == 'cpu')

def _refuse(): raise torch.AcceleratorError(CAPTURING) if _graph is not None else RuntimeError(SYNCHRONIZING)

def _set_strict(mode):
    global _strict
    _strict = mode in (2, 'error')


class CUDAGraph:
    "A list of operators with their tensors: `replay` runs them again and writes into the same results."
    def __init__(self, *args, **kwargs): self.tape = []
    def replay(self):
        for func, args, kwargs, out in self.tape:
            new = _run(func, args, kwargs)
            if not (_facts(func).mutable or _facts(func).view): _overwrite(out, new)


def _overwrite(old, new):
    if isinstance(old, (list, tuple)):
        for o, n in zip(old, new): _overwrite(o, n)
    elif type(old) is CudaTensor: old._t.copy_(new._t)


class _Recording:
    "Stands in for torch.cuda.graph."
    def __init__(self, graph, **options): self.graph = graph
    def __enter__(self):
        global _graph
        _graph = self.graph
    def __exit__(self, *e):
        global _graph
        _graph = None


class _Context:
    "Stands in for torch.cuda.device and torch.cuda.stream."
    def __init__(self, *args): pass
    def __enter__(self): return self
    def __exit__(self, *e): return False


def _index(device):
    device = torch.device('cuda', device) if isinstance(device, int) else torch.device(device or 'cuda')
    if device.type != 'cuda': raise ValueError(f'Expected a cuda device, but got: {device}')
    if (device.index or 0) != 0: raise torch.AcceleratorError('CUDA error: invalid device ordinal')
    return 0


def _properties():
    return types.SimpleNamespace(name=NAME, major=CAPABILITY[0], minor=CAPABILITY[1], total_memory=MEMORY,
                                 multi_processor_count=132, is_integrated=False, is_multi_gpu_board=False, warp_size=32,
                                 max_threads_per_multi_processor=2048)


def _own(value):
    "A function as an object of its own: torch 2.15 has a table of functions, and no two names may share one."
    if not isinstance(value, types.FunctionType): return value
    return types.FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, value.__closure__)


def _patch_cuda():
    c, g, properties = torch.cuda, default_generator, _properties()
    zero, none = lambda *a, **k: 0, lambda *a, **k: None
    seed = lambda s: g.manual_seed(int(s)) and None
    state = dict(is_available=lambda: True, device_count=lambda: 1, current_device=zero, is_initialized=lambda: True,
                 init=none, _lazy_init=none, _lazy_call=lambda f, **k: f(), set_device=lambda d: _index(d) and None,
                 _is_in_bad_fork=lambda: bool(_forked), synchronize=none, ipc_collect=none,
                 can_device_access_peer=lambda a, b: False, is_current_stream_capturing=lambda: False)
    facts = dict(get_device_name=lambda d=None: (_index(d), NAME)[1], get_arch_list=lambda: ['sm_90'],
                 get_device_capability=lambda d=None: (_index(d), CAPABILITY)[1],
                 get_device_properties=lambda d=None: (_index(d), properties)[1],
                 is_bf16_supported=lambda including_emulation=True: True, is_tf32_supported=lambda: True)
    memory = dict(empty_cache=none, memory_allocated=zero, max_memory_allocated=zero, memory_reserved=zero,
                  max_memory_reserved=zero, reset_peak_memory_stats=none, reset_max_memory_allocated=none,
                  reset_accumulated_memory_stats=none, set_per_process_memory_fraction=none, utilization=zero,
                  mem_get_info=lambda d=None: (MEMORY, MEMORY), memory_stats=lambda d=None: {},
                  memory_summary=lambda *a, **k: '')
    random = dict(manual_seed=seed, manual_seed_all=seed, seed=lambda: g.seed() and None, default_generators=(g,),
                  seed_all=lambda: g.seed() and None, initial_seed=lambda: g.initial_seed(),
                  get_rng_state=lambda d='cuda': (_index(d), g.get_state())[1],
                  set_rng_state=lambda s, d='cuda': (_index(d), g.set_state(s))[0] and None,
                  get_rng_state_all=lambda: [g.get_state()], set_rng_state_all=lambda s: g.set_state(s[0]) and None)
    streams = dict(Stream=Stream, Event=Event, current_stream=lambda d=None: Stream(), device=_Context,
                   default_stream=lambda d=None: Stream(), stream=_Context, StreamContext=_Context, device_of=_Context,
                   _DeviceGuard=_Context, _exchange_device=zero, _maybe_exchange_device=zero, CUDAGraph=CUDAGraph,
                   graph=_Recording, set_sync_debug_mode=_set_strict, get_sync_debug_mode=lambda: 2*_strict)
    for name, value in (state | facts | memory | random | streams).items():
        value = _own(value)
        setattr(c, name, value)
        for module in (c.memory, c.random):
            if hasattr(module, name): setattr(module, name, value)
    torch._C._cuda_getDeviceCount = lambda: 1
    for name in ('is_available', 'device_count', 'synchronize', 'empty_cache', 'current_stream'):
        setattr(torch.accelerator, name, getattr(c, name))
    for name in ('index', 'idx'):
        setattr(torch.accelerator, f'current_device_{name}', zero)
        setattr(torch.accelerator, f'set_device_{name}', none)


# ── autograd, storage, optimisers ───────────────────────────────────────────────────────────────────────────────────
def _patch_engine():
    """Let autograd's C++ engine run with a device that has no driver.

    PyTorch has a guard that does nothing for this case (fake tensors use it), but the engine still asks CUDA's hooks
    whether the device has a context. The answer 'no' is put into a copy of the hooks' table of virtual functions: two
    for the destructor, isBuilt, isAvailable, hasPrimaryContext, … (ATen/detail/AcceleratorHooksInterface.h). It must not
    be a function of Python's: autograd's threads ask when the interpreter is gone already."""
    torch._C._ensureCUDADeviceGuardSet()
    lib = ctypes.CDLL(os.path.join(os.path.dirname(torch.__file__), 'lib', 'libtorch_cpu.so'))
    get = lib['_ZN2at6detail12getCUDAHooksEv']
    get.restype = ctypes.c_void_p
    pointer = ctypes.c_void_p.from_address(get())
    before, slots, slot = 2, 64, 4   # two words before the table: type information
    table = (ctypes.c_void_p*(before + slots))
    new = table(*table.from_address(pointer.value - 8*before))
    no = ctypes.CDLL(None).pthread_mutexattr_destroy   # of the C library: does nothing and returns 0
    new[before + slot] = ctypes.cast(no, ctypes.c_void_p).value
    pointer.value = ctypes.addressof(new) + 8*before
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(new))   # autograd's threads outlive Python


def _not_pinned(function):
    "Pinned memory needs a driver: it is memory like any other here."
    @functools.wraps(function)
    def plain(*args, **kwargs):
        if kwargs: kwargs.pop('pin_memory', None)
        return function(*args, **kwargs)
    return plain


def _patch_serialization():
    def restore(storage, location):
        if location.startswith('cuda'):
            storage.__class__ = CudaStorage
            return storage
    torch.serialization.register_package(5, lambda s: 'cuda:0' if isinstance(s, CudaStorage) else None, restore)
    rebuild = torch._utils._rebuild_tensor
    def _rebuild_tensor(storage, offset, size, stride):
        if not isinstance(storage._untyped_storage, CudaStorage): return rebuild(storage, offset, size, stride)
        return CudaTensor(torch.empty(0, dtype=storage.dtype).set_(storage._untyped_storage, offset, size, stride))
    torch._utils._rebuild_tensor = _rebuild_tensor


def why_not():
    "Why the device cannot be installed here; an empty text where it can."
    version = '.'.join(torch.__version__.split('.')[:2])
    if getattr(torch.cuda, 'is_fake', False): return 'it is installed already'
    if torch.cuda.is_available(): return 'there is a CUDA device'
    if sys.platform != 'linux': return f'it is for Linux, this is {sys.platform}'
    if torch.version.cuda is None: return f'torch {torch.__version__} is not a CUDA build'
    if version not in KNOWN:
        return f'it knows torch {", ".join(KNOWN)}, not {version} (KNOWN in tests/fake_cuda/fake_cuda.py)'
    return ''


def install():
    "Put the device in place; once for a process, right after `import torch`."
    if why := why_not(): raise RuntimeError(f'no simulated CUDA device: {why}')
    global _library
    _library = library.Library('aten', 'IMPL')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for name, kernel in {'empty.memory_format': _empty, 'empty_strided': _empty_strided, 'copy_': _copy_}.items():
            _library.impl(name, kernel, 'CUDA', allow_override=True)
    _patch_cuda()
    _patch_engine()
    _patch_serialization()
    Tensor.data = property(lambda self: TensorBase.data.__get__(self), _set_data)
    Tensor.pin_memory = lambda self, device=None: self
    from torch.utils._device import _device_constructors
    _device_constructors()   # remembers the functions that `with torch.device('cuda')` touches, before they are wrapped
    for name in ('empty', 'zeros', 'ones', 'full', 'tensor', 'as_tensor', 'empty_like', 'zeros_like', 'ones_like'):
        setattr(torch, name, _not_pinned(getattr(torch, name)))
    torch.Generator = Generator
    for name in ('rand', 'randn', 'randint', 'randperm', 'normal', 'bernoulli', 'multinomial'):
        setattr(torch, name, _guard_generator(getattr(torch, name), False))
    for name in ('normal_', 'uniform_', 'random_', 'bernoulli_', 'exponential_', 'bernoulli', 'multinomial'):
        setattr(Tensor, name, _guard_generator(getattr(Tensor, name), True))
    import torch.optim.optimizer as optimizer
    optimizer._foreach_supported_types.append(CudaTensor)
    os.register_at_fork(after_in_child=_after_fork)
    atexit.register(time.sleep, .1)   # autograd's thread may still let go of a graph, for which it needs the interpreter
    torch.cuda.is_fake = True
