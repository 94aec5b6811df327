"""Methods of interchange: what of the donor's activation replaces that of the base.

Shapes: R rows (of all edited tokens, image by image), D width (d_in), F features, S chosen features.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from sparsight.sae.metrics.baselines import Method


class Features(Protocol):
    """Features of which some can be taken from a donor."""

    @property
    def n_features(self) -> int:
        """F."""

    def difference(self, base_RD: Tensor, donor_RD: Tensor) -> Any:
        """The donor's features minus the base's."""

    def move(self, base_RD: Tensor, difference: Any, chosen_S: np.ndarray) -> Tensor:
        """The base's rows with the donor's values of the chosen features, (R, D)."""


@dataclass(frozen=True)
class Latents:
    """Latents of a dictionary: the rows move by the change of the reconstruction, so the base keeps its own error."""

    method: Method

    @property
    def n_features(self) -> int:
        """F."""
        return len(self.method.rows)

    def difference(self, base_RD: Tensor, donor_RD: Tensor) -> Any:
        """CSC (R, F)."""
        return (self.method.encode(donor_RD) - self.method.encode(base_RD)).tocsc()

    def move(self, base_RD: Tensor, difference: Any, chosen_S: np.ndarray) -> Tensor:
        values_RS = torch.from_numpy(difference[:, chosen_S].toarray())
        return base_RD + (values_RS @ torch.from_numpy(self.method.rows[chosen_S])).to(base_RD)


@dataclass(frozen=True)
class Coordinates:
    """Coordinates along orthonormal columns."""

    basis_DF: Tensor

    @property
    def n_features(self) -> int:
        """F."""
        return self.basis_DF.shape[1]

    def difference(self, base_RD: Tensor, donor_RD: Tensor) -> Any:
        """(R, F)."""
        return (donor_RD - base_RD) @ self.basis_DF

    def move(self, base_RD: Tensor, difference: Any, chosen_S: np.ndarray) -> Tensor:
        chosen = torch.from_numpy(chosen_S).to(base_RD.device)
        return base_RD + difference[:, chosen] @ self.basis_DF[:, chosen].T


def neurons(width: int, device: torch.device) -> Coordinates:
    """The dimensions of the activation themselves."""
    return Coordinates(torch.eye(width, device=device))


def principal(covariance_DD: np.ndarray, device: torch.device) -> Coordinates:
    """Principal components, largest variance first."""
    _, vectors = torch.linalg.eigh(torch.from_numpy(covariance_DD))
    return Coordinates(vectors.flip(1).float().to(device))
