"""The activation store: one Zarr v3 group per split, and a JSON manifest that vouches for every byte.

``docs/store-format.md`` is the normative description; this module writes, opens and verifies stores.

Shapes: N images, T tokens, D width.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec

from sparsight.batches import in_order
from sparsight.errors import SparsightError
from sparsight.schema import digest, file_digest
from sparsight.work import write_atomic, write_json

FORMAT_VERSION = 1
_CHUNK_BYTES = 2**21
_MIN_SHARDS = 8


def shard_size(n_images: int, most: int) -> int:
    """Images in a shard: a power of two, at most ``most``, and small enough for 8 shards."""
    return _power_of_two(min(most, n_images // _MIN_SHARDS))


def _power_of_two(limit: int) -> int:
    return 1 << (max(1, limit).bit_length() - 1)


class StoreWriter:
    """Creates the arrays of a store and writes it shard by shard, whole shards only.

    Args:
        path: the group, e.g. ``train.zarr``; arrays that are there already are kept.
        n_images: N.
        shapes: per site the shape of one image's activations, (T, D) or (D,).
        dtype: ``float16`` or ``float32``.
        shard_images: images in a shard, a power of two.
    """

    def __init__(
        self, path: Path, n_images: int, shapes: Mapping[str, tuple[int, ...]], dtype: str, shard_images: int
    ) -> None:
        self.path, self.n_images, self.shard_images = path, n_images, shard_images
        group = zarr.open_group(path, mode="a", zarr_format=3)
        self._arrays = {}
        for site, shape in shapes.items():
            image_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
            chunk = min(shard_images, _power_of_two(_CHUNK_BYTES // image_bytes))
            self._arrays[site] = group.require_array(
                site,
                shape=(n_images, *shape),
                dtype=dtype,
                chunks=(chunk, *shape),
                shards=(shard_images, *shape),
                compressors=[Crc32cCodec()],  # without it a flipped byte reads back as a number
                fill_value=0,
                config={"write_empty_chunks": True},  # otherwise all-zero chunks are silently absent
            )

    @property
    def shards(self) -> list[slice]:
        """The images of each shard."""
        return list(in_order(self.n_images, self.shard_images))

    def files(self, shard: int) -> list[str]:
        """The files of one shard, relative to the group."""
        return [
            f"{site}/c/{'/'.join(map(str, [shard] + [0] * (array.ndim - 1)))}" for site, array in self._arrays.items()
        ]

    def write(self, shard: int, values: Mapping[str, np.ndarray], uris: Sequence[str]) -> dict[str, Any]:
        """Write one shard of every site; returns its record for :func:`write_manifest`.

        Raises:
            SparsightError: a value that is not finite, or that the store's dtype cannot hold.
        """
        record: dict[str, Any] = {"sum": {}, "square": {}}
        for name in self.files(shard):
            (self.path / name).unlink(missing_ok=True)  # zarr would read a torn shard to merge with it
        for site, array in self._arrays.items():
            x = values[site]
            with np.errstate(over="ignore"):
                stored = x.astype(array.dtype)
            for name, bad in (
                ("NaN or infinite activation", ~np.isfinite(x)),
                (f"{array.dtype} overflow", ~np.isfinite(stored)),
            ):
                if bad.any():
                    row = int(np.flatnonzero(bad.reshape(len(x), -1).any(axis=1))[0])
                    advice = "check the weights" if name.startswith("NaN") else "set activations.dtype: float32"
                    raise SparsightError(f"{name} at site {site!r}, image {uris[row]}; {advice}")
            array[self.shards[shard]] = stored
            wide = stored.astype(np.float64).reshape(-1, x.shape[-1])
            record["sum"][site] = wide.sum(axis=0).tolist()
            record["square"][site] = float(np.square(wide).sum())
        record["files"] = {name: file_digest(self.path / name) for name in self.files(shard)}
        return record

    def verified(self, record: Mapping[str, Any]) -> bool:
        """Whether the shard that ``record`` describes is there, whole and unchanged."""
        files = {name: self.path / name for name in record["files"]}
        return all(path.exists() and file_digest(path) == record["files"][name] for name, path in files.items())

    def write_manifest(self, path: Path, records: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> None:
        """Write the manifest of a finished store.

        Args:
            path: ``<split>.json``.
            records: of every shard, in order.
            about: further keys: split, tokens, token positions, digests of backbone and images.
        """
        sites = {}
        for site, array in self._arrays.items():
            rows = array.size // array.shape[-1]
            sites[site] = {
                "dtype": str(array.dtype),
                "shape": list(array.shape),
                "mean": (np.sum([r["sum"][site] for r in records], axis=0) / rows).tolist(),
                "rms": float(np.sqrt(np.sum([r["square"][site] for r in records]) / array.size)),
            }
        shards = [name for shard in range(len(self.shards)) for name in self.files(shard)]
        names = sorted(["zarr.json", *(f"{site}/zarr.json" for site in self._arrays), *shards])
        for name in _files(self.path) - set(names):
            (self.path / name).unlink()  # what a killed writer was still writing beside its target
        files = {name: file_digest(self.path / name) for name in names}
        manifest = {
            "format_version": FORMAT_VERSION,
            "sites": sites,
            "shard_images": self.shard_images,
            "files": files,
            "sizes": {name: (self.path / name).stat().st_size for name in names},
            "digest": digest(files),
            **about,
        }
        write_atomic(path, lambda aside: write_json(aside, manifest))


class Rows:
    """Activations of one site as a lazily read array of shape (rows, D), float as stored.

    Index with a slice or an array of row numbers. A row is one image, or one (image, token) pair.
    """

    def __init__(self, store: "ActivationStore", site: str, tokens: slice | int) -> None:
        self._store, self._array, self._tokens = store, store.group[site], tokens
        n_tokens = 1 if self._array.ndim == 2 else len(np.atleast_1d(np.arange(self._array.shape[1])[tokens]))
        self.tokens_per_image = n_tokens
        self.shape = (self._array.shape[0] * n_tokens, self._array.shape[-1])

    def __len__(self) -> int:
        return int(self.shape[0])

    def __getitem__(self, key: slice | np.ndarray | Sequence[int]) -> np.ndarray:
        rows = np.arange(len(self))[key]
        if len(rows) == 0:
            return np.empty((0, self.shape[1]), self._array.dtype)
        images, inverse = np.unique(rows // self.tokens_per_image, return_inverse=True)
        try:
            first, last = int(images[0]), int(images[-1]) + 1
            neighbours = last - first == len(images)
            block = self._array[first:last] if neighbours else self._array.oindex[images]
        except (ValueError, OSError) as error:
            problems = self._store.verify() or [str(error)]
            raise SparsightError(f"{self._store.path}: damaged: {problems[0]}; {_again(self._store.path)}") from error
        if block.ndim == 3:
            block = np.atleast_2d(block[:, self._tokens]) if isinstance(self._tokens, int) else block[:, self._tokens]
        flat = block.reshape(-1, self.shape[1])
        return flat[inverse * self.tokens_per_image + rows % self.tokens_per_image]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype or self._array.dtype, copy=False)

    def windows(self, size: int) -> Iterator[np.ndarray]:
        """All rows in order, ``size`` at a time."""
        for window in in_order(len(self), size):
            yield self[window]


class ActivationStore:
    """A store opened for reading; see :meth:`open`."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path, self.manifest = path, manifest
        self.group = zarr.open_group(path, mode="r")

    @classmethod
    def open(cls, path: str | Path) -> "ActivationStore":
        """Open ``<split>.zarr`` (or its ``<split>.json``) after checking manifest, file list and file sizes.

        Raises:
            SparsightError: no manifest, another format, or a missing or truncated file (named).
        """
        group, manifest_path = Path(path).with_suffix(".zarr"), Path(path).with_suffix(".json")
        try:
            manifest = json.loads(manifest_path.read_text())
        except OSError as error:
            raise SparsightError(f"{manifest_path}: no store manifest ({error.strerror}); run extraction") from None
        except json.JSONDecodeError as error:
            raise SparsightError(f"{manifest_path}: not JSON ({error}); {_again(group)}") from None
        if manifest.get("format_version") != FORMAT_VERSION:
            found = manifest.get("format_version")
            raise SparsightError(f"{manifest_path}: format_version {found}, this sparsight reads {FORMAT_VERSION}")
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

    @property
    def tokens(self) -> str:
        """What was stored: ``cls``, ``patches``, ``all`` or ``mean``."""
        return str(self.manifest["tokens"])

    def rows(self, site: str, tokens: str | None = None) -> Rows:
        """Activations of a site, (rows, D); ``tokens`` picks from a store of several tokens.

        Raises:
            SparsightError: a site or tokens that the store does not hold.
        """
        if site not in self.manifest["sites"]:
            raise SparsightError(f"{self.path}: no site {site!r}; stored: {', '.join(self.sites)}")
        tokens = tokens or self.tokens
        if tokens == self.tokens or site == "embedding":
            return Rows(self, site, slice(None))
        positions = self.manifest["token_positions"]
        if self.tokens != "all" or tokens not in ("cls", "patches") or (tokens == "cls" and not positions["class"]):
            raise SparsightError(f"{self.path}: holds tokens {self.tokens!r}, not {tokens!r}; extract them first")
        return Rows(self, site, 0 if tokens == "cls" else slice(positions["patches"][0], positions["patches"][1]))

    def verify(self) -> list[str]:
        """Hash every file; returns one line per problem, naming the file relative to the store."""
        files, problems = self.manifest["files"], []
        if digest(files) != self.manifest["digest"]:
            problems.append(f"{self.path.with_suffix('.json').name}: its digest does not match its list of files")
        for name, sha256 in files.items():
            path = self.path / name
            if not path.exists():
                problems.append(f"{name}: missing")
            elif file_digest(path) != sha256:
                problems.append(f"{name}: content differs from the manifest")
        return problems + [f"{name}: not in the manifest" for name in sorted(_files(self.path) - files.keys())]


def _again(path: Path) -> str:
    return f"delete {path.with_suffix('.json').name} beside the store and give the same command again"


def _files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def main() -> None:
    """``python -m sparsight.store verify|info PATH``."""
    parser = argparse.ArgumentParser(prog="python -m sparsight.store", description=main.__doc__)
    parser.add_argument("command", choices=("verify", "info"))
    parser.add_argument("path", type=Path, help="a store, <split>.zarr")
    arguments = parser.parse_args()
    try:
        store = ActivationStore.open(arguments.path)
    except SparsightError as error:
        sys.exit(f"error: {error}")
    if arguments.command == "info":
        for site, about in store.manifest["sites"].items():
            print(f"{site}  {about['dtype']}  {about['shape']}  rms {about['rms']:.4g}")
        print(f"tokens {store.tokens}, {len(store.manifest['files'])} files, digest {store.manifest['digest']}")
        return
    problems = store.verify()
    if problems:
        sys.exit("\n".join(problems))
    print(f"{len(store.manifest['files'])} files verified")


if __name__ == "__main__":
    main()
