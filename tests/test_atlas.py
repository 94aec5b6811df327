"""Where the atlas puts the latents of an SAE."""

import numpy as np
import pytest
import torch

from sparsight.report.latents.atlas import plane


@pytest.mark.parametrize(("n", "d_in"), [(40, 12), (5, 12), (40, 2), (7, 1)])
def test_the_atlas_is_the_plane_of_the_two_largest_principal_components(n: int, d_in: int) -> None:
    generator = torch.Generator().manual_seed(0)
    W_dec = torch.randn(n, d_in, generator=generator) * torch.rand(n, 1, generator=generator)
    found = plane(W_dec)
    rows = (W_dec / W_dec.norm(dim=1, keepdim=True)).double().numpy()
    U, S, _ = np.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)
    expected = np.pad((U * S)[:, :2], ((0, 0), (0, max(0, 2 - d_in))))
    assert found.share == pytest.approx((S[:2] ** 2).sum() / (S**2).sum(), abs=1e-6)
    distances = [np.linalg.norm(at[:, None] - at[None], axis=2) for at in (found.places_F2.astype(float), expected)]
    scale = distances[0].max() / distances[1].max()
    np.testing.assert_allclose(distances[0], scale * distances[1], atol=3)
    assert found.places_F2.max() == 65535 and (found.places_F2 == plane(W_dec.clone()).places_F2).all()
