"""Test images of each latent, and latents of each test image, from codes that are computed in windows of images.

An image's activation is the largest over its tokens. Memory does not grow with the number of images: of each latent a
fixed number of images is kept.

Shapes: N test images, B images at a time, T tokens of an image, P patches, F latents (d_sae), k images of a latent,
S = 5 m images that show its five intervals.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from sparsight.common.progress import followed
from sparsight.common.slices import row_slices
from sparsight.report.latents.pack import shares
from sparsight.sae.base import SAE
from sparsight.sae.inputs import SaeInputs
from sparsight.sae.metrics.sparse_codes import Matrix, from_codes

INTERVALS = 5
"""Equal intervals from 0 to a latent's largest activation."""
SAMPLES = 4
"""Images drawn from each interval."""
STRENGTHS = 20
"""Latents listed per image."""
PER_PATCH = 5
"""Latents listed per patch."""
_ENTRIES = 2**25  # largest number of entries of dense codes at a time
_PENDING = 2**20  # entries that are collected before all but the best are dropped


@dataclass(frozen=True)
class Shown:
    """Images of each latent; number -1 and activation 0 where there is none."""

    top: np.ndarray
    """(F, k) images of the largest activation, largest first, among equal ones the earlier first."""
    top_values: np.ndarray
    samples: np.ndarray
    """(F, S) images drawn at random from the intervals, the strongest interval first."""
    sample_values: np.ndarray
    counts: np.ndarray
    """(F, 5) images in each interval, the strongest first."""


@dataclass(frozen=True)
class Details:
    """What the patches of images say; shares of a latent's largest activation are of the range of their type."""

    top_heats: np.ndarray | None
    """uint8 (F, k, P) shares on the patches of :attr:`Shown.top`; None if patches form no square."""
    sample_heats: np.ndarray | None
    """uint8 (F, S, P), the same for the samples."""
    strengths: tuple[np.ndarray, np.ndarray]
    """Latents of each chosen image, strongest first, and their activations, (n, STRENGTHS)."""
    patches: tuple[np.ndarray, np.ndarray] | None
    """Latents of each patch and their activations, (n, P, PER_PATCH)."""


class Best:
    """Of each group the ``m`` entries (image, value) with the smallest keys, ties by image."""

    def __init__(self, m: int) -> None:
        self._m, self._n_pending = m, 0
        self._parts: list[tuple[np.ndarray, ...]] = []

    def add(self, groups: np.ndarray, keys: np.ndarray, numbers: np.ndarray, values: np.ndarray) -> None:
        """Add entries, one array element each."""
        self._parts.append((groups, keys, numbers, values))
        self._n_pending += len(groups)
        if self._n_pending > _PENDING:
            self._reduce()

    def table(self, n_groups: int) -> tuple[np.ndarray, np.ndarray]:
        """Numbers, int32, and values, float32, (n_groups, m); -1 and 0 where there is none."""
        numbers, values = np.full((n_groups, self._m), -1, np.int32), np.zeros((n_groups, self._m), np.float32)
        if self._parts:
            groups, ranks = self._reduce()
            numbers[groups, ranks], values[groups, ranks] = self._parts[0][2:]
        return numbers, values

    def _reduce(self) -> tuple[np.ndarray, np.ndarray]:
        """Drop all but the best entries; the groups of those left, and their ranks."""
        groups, keys, numbers, values = (np.concatenate(parts) for parts in zip(*self._parts, strict=True))
        order = np.lexsort((numbers, keys, groups))
        ranks = np.arange(len(order)) - np.searchsorted(groups[order], groups[order])
        kept = order[ranks < self._m]
        self._parts, self._n_pending = [(groups[kept], keys[kept], numbers[kept], values[kept])], 0
        return groups[kept], ranks[ranks < self._m]


@torch.no_grad()
def images_of_latents(one: SAE, seen: SaeInputs, n: int, k: int, largest_F: np.ndarray, seed: int) -> Shown:
    """The first pass: the images of each latent.

    Args:
        one: the SAE.
        seen: what it reads of the test split.
        n: N.
        k: images of the largest activation per latent.
        largest_F: largest activation of each latent, whose fifths are the intervals.
        seed: seed of the order in which samples are drawn. It is one order of all images, so windows do not matter.
    """
    top, samples = Best(k), Best(SAMPLES)
    counts = np.zeros((one.d_sae, INTERVALS), np.int64)
    drawn = np.random.default_rng(seed).permutation(n)
    windows = list(row_slices(n, _batch(one, seen)))
    for window in followed(windows, len(windows), "windows"):
        at, latents, values = per_image(_codes(one, seen, window), seen.tokens)
        images = at + window.start
        top.add(latents, -values, images, values)
        # The strongest interval is number 0.
        fifths = (INTERVALS * (values / np.maximum(largest_F[latents], 1e-30))).astype(np.int64)
        groups = latents * INTERVALS + INTERVALS - 1 - fifths.clip(0, INTERVALS - 1)
        samples.add(groups, drawn[images].astype(np.float32), images, values)
        counts += np.bincount(groups, minlength=counts.size).reshape(counts.shape)
    numbers, of_samples = (x.reshape(one.d_sae, -1) for x in samples.table(one.d_sae * INTERVALS))
    return Shown(*top.table(one.d_sae), numbers, of_samples, counts)


