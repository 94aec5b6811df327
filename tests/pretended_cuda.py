"""A pretended CUDA device, which shows without a card what code would do on one.

Its tensors say ``cuda:0`` and hold a tensor of the CPU, which does the arithmetic. They follow the rules of CUDA:

* tensors of the CPU and of the device do not mix, but for scalars and for indices into a device tensor;
* only host memory can be pinned, and only host memory becomes a NumPy array;
* a CPU generator draws no numbers on the device;
* in deterministic mode, operations without a deterministic implementation raise (PyTorch's documented list).

It counts three things by the line of sparsight that causes them. An operation is one launch; views and memory without
content are none. A wait is what stops the host until the device is done: reading a number or an array, and operations
whose result has a size that only the device knows. A copy goes from host to device.

A Triton kernel counts as one launch. Its arguments are checked, and the CPU backend computes its result in place of
the interpreter, which tests/test_kernels.py uses and which takes minutes at the sizes here.

What it cannot show: races between streams, speed, autocast, and how many kernels one operation of PyTorch launches.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import cuda_rules
import pytest
import torch
from torch import Tensor
from torch.nn.utils import clip_grad
from torch.optim import Optimizer
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

from sparsight.kernels import batch, cpu, update
from sparsight.kernels import triton as kernels

CUDA = torch.device("cuda", 0)
_aten = torch.ops.aten
_FACTORIES = ("arange", "as_tensor", "empty", "eye", "full", "linspace", "ones", "rand", "randn", "tensor", "zeros")
# Take indices or a source of the host beside a device tensor.
_MIXING = {"_to_copy", "copy_", "index", "index_put", "index_put_", "_index_put_impl_"}
_INNER = (__file__, "_ops.py", "_compile.py", "eval_frame.py", "_python_dispatch.py", "_pytree.py")


@dataclass
class Activity:
    """What the device has done, counted by line of sparsight."""

    launches: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    copies: Counter[str] = field(default_factory=Counter)
    operations: Counter[str] = field(default_factory=Counter)
    """Launches by operation instead of by line."""

    def clear(self) -> None:
        """Forget everything so far."""
        for counter in vars(self).values():
            counter.clear()


_activity = Activity()


class CudaTensor(Tensor):
    """A tensor that says ``cuda:0`` and computes on ``host``, a tensor of the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    host: Tensor
    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    @staticmethod
    def __new__(cls: type["CudaTensor"], host: Tensor) -> "CudaTensor":
        made: CudaTensor = Tensor._make_wrapper_subclass(
            cls, host.shape, strides=host.stride(), storage_offset=host.storage_offset(), dtype=host.dtype
        )
        made.host = host.detach()
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, op: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _compute(op, args, kwargs or {})

    def __repr__(self) -> str:  # type: ignore[override]
        return f"CudaTensor({self.host})"

    @property
    def data(self) -> Tensor:
        return CudaTensor(self.host)

    @data.setter
    def data(self, other: Tensor) -> None:
        self.host = to_host(other)

    def cpu(self, *_: Any, **__: Any) -> Tensor:
        return self.to("cpu")

    def tolist(self) -> Any:
        _count(_activity.waits, "tolist")
        return self.host.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    def __array__(self, *_: Any) -> Any:
        return self.numpy()

    def new_tensor(self, data: Any, *, dtype: torch.dtype | None = None) -> Tensor:  # type: ignore[override]
        return torch.tensor(data, dtype=dtype or self.dtype, device=CUDA)

    def pin_memory(self, *_: Any) -> Tensor:
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")

    def data_ptr(self) -> int:
        return self.host.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.host.untyped_storage()


def to_host(tensor: Any) -> Any:
    """The CPU's tensor behind a device tensor, without a wait; anything else as it is."""
    return tensor.host if isinstance(tensor, CudaTensor) else tensor


def _to_device(tensor: Any) -> Any:
    return CudaTensor(tensor) if isinstance(tensor, Tensor) and not isinstance(tensor, CudaTensor) else tensor


