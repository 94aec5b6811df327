"""Absorption against a plain reference, and a case that is built to absorb."""

import numpy as np
import pytest
from scipy import sparse

from sparsight.common.intervals import wilson
from sparsight.sae.metrics.absorption import Absorption, main_latents
from sparsight.sae.metrics.baselines import Method
from sparsight.sae.metrics.firing import ByClass
from sparsight.sae.metrics.probing import SparseProbe

D, F, C = 6, 9, 3


def dictionary(rows: np.ndarray, offset: np.ndarray) -> Method:
    return Method("made up", lambda x: sparse.csr_array(x.numpy()), rows, offset, 0, 0)


def sums(z: np.ndarray, values: np.ndarray, n_values: int = C) -> ByClass:
    found = ByClass(z.shape[1], n_values)
    found.update(sparse.csr_array(z), values)
    return found


def main_by_hand(z: np.ndarray, values: np.ndarray, value: int) -> int:
    """The latent of the largest (mean on the value - mean) / deviation, if that is positive for any."""
    known = z[values >= 0]
    best, score = -1, 0.0
    for latent in range(z.shape[1]):
        deviation = known[:, latent].std()
        if deviation and (values == value).any():
            found = (z[values == value, latent].mean() - known[:, latent].mean()) / deviation
            if found > score:
                best, score = latent, found
    return best


def by_hand(method: Method, main: list[int], probe: SparseProbe, z: np.ndarray, x: np.ndarray, values: np.ndarray,
            value: int) -> tuple[int, int, int]:  # fmt: skip
    n = silent = absorbed = 0
    direction = probe.W[:, value] / np.linalg.norm(probe.W[:, value])
    for image in range(len(x)):
        scores = x[image] @ probe.W + probe.b
        if values[image] != value or scores.argmax() != value:
            continue
        n += 1
        if main[value] >= 0 and z[image, main[value]] > 0:
            continue
        silent += 1
        projections = [0.0]
        for latent in range(z.shape[1]):
            row = method.rows[latent].astype(float)
            if np.linalg.norm(row) and row @ direction / np.linalg.norm(row) >= 0.025:
                projections.append(z[image, latent] * (row @ direction))
        whole = (x[image] - method.offset) @ direction
        absorbed += max(projections) > 0 and whole > 0 and max(projections) >= 0.4 * whole
    return n, silent, absorbed


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("fires", [0.0, 0.3, 1.0])
def test_counts_are_those_of_a_loop_over_images(seed: int, fires: float) -> None:
    generator = np.random.default_rng(seed)
    n = 200
    values = generator.integers(-1, C, n)
    z = (generator.random((n, F)) * (generator.random((n, F)) < fires)).astype(np.float32)
    z[:, 0] = 0  # a dead latent
    x, rows = generator.standard_normal((n, D)), generator.standard_normal((F, D)).astype(np.float32)
    rows[1] = 0
    method = dictionary(rows, generator.standard_normal(D).astype(np.float32))
    probe = SparseProbe("linear", D, generator.standard_normal((D, C)), generator.standard_normal(C))
    train = sums(z, values)
    main = [main_by_hand(z, values, value) for value in range(C)]
    assert main_latents(train).tolist() == main
    found = Absorption(method, train, probe)
    for window in (slice(0, 70), slice(70, n)):
        found.update(sparse.csr_array(z[window]), x[window], values[window])
    expected = [by_hand(method, main, probe, z, x, values, value) for value in range(C)]
    rows_of = {row["value"]: (row["n"], row["silent"], row["absorbed"]) for row in found.rows()}
    assert rows_of == {value: counts for value, counts in enumerate(expected) if counts[0]}
    total = found.total()
    assert (total["n"], total["silent"], total["absorbed"]) == tuple(np.sum(expected, axis=0))
    interval = wilson(np.arange(total["n"]) < total["absorbed"])
    assert (total["rate"], total["lo"], total["hi"]) == (interval["accuracy"], interval["lo"], interval["hi"])


def test_a_special_latent_that_fires_in_place_of_the_general_one_absorbs_it() -> None:
    """Each fifth image of value 0 has latent 1 in place of latent 0; it points along the value and a detail."""
    n = 100
    values = np.arange(n) % 2
    special = (values == 0) & (np.arange(n) % 10 == 0)
    rows = np.eye(3, dtype=np.float32)
    rows[1] = [0.8, 0, 0.6]
    z = np.zeros((n, 3), np.float32)
    z[(values == 0) & ~special, 0] = 1
    z[special, 1] = 1
    probe = SparseProbe("linear", 3, np.array([[1.0, -1], [0, 0], [0, 0]]), np.array([0.0, 0.5]))
    found = Absorption(dictionary(rows, np.zeros(3, np.float32)), sums(z, values, 2), probe)
    found.update(sparse.csr_array(z), (z @ rows).astype(np.float64), values)
    (first,) = [row for row in found.rows() if row["value"] == 0]
    assert (first["latent"], first["n"], first["silent"], first["absorbed"]) == (0, 50, 10, 10)


def test_without_images_there_is_no_rate() -> None:
    probe = SparseProbe("linear", 2, np.ones((2, C)), np.zeros(C))
    train = sums(np.zeros((3, 2), np.float32), np.array([0, 1, 2]))
    found = Absorption(dictionary(np.eye(2, dtype=np.float32), np.zeros(2, np.float32)), train, probe)
    found.update(sparse.csr_array((4, 2), dtype=np.float32), np.ones((4, 2)), np.full(4, -1))
    assert (found.rows(), found.total(), found.main.tolist()) == ([], {}, [-1, -1, -1])
