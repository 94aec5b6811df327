"""The activation store: one Zarr v3 group per split, and a JSON manifest with the checksum of every file.

This module opens and verifies stores. ``docs/store-format.md`` is the normative description of the format.

Shapes: N images, T tokens, D width.
"""

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from sparsight.activations.array import Array
from sparsight.activations.shards import chunk_size
from sparsight.activations.statistics import Statistics, combined, sums
from sparsight.common.digests import digest, file_digest
from sparsight.common.errors import SparsightError, reason
from sparsight.common.slices import row_slices
from sparsight.common.tokens import EMBEDDING, READABLE

FORMAT_VERSION = 2
_ONE_FOR_ALL = 1  # an earlier version, in which all sites store the same tokens
NO_CHECKSUM = "0" * 64
"""Placeholder for the manifest's checksum while it is computed."""


class Rows:
    """Activations of one site as a lazily read array of shape (rows, D), in the stored dtype.

    Index with a slice, an array of row numbers, or a mask of all rows (IndexError for any other). A row is one (image,
    token) pair: row r is token r % tokens_per_image of image r // tokens_per_image.

    Args:
        array: the stored array.
        tokens: the tokens to read, along the array's token axis.
        mean: read the mean over these tokens instead, float32.
    """

    def __init__(self, array: Array, tokens: slice, mean: bool = False) -> None:
        self._array, self._tokens, self._mean = array, tokens, mean
        n_stored = 1 if len(array.shape) == 2 else array.shape[1]
        n_picked = len(range(*tokens.indices(n_stored)))
        self._as_stored = n_picked == n_stored and not mean
        self.dtype: np.dtype[Any] = np.dtype(np.float32) if mean else array.dtype
        self.tokens_per_image = 1 if mean else n_picked
        self.shape = (array.shape[0] * self.tokens_per_image, array.shape[-1])
        self.shard_images, self.chunk_images = array.shard_images, array.chunk_images
        if not self._as_stored:  # the chunks of a store of these tokens alone, so that both are read in the same order
            alone = chunk_size((self.tokens_per_image, self.shape[1]), self.dtype, self.shard_images)
            self.chunk_images = max(self.chunk_images, alone)

    def __len__(self) -> int:
        return self.shape[0]

    def first(self, n_images: int) -> "Rows":
        """The rows of the first ``n_images`` images."""
        assert n_images * self.tokens_per_image <= len(self)
        rows = copy.copy(self)
        rows.shape = n_images * self.tokens_per_image, self.shape[1]
        return rows

    def images(self, first: int, last: int, out: np.ndarray | None = None) -> np.ndarray:
        """The rows of images ``first`` to ``last`` - 1, (rows, D), written to ``out`` if given."""
        if self._as_stored:
            return self._array.read(first, last, out).reshape(-1, self.shape[1])
        if out is None:
            out = np.empty(((last - first) * self.tokens_per_image, self.shape[1]), self.dtype)
        for part in row_slices(last - first, self._array.piece_images):
            x = self._array.read(first + part.start, first + part.stop)[:, self._tokens]
            if self._mean:
                x = x.astype(np.float32).mean(axis=1)
            rows = slice(part.start * self.tokens_per_image, part.stop * self.tokens_per_image)
            out[rows] = x.reshape(-1, self.shape[1])
        return out

    def statistics(self) -> Statistics:
        """Mean and root mean square, in one pass."""
        n_images, shards = len(self) // self.tokens_per_image, []
        for shard in row_slices(n_images, self.shard_images):
            chunks = row_slices(shard.stop - shard.start, self.chunk_images)
            read = (self.images(shard.start + chunk.start, shard.start + chunk.stop) for chunk in chunks)
            shards.append(sums(read, self.shape[1]))
        return combined(shards, len(self))

    def __getitem__(self, key: int | slice | np.ndarray | Sequence[int]) -> np.ndarray:
        if isinstance(key, int | np.integer):
            return self[[int(key)]][0]
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            if step == 1:
                first, last = start // self.tokens_per_image, -(-max(stop, start) // self.tokens_per_image)
                skip = first * self.tokens_per_image
                return self.images(first, last)[start - skip : max(stop, start) - skip]
            key = np.arange(start, stop, step)
        rows = self._numbers(np.asarray(key))
        rows = np.where(rows < 0, rows + len(self), rows)
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"row numbers from {rows.min()} to {rows.max()}; there are {len(self)} rows")
        out = np.empty((len(rows), self.shape[1]), self.dtype)
        images, tokens = np.divmod(rows, self.tokens_per_image)
        order = np.argsort(images, kind="stable")
        for part in np.split(order, np.flatnonzero(np.diff(images[order] // self._array.chunk_images)) + 1):
            if len(part):  # the images of one chunk, which is read once
                first = int(images[part[0]])
                block = self.images(first, int(images[part[-1]]) + 1)
                out[part] = block[(images[part] - first) * self.tokens_per_image + tokens[part]]
        return out

    def _numbers(self, key: np.ndarray) -> np.ndarray:
        """Row numbers, int64 (n,), of an index array: itself, or the places where a mask is true."""
        if key.dtype == bool:
            if key.shape != (len(self),):
                raise IndexError(f"a mask of shape {key.shape}; there are {len(self)} rows")
            return np.flatnonzero(key)
        if key.ndim != 1 or not (key.size == 0 or np.issubdtype(key.dtype, np.integer)):
            raise IndexError(f"row numbers of shape {key.shape} and type {key.dtype}; give one dimension of integers")
        return key.astype(np.int64)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype or self.dtype, copy=False)

    def windows(self, size: int) -> Iterator[np.ndarray]:
        """All rows in order, ``size`` at a time."""
        for window in row_slices(len(self), size):
            yield self[window]


class ActivationStore:
    """A store opened for reading; see :meth:`open`. Safe to use from threads, forked and spawned workers."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path, self.manifest = path, manifest
        self._arrays = {site: Array(path / site) for site in manifest["sites"]}

    @classmethod
    def open(cls, path: str | Path) -> "ActivationStore":
        """Open ``<split>.zarr`` (or its ``<split>.json``) after checking manifest, file list and file sizes.

        Raises:
            SparsightError: no manifest, another format, or a missing or truncated file, with its name.
        """
        group, manifest_path = Path(path).with_suffix(".zarr"), Path(path).with_suffix(".json")
        text, manifest = _read_manifest(manifest_path)
        if "checksum" in manifest and checksum(text, manifest["checksum"]) != manifest["checksum"]:
            raise SparsightError(f"{manifest_path}: does not match its own checksum; {_again(group)}")
        for name, size in manifest["sizes"].items():
            file = group / name
            if not file.exists():
                raise SparsightError(f"{file}: missing from the store; {_again(group)}")
            if file.stat().st_size != size:
                raise SparsightError(f"{file}: {file.stat().st_size} bytes instead of {size}; {_again(group)}")
        return cls(group, manifest)

    @property
    def sites(self) -> list[str]:
        """The sites that are stored."""
        return list(self.manifest["sites"])

    def tokens_of(self, site: str) -> str:
        """What a site stores: ``cls``, ``registers``, ``patches``, ``all`` or ``mean``; or ``embedding``.

        Raises:
            SparsightError: a site that the store does not hold.
        """
        if site not in self._arrays:
            raise SparsightError(f"{self.path}: no site {site!r}; stored: {', '.join(self.sites)}")
        return str(self.manifest["sites"][site]["tokens"])

    def token_groups(self, site: str, tokens: str | None = None) -> dict[str, list[int]]:
        """Positions along the token axis of :meth:`rows` by kind: ``cls``, ``registers``, ``patches``.

        ``embedding``, and other tokens than ``all``, have a single kind, named after what is read.

        Raises:
            SparsightError: a site or tokens that the store does not hold.
        """
        read = self._read_as(site, tokens)
        if read != "all":
            return {read: list(range(self.rows(site, tokens).tokens_per_image))}
        positions = self.manifest["token_positions"]
        patches = list(range(*positions["patches"]))
        kinds = {"cls": positions["class"], "registers": positions["register"], "patches": patches}
        return {kind: indices for kind, indices in kinds.items() if indices}

    def rows(self, site: str, tokens: str | None = None) -> Rows:
        """Activations of a site, (rows, D).

        Args:
            site: the site.
            tokens: of a site that stores ``all``: ``cls``, ``registers``, ``patches`` or ``mean``; of one that stores
                ``patches``: ``mean``. The mean is over the stored patches, float32. None reads what is stored.

        Raises:
            SparsightError: a site or tokens that the store does not hold.
        """
        stored, read, array = self.tokens_of(site), self._read_as(site, tokens), self._arrays[site]
        if read == stored:
            return Rows(array, slice(None))
        positions = self.manifest["token_positions"]
        if read == "cls":
            first = positions["class"][0]
            return Rows(array, slice(first, first + 1))
        if read == "registers":
            return Rows(array, slice(positions["register"][0], positions["register"][-1] + 1))
        patches = slice(*positions["patches"]) if stored == "all" else slice(None)
        return Rows(array, patches, mean=read == "mean")

    def statistics(self, site: str, tokens: str | None = None) -> Statistics:
        """Mean and root mean square of :meth:`rows`: from the manifest, or of tokens that it does not list in one pass.

        Raises:
            SparsightError: a site or tokens that the store does not hold.
        """
        if self._read_as(site, tokens) == self.tokens_of(site):
            entry = self.manifest["sites"][site]
            return Statistics(np.array(entry["mean"]), entry["rms"])
        return self.rows(site, tokens).statistics()

    def _read_as(self, site: str, tokens: str | None) -> str:
        """What ``tokens`` mean at a site. The site ``embedding`` has only one thing to read."""
        stored = self.tokens_of(site)
        if tokens is None or stored == EMBEDDING:
            return stored
        if tokens not in READABLE[stored]:
            raise SparsightError(f"{self.path}: {site!r} holds tokens {stored!r}, not {tokens!r}; extract them first")
        kind = {"cls": "class", "registers": "register"}.get(tokens)
        if kind and stored == "all" and not self.manifest["token_positions"][kind]:
            raise SparsightError(f"{self.path}: the model has no {kind} token; read patches or mean of {site!r}")
        return tokens

    def at(self, site: str, images: Sequence[int] | np.ndarray, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """Activations of (image, token) pairs, (n, D); ``tokens`` count along the stored token axis."""
        rows = self.rows(site)
        tokens = np.asarray(tokens)
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < rows.tokens_per_image:
            raise SparsightError(f"{self.path}: {site!r} holds tokens 0 to {rows.tokens_per_image - 1} of an image")
        return rows[np.asarray(images) * rows.tokens_per_image + tokens]

    def verify(self) -> list[str]:
        """Hash every file; returns one line per problem, naming the file relative to the store."""
        return verify(self.path)


def verify(path: str | Path) -> list[str]:
    """Hash every file of a store, even if it is too damaged to be opened; returns one line per problem.

    Raises:
        SparsightError: the manifest is missing or cannot be read.
    """
    group, manifest_path = Path(path).with_suffix(".zarr"), Path(path).with_suffix(".json")
    text, manifest = _read_manifest(manifest_path)
    files, problems = manifest["files"], []
    if checksum(text, str(manifest.get("checksum"))) != manifest.get("checksum"):
        problems.append(f"{manifest_path.name}: does not match its own checksum")
    if digest(files) != manifest["digest"]:
        problems.append(f"{manifest_path.name}: its digest does not match its list of files")
    problems += problems_of(group, files)
    return problems + [f"{name}: not in the manifest" for name in sorted(files_of(group) - files.keys())]


def checksum(text: bytes, found: str) -> str:
    """sha256 of a manifest's text in which its own checksum ``found`` is replaced by zeros."""
    return hashlib.sha256(text.replace(found.encode(), NO_CHECKSUM.encode(), 1)).hexdigest()


def problems_of(path: Path, files: Mapping[str, str]) -> list[str]:
    """Problems of ``files`` (sha256 by name relative to ``path``), one line each."""
    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter's lock
        return [
            problem for problem in pool.map(lambda item: _problem(path, *item), files.items()) if problem is not None
        ]


def _problem(path: Path, name: str, sha256: str) -> str | None:
    file = path / name
    if not file.is_file():
        return f"{name}: missing"
    return None if file_digest(file) == sha256 else f"{name}: content differs from the manifest"


def files_of(folder: Path) -> set[str]:
    """Every file in a folder, relative to it."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def _read_manifest(path: Path) -> tuple[bytes, dict[str, Any]]:
    try:
        text = path.read_bytes()
        manifest = json.loads(text)
    except OSError as error:
        raise SparsightError(f"{path}: no store manifest ({reason(error)}); run extraction") from None
    except ValueError as error:
        raise SparsightError(f"{path}: not JSON ({error}); {_again(path)}") from None
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version == _ONE_FOR_ALL:
        for site, entry in manifest["sites"].items():
            entry["tokens"] = EMBEDDING if site == EMBEDDING else manifest["tokens"]
    elif version != FORMAT_VERSION:
        raise SparsightError(f"{path}: format_version {version}, this sparsight reads {FORMAT_VERSION}")
    return text, manifest


def _again(path: Path) -> str:
    return f"delete {path.with_suffix('.json').name} beside the store and give the same command again"
