"""A union of several data sets."""

import dataclasses
from collections import defaultdict
from collections.abc import Iterable

import numpy as np

from sparsight.config.images import members
from sparsight.images.sources.base import Item, Reader, Reopening
from sparsight.images.sources.single import SINGLE


class Union(Reopening):
    """Members in the order of the path, ``<source>:<path> + <source>:<path>``; a uri is ``<member>:<member's uri>``.

    Classes with equal names are merged. Each member keeps its own splits.
    """

    def __init__(self, path: str | None) -> None:
        assert path is not None
        self.path = path
        self._members = [SINGLE[source](where) for source, where in members(path)]

    def items(self) -> list[Item]:
        return [
            dataclasses.replace(item, uri=f"{number}:{item.uri}", member=number)
            for number, member in enumerate(self._members)
            for item in member.items()
        ]

    def class_names(self) -> list[str]:
        return list(dict.fromkeys(name for member in self._members for name in member.class_names()))

    def reader(self, uris: Iterable[str]) -> Reader:
        """A reader that passes each image to its member's own reader."""
        by_member: dict[int, list[str]] = defaultdict(list)
        for number, uri in map(_split, uris):
            by_member[number].append(uri)
        return _Readers({number: self._members[number].reader(uris) for number, uris in by_member.items()})

    def read(self, uri: str) -> bytes:
        number, member_uri = _split(uri)
        return self._members[number].read(member_uri)

    def decode(self, uri: str, data: bytes) -> np.ndarray:
        number, member_uri = _split(uri)
        return self._members[number].decode(member_uri, data)


class _Readers:
    """The members' readers, by the member's number."""

    def __init__(self, readers: dict[int, Reader]) -> None:
        self._readers = readers

    def read(self, uri: str) -> bytes:
        number, member_uri = _split(uri)
        return self._readers[number].read(member_uri)


def _split(uri: str) -> tuple[int, str]:
    number, _, member_uri = uri.partition(":")
    return int(number), member_uri
