"""A pretended CUDA device, which shows without a card what code would do on one.

Its tensors say ``cuda:0`` and hold a tensor of the CPU, which does the arithmetic. They follow the rules of CUDA:

* tensors of the CPU and of the device do not mix, but for scalars and for indices into a device tensor;
* only host memory can be pinned, and only host memory becomes a NumPy array;
* work is in order on one stream only, and a copy that does not make the host wait comes later (cuda_streams.py);
* a CPU generator draws no numbers on the device;
* in deterministic mode, operations without a deterministic implementation raise (PyTorch's documented list).

It counts three things by the line of sparsight that causes them. An operation is one launch; views and memory without
content are none. A wait is what stops the host until the device is done: reading a number or an array, operations whose
result has a size that only the device knows, and a copy from host to device, unless it is from page-locked memory and
``non_blocking``. Numbers without a dimension travel with the launch. A copy goes from host to device.

A Triton kernel counts as one launch. Its arguments are checked, and the CPU backend computes its result in place of
the interpreter, which tests/test_kernels.py uses and which takes minutes at the sizes here.

What it cannot show: speed, how many kernels one operation of PyTorch launches, and memory that is given to another
stream too early. Autocast follows the rules of the CPU, which keep fewer operations in fp32.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import cuda_rules
import cuda_streams
import kernel_formulas
import pytest
import torch
from torch import Tensor
from torch.nn.utils import clip_grad
from torch.optim import Optimizer
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda", 0)
_aten = torch.ops.aten
_FACTORIES = ("arange", "as_tensor", "empty", "eye", "full", "linspace", "ones", "rand", "randn", "tensor", "zeros")
# Take indices or a source of the host beside a device tensor. PyTorch writes x[i] = 1 as index_fill_ if both are on one
# device, which is what its C++ sees here, and else as index_put_.
_MIXING = {"_to_copy", "copy_", "index", "index_fill_", "index_put", "index_put_", "_index_put_impl_"}
_INNER = (
    __file__, cuda_streams.__file__, "_ops.py", "_compile.py", "eval_frame.py", "_python_dispatch.py", "_pytree.py",
)  # fmt: skip


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
        cuda_streams.waited("tolist")
        return self.host.tolist()

    def record_stream(self, stream: Any) -> None:
        pass

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


def _hosts(values: Any) -> list[Tensor]:
    """The CPU's tensors behind all device tensors of a nested structure, and its tensors of the CPU."""
    return [to_host(z) for z in tree_leaves(values) if isinstance(z, Tensor)]


def _to_device(tensor: Any) -> Any:
    return CudaTensor(tensor) if isinstance(tensor, Tensor) and not isinstance(tensor, CudaTensor) else tensor


