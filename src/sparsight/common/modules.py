"""The base class of the package's modules."""

import copy
from typing import Self

from torch import nn


class Module(nn.Module):
    """A module whose shallow copy shares tensors and submodules, but can be given others of its own.

    ``copy.copy`` of a plain ``nn.Module`` shares the tables of buffers, parameters and submodules, so that a buffer set
    on the copy is set on the original, too.
    """

    def __copy__(self) -> Self:
        copied = type(self).__new__(type(self))
        for name, value in vars(self).items():
            vars(copied)[name] = copy.copy(value) if isinstance(value, dict | set) else value
        return copied