@torch.no_grad()
def details(one: SAE, seen: SaeInputs, shown: Shown, largest_F: np.ndarray, chosen: np.ndarray) -> Details:
    """The second pass: the patches of the shown images, and the latents of the chosen images.

    Args:
        one: the SAE.
        seen: what it reads of the test split.
        shown: the images of each latent.
        largest_F: largest activation of each latent.
        chosen: rows of the test split, ascending.
    """
    patches = square_of_patches(seen)
    shown_FS = np.concatenate([shown.top, shown.samples], axis=1)
    wanted = chosen if patches is None else np.union1d(chosen, shown_FS[shown_FS >= 0])
    pairs = np.argsort(shown_FS, axis=None, kind="stable")  # places in the table by image
    heats = np.zeros((shown_FS.size, 0 if patches is None else len(patches)), np.uint8)
    strengths = Best(STRENGTHS)
    numbers = np.full((len(chosen), heats.shape[1], PER_PATCH), -1, np.int32)
    values = np.zeros(numbers.shape, np.float32)
    for part in row_slices(len(wanted), _batch(one, seen)):
        for window in _runs(wanted[part]):
            z = _codes(one, seen, window)
            inside = np.arange(*np.searchsorted(chosen, [window.start, window.stop]))
            at, latents, found = per_image(z, seen.tokens)
            mine = np.isin(at + window.start, chosen)
            places = np.searchsorted(chosen, at[mine] + window.start)
            strengths.add(places, -found[mine], latents[mine], found[mine])
            if patches is None:
                continue
            numbers[inside], values[inside] = _of_patches(z, seen.tokens, patches, chosen[inside] - window.start)
            first, last = np.searchsorted(shown_FS.flat[pairs], [window.start, window.stop])
            places = pairs[first:last]
            rows = (shown_FS.flat[places] - window.start)[:, None] * seen.tokens + patches
            own = places // shown_FS.shape[1]
            heats[places] = shares(_entries(z, rows, own[:, None]), largest_F[own, None], np.uint8)
    both = strengths.table(len(chosen))
    if patches is None:
        return Details(None, None, both, None)
    heats_FSP = heats.reshape(*shown_FS.shape, -1)
    k = shown.top.shape[1]
    return Details(heats_FSP[:, :k], heats_FSP[:, k:], both, (numbers, values))


def per_image(z: Matrix, tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images, latents and activations of codes (B T, F): the largest over the tokens, of latents that fire."""
    rows, latents, values = _coordinates(z)
    keys = rows // tokens * z.shape[1] + latents
    if tokens > 1 and len(keys):
        order = np.argsort(keys, kind="stable")
        starts = np.flatnonzero(np.diff(keys[order], prepend=-1))
        keys, values = keys[order][starts], np.maximum.reduceat(values[order], starts)
    return *np.divmod(keys, z.shape[1]), values


def square_of_patches(seen: SaeInputs) -> np.ndarray | None:
    """Positions of the patches among the tokens that the SAE reads; None if there are none or they form no square."""
    patches = seen.groups.get("patches", [])
    return np.array(patches) if patches and len(patches) == round(len(patches) ** 0.5) ** 2 else None


def _batch(one: SAE, seen: SaeInputs) -> int:
    return max(1, _ENTRIES // (one.d_sae * seen.tokens))


def _codes(one: SAE, seen: SaeInputs, images: slice) -> Matrix:
    """Codes of every token of some images that the SAE reads, (B T, F)."""
    return from_codes(one.encode(seen.images(images)))


def _coordinates(z: Matrix) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows, columns and values of a CSR array, in the order of its rows."""
    rows = np.repeat(np.arange(z.shape[0], dtype=np.int64), np.diff(z.indptr))
    return rows, z.indices.astype(np.int64), z.data


def _entries(z: Matrix, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """z[rows, columns] as a dense array. The columns of each row of z ascend."""
    own_rows, own_columns, values = _coordinates(z)
    keys = np.append(own_rows * z.shape[1] + own_columns, -1)
    wanted = rows * z.shape[1] + columns
    places = np.searchsorted(keys[:-1], wanted)
    return np.where(keys[places] == wanted, np.append(values, 0)[places], 0)


def _of_patches(z: Matrix, tokens: int, patches: np.ndarray, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Latents and activations of each patch of some images of a window, strongest first, (n, P, PER_PATCH)."""
    rows = (images[:, None] * tokens + patches).ravel()
    at, latents, values = _coordinates(z[rows])
    best = Best(PER_PATCH)
    best.add(at, -values, latents, values)
    numbers, strongest = best.table(len(rows))
    shape = len(images), len(patches), PER_PATCH
    return numbers.reshape(shape), strongest.reshape(shape)


def _runs(numbers: np.ndarray) -> Iterator[slice]:
    """Ascending numbers as slices of consecutive ones."""
    for run in np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1):
        if len(run):
            yield slice(int(run[0]), int(run[-1]) + 1)