def _compute(op: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Carry out one operation that has a device tensor among its arguments."""
    name = op._overloadpacket.__name__
    if name == "copy_" and args[1].dim() and args[0].is_cuda != args[1].is_cuda:
        return _copy(*args, **kwargs)
    by_autograd = _called_by_autograd()  # formulas of PyTorch's C++ work where the gradient is; here that says cpu
    if by_autograd:
        args, kwargs = tree_map(lambda z: _to_device(z) if isinstance(z, Tensor) and z.dim() else z, (args, kwargs))
    _check_devices(op, name, args, kwargs)
    cuda_rules.check_deterministic(op, name, args)
    device = kwargs.pop("device", None)
    kwargs = {key: value for key, value in kwargs.items() if key not in ("non_blocking", "pin_memory")}
    if cuda_rules.waits(name, args):
        cuda_streams.waited(name)
    if cuda_rules.launches(op):
        _count(_activity.launches)
        _activity.operations[name] += 1
    out = op(*tree_map(to_host, args), **tree_map(to_host, kwargs))
    if not op.is_view:
        cuda_streams.ran(op, _hosts((args, kwargs)), _hosts(out))
    if device is not None and torch.device(device).type == "cpu" and not by_autograd:
        return out
    outs = [kwargs[key] for key in ("out", "values", "indices") if key in kwargs]
    if outs:
        return outs[0] if len(outs) == 1 else tuple(outs)
    return return_and_correct_aliasing(op, args, kwargs, tree_map(_to_device, out))


def _copy(out: Tensor, x: Tensor, non_blocking: bool = False) -> Tensor:
    """``out.copy_(x)`` from one device to the other."""
    if out.is_cuda:
        _count(_activity.copies, "copy")
        to_host(out).copy_(x)
        cuda_streams.copy_to_device(x, to_host(out), non_blocking)
    else:
        cuda_streams.copy_to_host(to_host(x), out, non_blocking)
    return out


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
        if name not in ("index", "index_fill_") and any(host is args[2] for host in hosts):
            raise RuntimeError(f"{op}: expected values on cuda:0, got cpu")
    _count(_activity.copies)
    cuda_streams.waited(cuda_streams.TO_DEVICE)


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


def _count_wait(what: str) -> None:
    _count(_activity.waits, what)
    del _activity.waits[f"outside {cuda_streams.TO_DEVICE}"]  # a test that puts its own tensors on the device


def _is_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


_host_to, _group = Tensor.to, Optimizer._group_tensors_by_device_and_dtype


def _on_host(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of autocast that takes the kind of a device: the rules of the CPU keep fewer operations in fp32."""
    return lambda kind, *words, **options: function("cpu" if _is_cuda(kind) else kind, *words, **options)


def _grouped(lists: list[list[Any]], with_indices: bool = False) -> dict[Any, Any]:
    """Optimisers and clipping group tensors by device in C++, to which the tensors here say ``cpu``."""
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
    source, non_blocking = to_host(x).detach(), options.get("non_blocking", False)
    out = torch.empty_like(source, dtype=dtype)
    if wanted:
        return _copy(CudaTensor(out), source, non_blocking)
    return _copy(cuda_streams.lock_pages(out) if non_blocking else out, x, non_blocking)


_parse_to = torch._C._nn._parse_to


def _parsed_to(*words: Any, **options: Any) -> Any:
    """The arguments of ``Module.to``, whose C++ takes the tensors here for tensors of the CPU."""
    if words and isinstance(words[0], CudaTensor):
        words = (CUDA, words[0].dtype, *words[1:])
    return _parse_to(*words, **options)


def _factory(real: Callable[..., Tensor], name: str) -> Callable[..., Tensor]:
    def make(
        *args: Any, device: Any = None, pin_memory: bool = False, requires_grad: bool = False, **options: Any
    ) -> Tensor:
        if name == "as_tensor" and isinstance(args[0], Tensor):
            return args[0].to(args[0].device if device is None else device, options.get("dtype"))
        if not _is_cuda(device):
            made = real(*args, device=device, **options)
            made = cuda_streams.lock_pages(made) if pin_memory else made
            return made.requires_grad_() if requires_grad else made
        if options.get("generator") is not None:
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        if name in ("as_tensor", "tensor"):
            _count(_activity.copies, "copy")
            cuda_streams.waited(cuda_streams.TO_DEVICE)
        elif name != "empty":
            _count(_activity.launches)
            _activity.operations[name] += 1
        made = real(*args, **options)
        cuda_streams.ran(name, [], [made])
        return CudaTensor(made).requires_grad_(requires_grad)

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
            cuda_streams.ran(self.name, _hosts(args), _hosts(args))
            self.compute(*map(to_host, args))

        return launch


@contextmanager
def pretended_cuda() -> Iterator[Activity]:
    """Inside ``with``, PyTorch has the device; yields the counts of what it does."""
    _activity.clear()
    cuda_streams.reset(_count_wait)
    overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("SPARSIGHT_KERNELS", raising=False)
        for name in _FACTORIES:
            patch.setattr(torch, name, _factory(getattr(torch, name), name))
        patch.setattr(torch.nn.functional, "one_hot", _one_hot)
        for name in ("autocast", "get_autocast_dtype", "is_autocast_enabled"):
            patch.setattr(torch, name, _on_host(getattr(torch, name)))
        patch.setattr(torch._C._nn, "_parse_to", _parsed_to)
        patch.setattr(Tensor, "to", _to)
        patch.setattr(Tensor, "pin_memory", lambda x: cuda_streams.lock_pages(x.clone()))
        patch.setattr(Tensor, "is_pinned", cuda_streams.is_pinned)
        for module, names in kernel_formulas.KERNELS.items():
            for name in names:
                patch.setattr(module, name, _Kernel(name, getattr(kernel_formulas, name)))
        patch.setattr(clip_grad, "_has_foreach_support", lambda tensors, device: isinstance(tensors[0], CudaTensor))
        patch.setattr(Optimizer, "_group_tensors_by_device_and_dtype", staticmethod(_grouped))
        patch.setattr(clip_grad, "_group_tensors_by_device_and_dtype", _grouped)
        patch.setattr(torch.cuda, "mem_get_info", lambda device: (2**33, 2**33))
        for name in ("Event", "Stream", "current_stream", "stream", "synchronize"):
            patch.setattr(torch.cuda, name, getattr(cuda_streams, name.replace("current_stream", "current")))
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
