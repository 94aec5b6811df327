"""Streams, events and page-locked memory of the pretended device.

Work is in order on one stream only, and the host does not wait for it. So two faults are possible that no result of a
run on the CPU shows, and that raise here:

* a stream reads what another one computed, and has not been told to wait for it;
* the host changes page-locked memory that a copy to the device may still have to read.

A copy into page-locked memory takes place only when the host waits for it. What reads the memory before finds the old
numbers, as it may on a card.
"""

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

TO_DEVICE = "copy to the device"
"""What the host waits for in a copy from memory that is not page-locked."""


class Stream:
    """A sequence of work."""

    def __init__(self, *_: object) -> None:
        self.tick = 0
        """Number of its last piece of work."""
        self.seen: dict[Stream, int] = {}
        """The work of other streams that this one has waited for."""
        self.pending: deque[tuple[int, Callable[[], None]]] = deque()
        """Copies that are done or checked when the host waits."""

    def wait_event(self, event: "Event") -> None:
        self.wait(event.stream, event.tick)

    def wait_stream(self, other: "Stream") -> None:
        self.wait(other, other.tick)

    def wait(self, other: "Stream", tick: int) -> None:
        """Do nothing more before ``other`` has done its work up to ``tick``, and all that it waited for."""
        for stream, seen in {**other.seen, other: tick}.items():
            if stream is not self:
                self.seen[stream] = max(seen, self.seen.get(stream, 0))

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        _state.on_wait("synchronize")
        _finish(self, self.tick)


class Event:
    """A place in a stream."""

    def __init__(self, *_: object, **__: object) -> None:
        self.stream, self.tick, self.time = _state.default, 0, 0.0

    def record(self, stream: Stream | None = None) -> None:
        self.stream = stream or current()
        self.tick, self.time = self.stream.tick, time.perf_counter()

    def synchronize(self) -> None:
        _state.on_wait("synchronize")
        _finish(self.stream, self.tick)

    def elapsed_time(self, end: "Event") -> float:
        return 1000 * (end.time - self.time)


class _State:
    def __init__(self) -> None:
        self.default, self.threads, self.lock = Stream(), threading.local(), threading.RLock()
        self.streams = {self.default}
        self.on_wait: Callable[[str], None] = lambda _: None
        self.known: dict[Stream, int] = {}
        """The work of each stream that the host has waited for."""
        self.written: dict[int, tuple[Stream, int]] = {}
        """By the address of memory of the device, the stream that wrote it and when."""
        self.pinned: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()
        """Page-locked memory, by its address."""


_state = _State()


def reset(on_wait: Callable[[str], None]) -> None:
    """Forget everything; ``on_wait`` is told of each time the host waits, and for what."""
    vars(_state).update(vars(_State()))
    _state.on_wait = on_wait


def current(*_: object) -> Stream:
    """``torch.cuda.current_stream``."""
    return getattr(_state.threads, "stream", _state.default)


@contextmanager
def stream(one: Stream) -> Iterator[None]:
    """``torch.cuda.stream``."""
    before = current()
    _state.threads.stream = one
    try:
        yield
    finally:
        _state.threads.stream = before


def synchronize(*_: object) -> None:
    """``torch.cuda.synchronize``."""
    _state.on_wait("synchronize")
    for one in _state.streams:
        _finish(one, one.tick)


def waited(what: str) -> None:
    """The host waits for the current stream."""
    _state.on_wait(what)
    _finish(current(), current().tick)


def _finish(one: Stream, tick: int) -> None:
    with _state.lock:
        for stream, until in {**one.seen, one: tick}.items():
            _state.known[stream] = max(until, _state.known.get(stream, 0))
            while stream.pending and stream.pending[0][0] <= until:
                stream.pending.popleft()[1]()


def ran(op: Any, inputs: list[Tensor], outputs: list[Tensor]) -> None:
    """Note that the current stream carries out ``op`` on what is behind device tensors.

    Raises:
        RuntimeError: an input is computed on a stream for which this one has not waited.
    """
    here = current()
    here.tick += 1
    if here is _state.default and not _state.written:
        return  # every tensor so far is of the default stream
    for x in inputs:
        writer, tick = _state.written.get(_address(x), (here, 0))
        if writer is not here and max(here.seen.get(writer, 0), _state.known.get(writer, 0)) < tick:
            raise RuntimeError(f"{op} reads on one stream what another one may not yet have computed; let it wait")
    _state.streams.add(here)
    _state.written |= {_address(x): (here, here.tick) for x in outputs}


def lock_pages(x: Tensor) -> Tensor:
    """``x``, whose memory is now page-locked."""
    _state.pinned[_address(x)] = x
    return x


def is_pinned(x: Tensor) -> bool:
    """Whether the memory of a tensor of the host is page-locked."""
    return _address(x) in _state.pinned


def copy_to_device(x: Tensor, out: Tensor, non_blocking: bool) -> None:
    """Note a copy from host memory; the host waits unless the memory is page-locked and the copy asks for this."""
    here = current()
    ran("copy", [], [out])
    if not (non_blocking and is_pinned(x)):
        waited(TO_DEVICE)
        return
    taken = x.detach().clone()

    def check() -> None:
        if not torch.equal(x, taken):
            raise RuntimeError("page-locked memory was changed before it was known to be copied to the device")

    here.pending.append((here.tick, check))


def copy_to_host(x: Tensor, out: Tensor, non_blocking: bool) -> None:
    """Copy what is behind a device tensor to the host, at once or, into page-locked memory, when the host waits."""
    here, taken = current(), x.detach().clone()
    ran("copy", [x], [])

    def copy() -> None:
        out.detach().copy_(taken)

    here.pending.append((here.tick, copy))
    if not (non_blocking and is_pinned(out)):
        waited("copy")


def _address(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()
