"""Retrieval and the vectors of VS2++ against plain numpy and arithmetic by hand.

Shapes: Q queries, B rows of the bank, N neighbours of a query, D width, F latents (d_sae).
"""

from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import write_store
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsight as ss
from sparsight import kernels
from sparsight.activations.store import ActivationStore, Rows
from sparsight.common.errors import SparsightError
from sparsight.steering import nearest_neighbours, retrieval
from sparsight.steering.nearest_neighbours import Neighbours, nearest

CPU = torch.device("cpu")
BLOCKS = st.fixed_dictionaries({
    "_QUERIES": st.integers(1, 8), "_WINDOW": st.integers(3, 60),
})  # fmt: skip
ONE, OTHER = np.array([[3.0, 4.0]]), np.array([[1.0, 0.0], [6.0, 8.0], [0.0, 1.0], [-3.0, -4.0]])


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows.astype(float), axis=1, keepdims=True)


def plain(queries: np.ndarray, bank: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices and similarities, (Q, N) both, by sorting all of them."""
    q, b = (unit(x).astype(np.float32).astype(float) for x in (queries, bank))
    s = (q @ b.T).astype(np.float32)
    order = np.argsort(-s, axis=1, kind="stable")[:, :n]
    return order, np.take_along_axis(s, order, axis=1)


def check(queries: np.ndarray, bank: np.ndarray, n: int) -> None:
    found, (indices, similarity) = nearest(queries, bank, n, CPU), plain(queries, bank, n)
    assert np.array_equal(found.indices, indices) and np.array_equal(found.similarity, similarity)
    assert (found.indices.dtype, found.similarity.dtype) == (torch.int64, torch.float32)


def neighbours(indices: list[list[int]], similarity: list[list[float]] | None = None) -> Neighbours:
    return Neighbours(
        torch.tensor(indices), torch.tensor(similarity or np.ones(np.shape(indices)), dtype=torch.float32)
    )


@settings(deadline=None)
@given(
    n_queries=st.integers(1, 8), n_bank=st.integers(1, 60), width=st.integers(1, 9), seed=st.integers(0, 99),
    blocks=BLOCKS, data=st.data(),
)  # fmt: skip
def test_nearest_equals_sorting_all_similarities_whatever_the_blocks(
    n_queries: int, n_bank: int, width: int, seed: int, blocks: dict[str, Any], data: st.DataObject
) -> None:
    generator = np.random.default_rng(seed)
    # Small whole numbers: many rows are equal, or multiples of each other, and tie.
    queries, bank = (generator.integers(-2, 3, (size, width)).astype(np.float64) for size in (n_queries, n_bank))
    queries[~queries.any(axis=1)], bank[~bank.any(axis=1)] = 1, 1
    with mock.patch.multiple(nearest_neighbours, **blocks):
        check(queries, bank, data.draw(st.one_of(st.integers(1, n_bank), st.just(n_bank))))


@pytest.mark.parametrize("order", [1, -1])
def test_bank_sorted_by_similarity(order: int) -> None:
    angle_B = np.linspace(0, 3, 1000)[::order]
    bank = np.stack([np.cos(angle_B), np.sin(angle_B)], axis=1)
    with mock.patch.multiple(nearest_neighbours, _WINDOW=256):
        check(bank[[0, 999]], bank, 20)


def test_rows_closer_than_the_rounding_of_an_fp32_product_come_in_their_true_order() -> None:
    generator = np.random.default_rng(0)
    center = generator.standard_normal(384)
    bank = (center + 1e-3 * generator.standard_normal((3000, 384))).astype(np.float32)
    queries = (center + 1e-3 * generator.standard_normal((40, 384))).astype(np.float32)
    check(queries, bank, 50)
    in_fp32 = torch.from_numpy(unit(queries)).float() @ torch.from_numpy(unit(bank)).float().T
    assert not np.array_equal(in_fp32.topk(50).indices, plain(queries, bank, 50)[0])


def test_orthogonal_rows_tie_although_their_sums_round() -> None:
    whole_XD = np.random.default_rng(0).integers(-2, 3, (1400, 154))
    found = nearest(whole_XD[:400], whole_XD[400:], 1000, CPU)
    products = torch.from_numpy(whole_XD[:400] @ whole_XD[400:].T).gather(1, found.indices)
    assert torch.equal(found.similarity == 0, products == 0)
    assert (found.indices.diff(dim=1)[(products[:, 1:] == 0) & (products[:, :-1] == 0)] > 0).all()


def test_bank_is_read_once_window_by_window(tmp_path: Path) -> None:
    rows = ActivationStore.open(write_store(tmp_path, 50, {"embedding": (8,)})).rows("embedding")
    queries, read = np.random.default_rng(1).standard_normal((5, 8), dtype=np.float32), []

    def images(self: Rows, first: int, last: int) -> np.ndarray:
        read.append((first, last))
        return np.asarray(self._array.read(first, last))

    with (
        mock.patch.object(Rows, "images", images),
        mock.patch.multiple(nearest_neighbours, _WINDOW=16),
        mock.patch.multiple(retrieval, _ENCODED=32),
    ):
        found = nearest(queries, rows, 7, CPU)
        assert read == [(0, 16), (16, 32), (32, 48), (48, 50)]
        del read[:]
        ours = retrieval.embedding_steering(rows, found, torch.ones(5, 7, dtype=torch.bool))
        assert read == [(0, 32), (32, 50)]
    bank = np.asarray(rows)
    assert np.array_equal(found.indices, plain(queries, bank, 7)[0])
    assert np.allclose(ours, bank[found.indices].astype(np.float32).mean(axis=1), atol=1e-6)


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
@pytest.mark.parametrize("name", ["bank", "queries"])
def test_row_without_a_direction_is_named(name: str, bad: float) -> None:
    arrays = {"queries": np.ones((40, 3), np.float32), "bank": np.ones((40, 3), np.float32)}
    arrays[name][33] = bad
    with (
        mock.patch.multiple(nearest_neighbours, _WINDOW=16),
        pytest.raises(SparsightError, match=f"row 33 of the {name} is"),
    ):
        nearest(arrays["queries"], arrays["bank"], 2, CPU)


def test_wrong_sizes_are_refused() -> None:
    for n in (0, 5):
        with pytest.raises(SparsightError, match=f"{n} neighbours out of a bank of 4 rows; ask for 1 to 4"):
            nearest(ONE, OTHER, n, CPU)
    with pytest.raises(SparsightError, match="queries of width 2, bank of width 3"):
        nearest(ONE, np.ones((4, 3)), 1, CPU)


def test_huge_and_tiny_rows_have_the_direction_that_they_have() -> None:
    found = nearest(1e-30 * ONE, 1e30 * OTHER, 4, CPU)
    assert found.indices.tolist() == [[1, 2, 0, 3]]
    assert found.similarity.tolist() == [pytest.approx([1, 0.8, 0.6, -1])]


def test_zero_of_either_sign_ties() -> None:
    bank = np.array([[-1e-30, 0.0, 1.0], [1e-30, 0.0, 1.0], [0.0, -1.0, 0.0]])
    check(np.array([[1e-30, 1.0, 0.0]]), bank, 3)  # similarities of -1e-60 and 1e-60, and -1


@given(labels=st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), min_size=1, max_size=8))
def test_majority_is_the_most_frequent_label_and_of_several_the_nearest_neighbours(labels: list[list[int]]) -> None:
    chosen = retrieval.positives(torch.tensor(labels))
    for row, ours in zip(labels, chosen, strict=True):
        most = Counter(row).most_common(1)[0][0]  # of equal counts the one met first
        assert ours.tolist() == [label == most for label in row]


def test_positives_by_the_label_of_the_query() -> None:
    labels = torch.tensor([[2, 1, 1], [2, 1, 1], [5, 5, 5]])
    assert retrieval.positives(labels, torch.tensor([2, 0, 5])).int().tolist() == [[1, 0, 0], [0, 0, 0], [1, 1, 1]]


@pytest.mark.parametrize(("query_label", "added"), [(7, [1.0, 1.5, 0.5]), (8, [-1.0, -1.5, -0.5])])
def test_vector_of_one_oracle_neighbour_is_the_one_computed_by_hand(query_label: int, added: list[float]) -> None:
    """The neighbour (5, 0.5, 1) has codes 4, 0, 2, so W_dec^T c = 4 (0.5, 0.5, 0) + 2 (0, 0.5, 0.5)."""
    sae = ss.sae.create("topk", 3, 3, 2)
    with torch.no_grad():
        sae.b_dec.copy_(torch.tensor([1.0, 0.0, 0.0]))
        sae.W_enc.copy_(torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 2.0]]))
        sae.W_dec.copy_(torch.tensor([[0.5, 0.5, 0.0], [9.0, 9.0, 9.0], [0.0, 0.5, 0.5]]))
    bank, embeddings = np.array([[3.0, 3.0, 3.0], [5.0, 0.5, 1.0]], np.float32), np.array([[1.0, -1.0], [1.0, 1.0]])
    found = nearest(np.array([[2.0, 1.0]]), embeddings, 1, CPU)
    true_labels, gamma = torch.tensor([8, 7]), 1.5
    of_query = retrieval.positives(true_labels[found.indices], torch.tensor([query_label]))
    assert ((gamma - 1) * retrieval.contrast(sae, bank, found, of_query)).tolist() == [added]


@pytest.mark.parametrize("kind", ["topk", "relu"])
def test_contrast_decodes_the_difference_of_mean_codes(kind: str) -> None:
    generator = np.random.default_rng(2)
    sae, bank = ss.sae.create(kind, 6, 20, 3), generator.standard_normal((70, 6)).astype(np.float16)
    sae.set_center(torch.full((6,), 0.3))
    indices = torch.from_numpy(np.stack([generator.choice(70, 9, replace=False) for _ in range(12)]))
    chosen = torch.from_numpy(generator.random((12, 9)) < 0.5)
    chosen[0], chosen[1] = True, False
    with mock.patch.multiple(retrieval, _ENCODED=32):
        ours = retrieval.contrast(sae, bank, Neighbours(indices, torch.ones(12, 9)), chosen)
    assert not ours.requires_grad
    codes = sae.encode(bank).dense().detach()
    for row, side, vector in zip(indices, chosen, ours, strict=True):
        empty = torch.zeros(20)
        means = [codes[row[of]].mean(dim=0) if of.any() else empty for of in (side, ~side)]
        assert torch.allclose(vector, (means[0] - means[1]) @ sae.W_dec, atol=1e-5)


@pytest.mark.parametrize("backend", kernels.BACKENDS)
def test_every_backend_gives_the_same(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(3)
    bank = np.concatenate([ONE.repeat(16, axis=0), generator.standard_normal((40, 2))])  # later windows add nothing
    monkeypatch.setattr(nearest_neighbours, "_WINDOW", 16)
    expected = nearest(ONE, bank, 4, CPU)
    monkeypatch.setenv("SPARSIGHT_KERNELS", backend)
    found = nearest(ONE, bank, 4, CPU)
    assert found.indices.tolist() == expected.indices.tolist() == [[0, 1, 2, 3]]
    assert retrieval.embedding_steering(bank, found, torch.ones(1, 4, dtype=torch.bool)).tolist() == [[3.0, 4.0]]


def test_neighbours_of_another_bank_are_refused() -> None:
    with pytest.raises(SparsightError, match="neighbour 4 in a bank of 4 rows"):
        retrieval.embedding_steering(OTHER, neighbours([[0, 4]]), torch.ones(1, 2, dtype=torch.bool))


def test_embedding_steering_by_hand() -> None:
    bank = np.array([[1.0, 0.0], [3.0, 2.0], [0.0, 8.0]], np.float32)
    found = neighbours([[0, 1, 2], [2, 0, 1], [1, 2, 0]])
    sides = torch.tensor([[True, True, False], [True, True, True], [False, False, False]])
    ours = retrieval.embedding_steering(bank, found, sides)
    assert ours.flatten().tolist() == pytest.approx([2, 1 - 8, 4 / 3, 10 / 3, -4 / 3, -10 / 3])


def test_weighted_retrieval_by_hand() -> None:
    bank, queries = np.array([[1.0, 0.0], [0.0, 4.0]], np.float32), torch.tensor([[8.0, 8.0], [8.0, 8.0], [8.0, 8.0]])
    found = neighbours([[0, 1], [1, 0], [0, 1]], [[0.75, 0.25], [0.5, -0.5], [0.0, -0.5]])
    only_retrieved, half = (retrieval.weighted_retrieval(queries, bank, found, a) for a in (0.0, 0.5))
    assert only_retrieved.tolist() == [[0.75, 1.0], [0.0, 4.0], [8.0, 8.0]]
    assert half.tolist() == [[4.375, 4.5], [4.0, 6.0], [8.0, 8.0]]
