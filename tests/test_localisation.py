"""Average precision, purity and Moran's I of sparse codes against brute force."""

import time

import numpy as np
import pytest
from scipy import sparse
from sklearn.metrics import average_precision_score

from sparsight.bench.localisation.moran import moran
from sparsight.bench.localisation.ranking import Ranking

REGIONS = (1, 2, 3)


def codes(seed: int, patches: int, features: int, density: float, ties: bool) -> np.ndarray:
    """Values of features, most of them zero; with ties there are few different values."""
    generator = np.random.default_rng(seed)
    values = generator.integers(1, 4, (patches, features)) if ties else generator.exponential(size=(patches, features))
    z = np.where(generator.random((patches, features)) < density, values, 0).astype(np.float32)
    z[:, 0] = 0  # a feature that never fires
    z[:, 1] = 1  # and one that says nothing
    return z


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("density", [0.02, 0.3, 0.95])
def test_average_precision_is_scikit_learns(density: float, ties: bool) -> None:
    z = codes(0, 300, 12, density, ties)
    regions = np.random.default_rng(1).integers(0, 4, 300)
    ranking = Ranking.of(sparse.csr_array(z), regions)
    for region in REGIONS:
        expected = [average_precision_score(regions == region, column) for column in z.T]
        np.testing.assert_allclose(ranking.average_precision(region), expected, rtol=1e-12)


def purity(column: np.ndarray, hit: np.ndarray, k: int) -> float:
    """Mean over the orders of equal values of the share of hits among the first k."""
    found, left = 0.0, k
    for value in np.unique(column)[::-1]:
        here = column == value
        taken = min(left, here.sum())
        found += taken * hit[here].mean()
        left -= taken
    return found / k


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("k", [1, 20, 100, 300])
def test_purity_is_the_share_among_the_first_with_ties_shared(k: int, ties: bool) -> None:
    z = codes(2, 300, 12, 0.2, ties)
    regions = np.random.default_rng(3).integers(0, 4, 300)
    ranking = Ranking.of(sparse.csr_array(z), regions)
    for region in REGIONS:
        expected = [purity(column, regions == region, k) for column in z.T]
        np.testing.assert_allclose(ranking.purity(region, k), expected, rtol=1e-12)
    assert Ranking.of(sparse.csr_array(z), regions).purity(1, 1000) == pytest.approx(np.mean(regions == 1))


def moran_of(image: np.ndarray) -> float | None:
    """Moran's I of a map by its definition; None if the map is not valid."""
    active = (image > 0).sum()
    if active < 5 or active > 0.9 * image.size or np.ptp(image) == 0:
        return None
    x = image - image.mean()
    places = list(np.ndindex(image.shape))
    pairs = [(a, b) for a in places for b in places if a != b and max(abs(a[0] - b[0]), abs(a[1] - b[1])) == 1]
    return float(image.size / len(pairs) * sum(x[a] * x[b] for a, b in pairs) / (x**2).sum())


@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (6, 2)])
@pytest.mark.parametrize("density", [0.3, 0.85])
def test_morans_i_is_its_definition(grid: tuple[int, int], density: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsight.bench.localisation.moran._ENTRIES", 80)  # several windows, and one that is short
    patches = grid[0] * grid[1]
    z = codes(4, 30 * patches, 9, density, ties=False)
    found = moran(sparse.csr_array(z), grid)
    for feature, column in enumerate(z.T):
        values = [value for image in column.reshape(-1, *grid) if (value := moran_of(image.astype(float))) is not None]
        assert found.maps[feature] == len(values)
        assert found.total[feature] == pytest.approx(sum(values), abs=1e-9)
    assert found.maps[0] == found.maps[1] == 0 and np.isnan(found.mean[:2]).all()
    assert (found.maps[2:] > 5).all()


def test_a_blob_has_a_high_morans_i_and_noise_the_one_of_chance() -> None:
    y, x = np.mgrid[:8, :8]
    blob = ((y - 3) ** 2 + (x - 4) ** 2 <= 6).astype(np.float32).ravel()
    generator = np.random.default_rng(0)
    noise = np.concatenate([generator.permutation(blob) for _ in range(400)])
    found = moran(sparse.csr_array(np.stack([np.tile(blob, 400), noise], axis=1)), (8, 8))
    assert found.mean[0] > 0.5
    assert found.mean[1] == pytest.approx(-1 / 63, abs=0.015), "the mean over permutations"


@pytest.mark.slow
def test_eight_thousand_latents_take_seconds() -> None:
    generator = np.random.default_rng(0)
    patches, features, active = 60_000, 8192, 64
    indices = generator.integers(0, features, (patches, active))
    rows = np.repeat(np.arange(patches), active)
    z = sparse.csr_array((generator.exponential(size=rows.size), (rows, indices.ravel())), shape=(patches, features))
    regions = generator.integers(0, 21, patches)
    start = time.monotonic()
    ranking = Ranking.of(z, regions)
    for region in range(1, 21):
        ranking.average_precision(region)
        ranking.purity(region, 100)
    moran(z[: 306 * 196], (14, 14))
    assert time.monotonic() - start < 60
