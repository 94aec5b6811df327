"""The C library's allocator."""

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGEST = 2**25  # of the second; glibc takes no larger one


def keep_freed_memory() -> None:
    """Let glibc keep the memory of freed arrays of up to 32 MiB for the next ones. Other C libraries stay as they are.

    By default it gives the end of the heap back to the system, and new arrays then cost a page fault for each 4 KiB. In
    a training step on the CPU, whose gradients are such arrays, that is a tenth of the time and more.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _LARGEST)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)
