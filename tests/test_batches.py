"""Batches: every row once an epoch, an order that nothing but seed and epoch decides, bounded memory."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_store
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsight.activations.store import ActivationStore
from sparsight.common.errors import SparsightError
from sparsight.training.batches import Batch, RowNumbers, StoreBatches

N, TOKENS, D = 301, 3, 8
IMAGE_BYTES = 2 * TOKENS * D * 2  # two sites in float16
SITES = ("blocks.0.input", "blocks.1.input")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    shapes = dict.fromkeys(SITES, (TOKENS, D))
    return ActivationStore.open(write_store(tmp_path_factory.mktemp("s"), N, shapes, "all", shard_images=16))


def batches(store: ActivationStore, memory: int, workers: int = 1, size: int = 50, seed: int = 0) -> StoreBatches:
    return StoreBatches({site: store.rows(site) for site in SITES}, size, seed, memory, workers)


def order(made: list[Batch]) -> np.ndarray:
    return np.concatenate([batch.rows for batch in made])


@settings(deadline=None)
@given(images=st.integers(32, 2 * N), size=st.integers(1, 2 * N * TOKENS), epoch=st.integers(0, 3))
def test_an_epoch_holds_every_row_once_with_its_values(
    store: ActivationStore, images: int, size: int, epoch: int
) -> None:
    whole = {site: store.rows(site)[:] for site in SITES}
    data = batches(store, images * IMAGE_BYTES, size=size)
    made = list(data.epoch(epoch))
    assert len(made) == data.per_epoch
    assert [len(batch.rows) for batch in made[:-1]] == [size] * (len(made) - 1), "only the last may be shorter"
    assert np.array_equal(np.sort(order(made)), np.arange(N * TOKENS))
    for batch in made:
        for site in SITES:
            assert batch.x[site].dtype == torch.float16
            assert np.array_equal(batch.x[site].numpy(), whole[site][batch.rows])


@pytest.mark.parametrize("images", [40, 100, N])
def test_order_depends_on_seed_and_epoch_but_not_on_workers(store: ActivationStore, images: int) -> None:
    reference = [order(list(batches(store, images * IMAGE_BYTES).epoch(epoch))) for epoch in range(2)]
    for workers in (0, 1, 4):
        data = batches(store, images * IMAGE_BYTES, workers)
        for epoch in (1, 0):
            assert np.array_equal(order(list(data.epoch(epoch))), reference[epoch])
    assert not np.array_equal(reference[0], reference[1])
    other = order(list(batches(store, images * IMAGE_BYTES, seed=1).epoch(0)))
    assert not np.array_equal(other, reference[0])


@settings(deadline=None)
@given(skip=st.integers(0, 19), images=st.sampled_from([40, 100, N]), workers=st.sampled_from([0, 1, 4]))
def test_a_saved_position_continues_with_the_same_batches(
    store: ActivationStore, skip: int, images: int, workers: int
) -> None:
    whole = list(batches(store, images * IMAGE_BYTES).epoch(1))
    rest = list(batches(store, images * IMAGE_BYTES, workers).epoch(1, skip))
    assert len(rest) == max(0, len(whole) - skip)
    for a, b in zip(whole[skip:], rest, strict=True):
        assert np.array_equal(a.rows, b.rows)
        assert all(torch.equal(a.x[site], b.x[site]) for site in SITES)


def test_an_epoch_may_be_left_early_and_another_begun(store: ActivationStore) -> None:
    data = batches(store, 40 * IMAGE_BYTES, workers=2)
    reference = order(list(data.epoch(0)))
    for _ in range(3):
        left = data.epoch(0)
        next(left)
        left.close()
    assert np.array_equal(order(list(data.epoch(0))), reference)


def test_pools_mix_classes_as_well_as_a_permutation_of_everything_would() -> None:
    """Images were class-sorted at their source; the manifest's seeded order and small pools undo that."""
    n, classes, size = 20_000, 10, 500
    generator = np.random.default_rng(0)
    labels = np.sort(generator.integers(0, classes, n))[generator.permutation(n)]  # as images.write_manifest does

    class Fake:
        dtype, shape, tokens_per_image, chunk_images = np.dtype(np.float16), (n, 1), 1, 64

        def images(self, first: int, last: int, out: np.ndarray | None = None) -> np.ndarray:
            return np.zeros((last - first, 1), np.float16)

    data = StoreBatches({"x": Fake()}, size, 0, n * 2 // 10, workers=0)
    expected = np.bincount(labels, minlength=classes) / n * size

    def statistic(rows: np.ndarray) -> float:
        counts = np.stack([np.bincount(labels[rows[i : i + size]], minlength=classes) for i in range(0, n, size)])
        return float((np.square(counts - expected) / expected).sum())

    found = [statistic(order(list(data.epoch(epoch)))) for epoch in range(20)]
    full = [statistic(generator.permutation(n)) for _ in range(2000)]
    low, high = np.quantile(full, [0.0005, 0.9995])
    assert all(low < value < high for value in found)
    assert abs(np.mean(found) - np.mean(full)) < 4 * np.std(full) / np.sqrt(len(found))
    assert statistic(np.argsort(labels)) > 10 * high, "the statistic sees an order that is not mixed"


@pytest.mark.parametrize("memory", [40 * IMAGE_BYTES, 2 * N * IMAGE_BYTES])
def test_damage_is_found_again_when_it_is_read_again(tmp_path: Path, memory: int) -> None:
    path = write_store(tmp_path, N, dict.fromkeys(SITES, (TOKENS, D)), "all", shard_images=16)
    shard = path / SITES[1] / "c" / "7" / "0" / "0"
    whole = shard.read_bytes()
    data = batches(ActivationStore.open(path), memory)
    shard.write_bytes(whole[:9] + b"?" + whole[10:])
    for _ in range(2):
        with pytest.raises(SparsightError, match=f"{SITES[1]}/c/7/0/0: damaged"):
            list(data.epoch(0))
    shard.write_bytes(whole)
    assert np.array_equal(np.sort(order(list(data.epoch(0)))), np.arange(N * TOKENS))


def test_what_cannot_be_batched_is_refused(store: ActivationStore, tmp_path: Path) -> None:
    with pytest.raises(SparsightError, match=r"hold less than two chunks of 16 images, 0\.0 MB each; allow more"):
        batches(store, 20 * IMAGE_BYTES)
    other = ActivationStore.open(write_store(tmp_path, 10, {"embedding": (4,)}))
    with pytest.raises(SparsightError, match=r"as many of every site; found \{'a': 903, 'b': 10\}"):
        StoreBatches({"a": store.rows(SITES[0]), "b": other.rows("embedding")}, 5, 0, 2**20)


def test_row_numbers_are_a_permutation_cut_into_batches() -> None:
    data = RowNumbers(23, 5, seed=3)
    made = list(data.epoch(2))
    assert [len(rows) for rows in made] == [5, 5, 5, 5, 3] and data.per_epoch == 5
    assert sorted(np.concatenate(made).tolist()) == list(range(23))
    for a, b in zip(made[3:], data.epoch(2, skip=3), strict=True):
        assert np.array_equal(a, b)
    assert not np.array_equal(np.concatenate(made), np.concatenate(list(data.epoch(3))))
