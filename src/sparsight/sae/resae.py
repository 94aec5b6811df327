"""ReSAE (Poduval et al. 2026, arXiv 2605.27819): affine maps between layers, and SAEs on their residuals.

The sites l_0, ..., l_M are in the order of the model. For each consecutive pair, r_{m+1} = h_{m+1} - A_m h_m - c_m.
The first SAE is trained on h_0, each later one on r. No public code exists: the ridge value, the kind of SAE and the
two ways of putting reconstructions back are our reading (docs/sae.md).

Shapes: N rows, D width (d_in), M pairs of sites, G token groups (class token, patches).
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparsight.common.errors import SparsightError
from sparsight.sae.base import SAE, load
from sparsight.sae.moments import Activations, Affine, Moments

Fit = Literal["full", "diagonal", "identity", "zero"]
Maps = dict[str, list[Affine]]


def affine(moments: Moments, a: str, b: str, fit: Fit = "full", ridge: float = 1e-3) -> Affine:
    """A (D, D) and c (D,) of h_b ~ h_a A^T + c by ridge regression, float64.

    Args:
        moments: moments of both sites, which must be consecutive.
        a: the earlier site.
        b: the later site.
        fit: ``full``, or a control: ``diagonal``, ``identity`` (A = I, c the difference of the means), ``zero``
            (A = 0 and c = 0, the plain SAE).
        ridge: weight of ||A||^2, relative to the mean eigenvalue of the covariance of a.
    """
    S_aa, mean_a, mean_b = moments.covariance(a, a)[0], *moments.covariance(a, b)[1:]
    S_ab = moments.covariance(a, b)[0]
    eye = torch.eye(len(S_aa), dtype=S_aa.dtype, device=S_aa.device)
    if fit == "zero":
        return torch.zeros_like(eye), torch.zeros_like(mean_b)
    weight = ridge * S_aa.diagonal().mean()
    if fit == "full":
        A = torch.linalg.solve(S_aa + weight * eye, S_ab).T
    elif fit == "diagonal":
        A = torch.diag(S_ab.diagonal() / (S_aa.diagonal() + weight))
    else:
        A = eye
    return A, mean_b - A @ mean_a


def fit_maps(sites: Sequence[str], moments: Mapping[str, Moments], fit: Fit = "full", ridge: float = 1e-3) -> Maps:
    """:func:`affine` of every token group and pair of consecutive sites.

    Raises:
        SparsightError: an unknown fit, or moments without rows.
    """
    if fit not in get_args(Fit):
        raise SparsightError(f"ReSAE: there is no fit {fit!r}; known: {', '.join(get_args(Fit))}")
    pairs = list(itertools.pairwise(sites))
    return {group: [affine(m, a, b, fit, ridge) for a, b in pairs] for group, m in moments.items()}


@dataclasses.dataclass
class ReSAE:
    """A chain of SAEs of one width, one per site, on the residuals of affine maps.

    In the methods, ``group`` selects the maps of a token group. All groups share the SAEs.
    """

    sites: list[str]
    saes: dict[str, SAE]
    maps: Maps
    """By token group, A (D, D) and c (D,) for each pair of consecutive sites, float64."""

    @classmethod
    def fit(
        cls, saes: Mapping[str, SAE], moments: Mapping[str, Moments], fit: Fit = "full", ridge: float = 1e-3
    ) -> "ReSAE":
        """Fit the maps. The SAEs must be trained on :meth:`residuals` afterwards.

        Args:
            saes: SAEs by site, in the order of the model.
            moments: moments by token group, e.g. ``{"cls": ..., "patches": ...}``.
            fit: see :func:`affine`.
            ridge: see :func:`affine`.

        Raises:
            SparsightError: fewer than two sites, different widths, an unknown fit, or moments without rows.
        """
        sites = list(saes)
        if len(sites) < 2 or len({sae.d_in for sae in saes.values()}) != 1:
            raise SparsightError(f"ReSAE: needs two or more sites of one width, got {', '.join(sites) or 'none'}")
        return cls(sites, dict(saes), fit_maps(sites, moments, fit, ridge))

    def statistics(self, moments: Mapping[str, Moments]) -> dict[str, tuple[Tensor, float]]:
        """Mean (D,) of each SAE's inputs, and the standard deviation around it over all dimensions, by site, float64.

        Raises:
            SparsightError: the residual at a site does not vary.
        """
        total, out = sum(sums.seen for sums in moments.values()), {}
        for m, site in enumerate(self.sites):
            parts = []
            for group, sums in moments.items():
                before = (self.sites[m - 1], self.maps[group][m - 1]) if m else ()
                of_site = sums.spread(site)[1]
                parts.append([sums.seen / total * value for value in (*sums.spread(site, *before), of_site)])
            mean, square, whole = (torch.stack(values).sum(dim=0) for values in zip(*parts, strict=True))
            variance = float(square - mean.square().sum()) / len(mean)
            # The variance is a difference of sums of this size, so less is rounding error.
            if not variance > 1e-10 * float(whole) / len(mean):
                raise SparsightError(f"ReSAE: nothing is left to learn at site {site!r}: its residual does not vary")
            out[site] = mean, variance**0.5
        return out

    def carry(self, m: int, h: Tensor, group: str) -> Tensor:
        """A_m h + c_m of rows (N, D): the prediction of site m + 1 from site m."""
        A, c = (t.to(h) for t in self.maps[group][m])
        return torch.addmm(c, h, A.T)

    def residuals(self, rows: Activations, group: str) -> dict[str, Tensor]:
        """Inputs of every SAE for clean activations (N, D), by site."""
        out = {self.sites[0]: rows[self.sites[0]]}
        for m, (a, b) in enumerate(itertools.pairwise(self.sites)):
            out[b] = rows[b] - self.carry(m, rows[a], group)
        return out

    def reconstruct(self, rows: Activations, group: str, chained: bool = True) -> dict[str, Tensor]:
        """Teacher-forced reconstructions (N, D) by site: every SAE encodes the clean residual.

        Args:
            rows: clean activations of every site.
            group: token group of the rows.
            chained: apply the map to the reconstruction of the previous site, h~_{m+1} = A_m h~_m + c_m + r~_{m+1}, so
                that errors add up as e_{m+1} = A_m e_m + e(r_{m+1}); otherwise apply it to the clean activation.
        """
        clean = self.residuals(rows, group)
        out = {self.sites[0]: self.saes[self.sites[0]](clean[self.sites[0]])}
        for m, (a, b) in enumerate(itertools.pairwise(self.sites)):
            out[b] = self.carry(m, (out if chained else rows)[a], group) + self.saes[b](clean[b])
        return out

    def replace(self, m: int, h: Tensor, before: Tensor | None, group: str) -> Tensor:
        """Online mode: the replacement for the activation h (N, D) that arrives at site m.

        ``before`` is the replacement at site m - 1 in the same forward pass, None at the first site. The affine part
        cancels: replace(h) - h is the residual SAE's own error.
        """
        sae = self.saes[self.sites[m]]
        if m == 0:
            return sae(h)
        assert before is not None
        carried = self.carry(m - 1, before, group)
        return carried + sae(h - carried)

    def to(self, device: torch.device) -> "ReSAE":
        """The chain with its SAEs and maps on a device."""
        maps = {group: [(A.to(device), c.to(device)) for A, c in pairs] for group, pairs in self.maps.items()}
        return ReSAE(self.sites, {site: sae.to(device) for site, sae in self.saes.items()}, maps)

    def save(self, folder: str | Path, **about: Any) -> None:
        """Write ``<site>/`` for every SAE and ``affine.safetensors`` (A.<group>.<m>, c.<group>.<m>).

        Of a chain whose SAEs lie in several processes, each writes its own, and that of the first site the maps.
        """
        folder = Path(folder)
        for m, site in enumerate(self.sites):
            if site in self.saes:
                self.saes[site].save(folder / site, **{**about, "site": site, "position": m, "chain": self.sites})
        if self.sites[0] not in self.saes:
            return
        arrays = {
            f"{name}.{group}.{m}": tensor.contiguous()
            for group, maps in self.maps.items()
            for m, pair in enumerate(maps)
            for name, tensor in zip("Ac", pair, strict=True)
        }
        save_file(arrays, folder / "affine.safetensors")


def load_chain(folder: str | Path) -> ReSAE:
    """The chain that :meth:`ReSAE.save` wrote.

    Raises:
        SparsightError: no chain in the folder.
    """
    folder = Path(folder)
    if not (folder / "affine.safetensors").is_file():
        raise SparsightError(f"{folder}: no ReSAE chain here (affine.safetensors is missing)")
    arrays = load_file(folder / "affine.safetensors")
    first = next(folder.glob("*/config.json"), None)
    if first is None:
        raise SparsightError(f"{folder}: a ReSAE chain without SAEs; make it again")
    sites = load(first.parent).about["chain"]
    groups = sorted({key.split(".")[1] for key in arrays})
    maps = {g: [(arrays[f"A.{g}.{m}"], arrays[f"c.{g}.{m}"]) for m in range(len(sites) - 1)] for g in groups}
    return ReSAE(sites, {site: load(folder / site) for site in sites}, maps)
