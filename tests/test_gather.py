"""Images of latents and latents of images, against sorting dense codes of everything at once."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_backbone, write_store

from sparsight import sae
from sparsight.activations.store import ActivationStore
from sparsight.report.latents import gather
from sparsight.report.latents.classifiers import jacobian
from sparsight.report.latents.pack import shares, smallest
from sparsight.sae.base import SAE
from sparsight.sae.inputs import SaeInputs
from sparsight.sae.moments import by_group, fit_moments
from sparsight.sae.resae import ReSAE

CPU = torch.device("cpu")
N, F, SITES = 700, 12, ["blocks.0.input", "blocks.1.input"]


def of_patches(folder: Path, kind: str = "topk") -> tuple[SAE, SaeInputs, np.ndarray]:
    """An SAE on 2 x 2 patches, what it reads, and its codes, (N, P, F)."""
    store = ActivationStore.open(write_store(folder, N, {"blocks.0.input": (4, 6)}, "patches"))
    one, x = sae.create(kind, 6, F, 3), torch.from_numpy(store.rows("blocks.0.input")[:]).float()
    return one, SaeInputs(store, "blocks.0.input", CPU), one.encode(x).dense().detach().numpy().reshape(N, 4, F)


@pytest.mark.parametrize("tokens", ["cls", "all"])
@pytest.mark.parametrize("chained", [False, True])
def test_top_images_are_those_of_sorting_all_of_them(tmp_path: Path, tokens: str, chained: bool) -> None:
    shape = (6,) if tokens == "cls" else (5, 6)
    store = ActivationStore.open(write_store(tmp_path, N, dict.fromkeys(SITES, shape), tokens))
    one, x = sae.create("topk", 6, F, 3), torch.from_numpy(store.rows(SITES[1])[:]).float()
    chain = None
    if chained:
        moments = fit_moments(by_group(store, SITES, CPU), SITES)
        chain = ReSAE.fit({SITES[0]: sae.create("topk", 6, F, 3), SITES[1]: one}, moments)
        h = torch.from_numpy(store.rows(SITES[0])[:]).float()
        before, out = h.unflatten(0, (N, -1)), x.unflatten(0, (N, -1))
        for group, at in store.token_groups(SITES[0]).items():
            A, c = chain.maps[group][0]
            out[:, at] = out[:, at] - before[:, at] @ A.float().T - c.float()
        x = out.flatten(0, 1)
    per_image = one.encode(x).dense().detach().numpy().reshape(N, -1, F).max(axis=1)
    shown = gather.images_of_latents(one, SaeInputs(store, SITES[1], CPU, chain), N, 9, per_image.max(axis=0), 0)
    for latent in range(F):
        found = per_image[shown.top[latent], latent]
        np.testing.assert_allclose(shown.top_values[latent], found, atol=1e-5)
        np.testing.assert_allclose(found, np.sort(per_image[:, latent])[::-1][:9], atol=1e-5)
        expected = sorted(range(N), key=lambda i, latent=latent: (-per_image[i, latent], i))[:9]  # type: ignore[misc]
        assert chained or shown.top[latent].tolist() == expected


def test_samples_are_of_their_interval_and_the_same_in_windows_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, seen, codes = of_patches(tmp_path)
    per_image = codes.max(axis=1)
    largest = per_image.max(axis=0)
    whole = gather.images_of_latents(one, seen, N, 4, largest, 0)
    samples = whole.samples.reshape(F, gather.INTERVALS, gather.SAMPLES)
    for latent in range(F):
        for i in range(gather.INTERVALS):
            low, high = ((gather.INTERVALS - i - step) / gather.INTERVALS for step in (1, 0))
            shares_N = per_image[:, latent] / largest[latent]
            inside = np.flatnonzero((shares_N > 0) & (shares_N >= low) & ((shares_N < high) | (i == 0)))
            drawn = samples[latent, i][samples[latent, i] >= 0]
            assert whole.counts[latent, i] == len(inside) and len(drawn) == min(gather.SAMPLES, len(inside))
            assert set(drawn) <= set(inside)
    assert samples[samples >= 0].min() < 0.1 * N and samples.max() > 0.9 * N, "drawn from everywhere"
    monkeypatch.setattr(gather, "_ENTRIES", 17 * 4 * F)
    monkeypatch.setattr(gather, "_PENDING", 100)
    small = gather.images_of_latents(one, seen, N, 4, largest, 0)
    for name in ("top", "top_values", "samples", "sample_values", "counts"):
        np.testing.assert_array_equal(getattr(small, name), getattr(whole, name))


@pytest.mark.parametrize("entries", [2**25, 17 * 4 * F])
@pytest.mark.parametrize("kind", ["topk", "relu"])
def test_heats_strengths_and_patches_are_the_codes(
    kind: str, entries: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, seen, codes = of_patches(tmp_path, kind)
    monkeypatch.setattr(gather, "_ENTRIES", entries)
    largest, chosen = codes.max(axis=(0, 1)), np.array([3, 4, 5, 90, 400, 699])
    shown = gather.images_of_latents(one, seen, N, 4, largest, 0)
    found = gather.details(one, seen, shown, largest, chosen)
    assert found.top_heats is not None and found.sample_heats is not None and found.patches is not None
    for images, heats in ((shown.top, found.top_heats), (shown.samples, found.sample_heats)):
        for latent, place in np.argwhere(images >= 0):
            expected = shares(codes[images[latent, place], :, latent], largest[latent], np.uint8)
            np.testing.assert_allclose(heats[latent, place].astype(int), expected, atol=1)
    per_image = codes.max(axis=1)
    for i, image in enumerate(chosen):
        strongest = np.sort(per_image[image])[::-1]
        np.testing.assert_allclose(found.strengths[1][i, :F], strongest, atol=1e-5)
        for patch in range(4):
            numbers, values = found.patches[0][i, patch], found.patches[1][i, patch]
            np.testing.assert_allclose(values, np.sort(codes[image, patch])[::-1][: gather.PER_PATCH], atol=1e-5)
            np.testing.assert_allclose(values[numbers >= 0], codes[image, patch, numbers[numbers >= 0]], atol=1e-5)


def test_quantised_activations_keep_their_order_and_what_is_above_zero_stays_above() -> None:
    values = np.array([[0, 1e-9, 0.5, 1], [0, 2, 4, 4.0001]], np.float32)
    assert shares(values, np.array([[1.0], [4.0]]), np.uint8).tolist() == [[0, 1, 128, 255], [0, 128, 255, 255]]
    assert shares(np.zeros(2), np.zeros(2), np.uint16).tolist() == [0, 0], "of a latent that never fires"
    assert smallest(np.array([-1, 0, 7]), 8).tolist() == [65535, 0, 7]
    assert smallest(np.array([-1, 70_000]), 80_000).dtype == np.uint32


@pytest.mark.parametrize("site", ["blocks.2.output", "embedding"])
def test_the_direct_effect_is_the_slope_of_the_class_logits(site: str, tmp_path: Path) -> None:
    backbone = make_backbone()
    store = ActivationStore.open(write_store(tmp_path, 50, {site: (48,)}))
    mean = torch.from_numpy(store.rows(site)[:]).float().mean(dim=0).double()
    steps = torch.nn.functional.normalize(
        torch.randn(5, 48, generator=torch.Generator().manual_seed(0)), dim=1
    ).double()
    whole = backbone.double()

    def logits(x: torch.Tensor) -> torch.Tensor:
        return whole.classify(x[:, None]) if site != "embedding" else whole.classify_embedding(x)

    slope = (logits(mean + 1e-5 * steps) - logits(mean - 1e-5 * steps)) / 2e-5
    found = jacobian(make_backbone(), store, site)
    assert found is not None
    torch.testing.assert_close(steps.float() @ found.T, slope.float(), rtol=1e-3, atol=1e-4)
    assert jacobian(make_backbone(global_pool="avg"), store, "blocks.2.output") is None or site != "blocks.2.output"