def _compute(op: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Carry out one operation that has a device tensor among its arguments."""
    name = op._overloadpacket.__name__
    if _called_by_autograd():  # formulas of PyTorch's C++ make tensors where the gradient is; here these say cpu
        args, kwargs = tree_map(lambda z: _to_device(z) if isinstance(z, Tensor) and z.dim() else z, (args, kwargs))
    _check_devices(op, name, args, kwargs)
    cuda_rules.check_deterministic(op, name, args)
    device = kwargs.pop("device", None)
    kwargs = {key: value for key, value in kwargs.items() if key not in ("non_blocking", "pin_memory")}
    if cuda_rules.waits(name, args):
        _count(_activity.waits, name)
    if cuda_rules.launches(op):
        _count(_activity.launches)
        _activity.operations[name] += 1
    out = op(*tree_map(to_host, args), **tree_map(to_host, kwargs))
    if device is not None and torch.device(device).type == "cpu":
        return out
    if name == "copy_" and not isinstance(args[0], CudaTensor):
        return args[0]
    outs = [kwargs[key] for key in ("out", "values", "indices") if key in kwargs]
    if outs:
        return outs[0] if len(outs) == 1 else tuple(outs)
    return return_and_correct_aliasing(op, args, kwargs, tree_map(_to_device, out))


def _check_devices(op: Any, name: str, args: Any, kwargs: dict[str, Any]) -> None:
    if kwargs.get("generator") is not None:
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
    tensors = [z for z in tree_leaves((args, kwargs)) if isinstance(z, Tensor) and z.dim()]
    hosts = [z for z in tensors if not isinstance(z, CudaTensor)]
    if not hosts:
        return
    if name not in _MIXING:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but {op} got cuda:0 and cpu {tuple(hosts[0].shape)}"
        )
    if name.startswith(("index", "_index")):
        if not isinstance(args[0], CudaTensor):
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        if name != "index" and any(host is args[2] for host in hosts):
            raise RuntimeError(f"{op}: expected values on cuda:0, got cpu")
    _count(_activity.copies)


def _callers() -> Iterator[Any]:
    frame = sys._getframe(2)
    while frame is not None:
        if not frame.f_code.co_filename.endswith(_INNER):
            yield frame
        frame = frame.f_back  # type: ignore[assignment]


def _called_by_autograd() -> bool:
    return next(_callers()).f_code.co_filename.endswith("autograd/graph.py")


def _count(counter: Counter[str], what: str = "") -> None:
    for frame in _callers():
        _, found, path = frame.f_code.co_filename.partition("/src/sparsight/")
        if found:
            counter[f"{path}:{frame.f_lineno} {what}".strip()] += 1
            return
    counter[f"outside {what}".strip()] += 1


def _is_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


_host_to, _group = Tensor.to, Optimizer._group_tensors_by_device_and_dtype


def _grouped(lists: list[list[Any]], with_indices: bool = False) -> dict[Any, Any]:
    """Optimisers group parameters by device in C++, to which the tensors here say ``cpu``."""
    device = next(z for tensors in lists for z in tensors if z is not None).device
    return {(device, dtype): group for (_, dtype), group in _group(lists, with_indices).items()}


def _to(x: Tensor, *words: Any, **options: Any) -> Tensor:
    """``Tensor.to``; gradients do not pass from one device to the other."""
    device, dtype = options.get("device"), options.get("dtype")
    for word in words:
        if isinstance(word, Tensor):
            device, dtype = word.device, word.dtype
        elif isinstance(word, torch.dtype):
            dtype = word
        elif isinstance(word, str | torch.device):
            device = word
    on_device = isinstance(x, CudaTensor)
    wanted = on_device if device is None else _is_cuda(device)
    if on_device == wanted:
        if not on_device:
            return _host_to(x, dtype=dtype) if dtype else x
        return x if dtype in (None, x.dtype) else _aten._to_copy(x, dtype=dtype)
    assert not (x.requires_grad and torch.is_grad_enabled()), "no gradients across devices here"
    _count(_activity.copies if wanted else _activity.waits, "copy")
    copied = to_host(x).detach().clone()
    copied = copied.type(dtype) if dtype else copied
    return CudaTensor(copied) if wanted else copied


def _factory(real: Callable[..., Tensor], name: str) -> Callable[..., Tensor]:
    def make(
        *args: Any, device: Any = None, pin_memory: bool = False, requires_grad: bool = False, **options: Any
    ) -> Tensor:
        if name == "as_tensor" and isinstance(args[0], Tensor):
            return args[0].to(args[0].device if device is None else device, options.get("dtype"))
        if not _is_cuda(device):
            made = real(*args, device=device, **options)
            return made.requires_grad_() if requires_grad else made
        if options.get("generator") is not None:
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        if name in ("as_tensor", "tensor"):
            _count(_activity.copies, "copy")
        elif name != "empty":
            _count(_activity.launches)
            _activity.operations[name] += 1
        return CudaTensor(real(*args, **options)).requires_grad_(requires_grad)

    return make


def _one_hot(labels: Tensor, num_classes: int) -> Tensor:
    """``torch.nn.functional.one_hot`` as on a card; its C++ would compare with numbers of the CPU."""
    places = labels.unsqueeze(-1)
    return places.new_zeros(*labels.shape, num_classes).scatter_(-1, places, 1)


class _Kernel:
    """Stands for a Triton kernel: checks its arguments, counts it, and lets ``compute`` fill its outputs."""

    def __init__(self, name: str, compute: Callable[..., None]) -> None:
        self.name, self.compute = name, compute

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **_: Any) -> None:
            for z in args:
                if isinstance(z, Tensor) and not isinstance(z, CudaTensor):
                    raise ValueError(f"Pointer argument to {self.name} cannot be accessed from Triton (cpu tensor?)")
                assert not isinstance(z, Tensor) or z.is_contiguous(), (
                    f"{self.name}: the kernel reads contiguous memory"
                )
            assert 0 < grid[0] < 2**31 and all(0 < size < 2**16 for size in grid[1:]), f"{self.name}: grid {grid}"
            _count(_activity.launches)
            _activity.operations[self.name] += 1
            self.compute(*map(to_host, args))

        return launch


def _combine(values: Tensor, indices: Tensor, W: Tensor, out: Tensor, *_: Any) -> None:
    out.copy_(cpu.combine(values, indices, W))


def _dots(g: Tensor, W: Tensor, indices: Tensor, active: Tensor, out: Tensor, *_: Any) -> None:
    out.copy_(cpu.dots(g, W, indices, active))


def _accumulate(
    values: Tensor, order: Tensor, starts: Tensor, g: Tensor, out: Tensor, sums: Tensor, k: int, *_: Any
) -> None:
    places = order[: int(starts[-1])]
    latents = torch.repeat_interleave(torch.arange(len(sums)), starts.diff())
    out.zero_().index_add_(0, latents, values.flatten()[places, None] * g[places // k])
    sums.zero_().index_add_(0, latents, values.flatten()[places])


def _prepare(gradient: Tensor, W: Tensor, step: Tensor, norms: Tensor, bias: Tensor, d_in: int, *logs: Any) -> None:
    norms.copy_(_across(gradient, W).norm(dim=1))
    t = step.double() + 1
    bias.copy_(torch.stack([t, *(-torch.expm1(t * log) for log in logs[:2])]))


def _judge(total: Tensor, norm: Tensor, first: Tensor, failed: Tensor, clip: Tensor) -> None:
    if not failed:
        first.copy_(torch.stack([total, norm]))
        failed.fill_(float(not first.isfinite().all()))
    clip.copy_(norm.clamp(min=1))


def _across(gradient: Tensor, W: Tensor) -> Tensor:
    return gradient - torch.linalg.vecdot(gradient, W).unsqueeze(1) * W


def _update(
    gradient: Tensor, W: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor, bias: Tensor, clip: Tensor,
    failed: Tensor, d_in: int, lr: float, beta1: float, beta2: float, eps: float, *_: Any,
) -> None:  # fmt: skip
    if failed:
        return
    g = _across(gradient, W) / clip
    exp_avg.lerp_(g, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    W.addcdiv_(exp_avg, exp_avg_sq.sqrt() / bias[2].sqrt() + eps, value=-lr / float(bias[1]))
    W.div_(W.norm(dim=1, keepdim=True))
    step.copy_(bias[0])


def _cut(
    values: Tensor, keys: Tensor, order: Tensor, starts: Tensor, out_values: Tensor, out_latents: Tensor,
    out_groups: Tensor, d_sae: int, width: int, *_: Any,
) -> None:  # fmt: skip
    groups = keys // d_sae
    first = starts // width + torch.arange(len(starts))
    slots = (first * width - starts)[groups] + torch.arange(len(keys))
    out_values.zero_().view(-1)[slots] = values[order]
    out_latents.zero_().view(-1)[slots] = keys % d_sae
    out_groups.copy_(torch.repeat_interleave(torch.arange(len(first) - 1), first.diff()))


@contextmanager
def pretended_cuda() -> Iterator[Activity]:
    """Inside ``with``, PyTorch has the device; yields the counts of what it does."""
    _activity.clear()
    overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("SPARSIGHT_KERNELS", raising=False)
        for name in _FACTORIES:
            patch.setattr(torch, name, _factory(getattr(torch, name), name))
        patch.setattr(torch.nn.functional, "one_hot", _one_hot)
        patch.setattr(Tensor, "to", _to)
        patch.setattr(Tensor, "pin_memory", lambda x: x)
        for stand_in in (_combine, _dots, _accumulate):
            patch.setattr(kernels, stand_in.__name__, _Kernel(stand_in.__name__, stand_in))
        for module, name in ((update, "_prepare"), (update, "_judge"), (update, "_update"), (batch, "_cut")):
            patch.setattr(module, name, _Kernel(name, globals()[name]))
        patch.setattr(clip_grad, "_has_foreach_support", lambda tensors, device: isinstance(tensors[0], CudaTensor))
        patch.setattr(Optimizer, "_group_tensors_by_device_and_dtype", staticmethod(_grouped))
        patch.setattr(torch.cuda, "mem_get_info", lambda device: (2**33, 2**33))
        patch.setattr(torch.cuda, "synchronize", lambda *_: _count(_activity.waits, "synchronize"))
        patch.setattr(torch.cuda, "Stream", lambda *_: None)
        patch.setattr(torch.cuda, "stream", lambda _: torch.no_grad())
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        try:
            yield _activity
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(overwrites)


@pytest.fixture
def cuda() -> Iterator[Activity]:
    """The pretended device, and the counts of what it does."""
    with pretended_cuda() as activity:
        yield activity
