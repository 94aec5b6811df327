"""What every SAE variant shares: parameters, codes, loss, the registry, saving and loading.

Shapes: B batch, D width (d_in), F latents (d_sae), K active latents (k).
"""

import dataclasses
import importlib
import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sparsight.errors import SparsightError
from sparsight.sae import names
from sparsight.work import write_json

FORMAT_VERSION = 1
_REGISTRY: dict[str, type["SAE"]] = {}


@dataclasses.dataclass(frozen=True)
class Codes:
    """The active latents of a batch."""

    values: Tensor
    """(B, K), not negative."""
    indices: Tensor
    """(B, K) int64, which latents."""
    d_sae: int
    """F."""

    def dense(self) -> Tensor:
        """(B, F), zero where a latent is not active."""
        return self.values.new_zeros(len(self.values), self.d_sae).scatter(1, self.indices, self.values)

    def l0(self) -> Tensor:
        """Latents above zero per activation, (B,)."""
        return (self.values > 0).sum(dim=1)


@dataclasses.dataclass(frozen=True)
class Loss:
    """What :meth:`SAE.loss` returns; the scalars carry gradients."""

    total: Tensor
    reconstruction: Tensor
    aux: Tensor
    x_hat: Tensor
    codes: Codes


class SAE(nn.Module, ABC):
    """A sparse autoencoder x_hat = decode(encode(x)).

    Args:
        d_in: D.
        d_sae: F.
        k: K.
        seed: of the initial weights: decoder rows uniform on the unit sphere, encoder its transpose.
        aux_k: dead latents that the AuxK loss uses; None takes d_in / 2 (Gao et al. 2024, section A.2).
        aux_coefficient: weight of the AuxK loss.

    Raises:
        SparsightError: sizes that do not fit together.
    """

    kind: str

    def __init__(
        self, d_in: int, d_sae: int, k: int, seed: int = 0, aux_k: int | None = None, aux_coefficient: float = 1 / 32
    ) -> None:
        super().__init__()
        if min(d_in, d_sae, k) < 1 or k > d_sae:
            raise SparsightError(f"SAE: d_in = {d_in}, d_sae = {d_sae}, k = {k}; needs 1 <= k <= d_sae and d_in >= 1")
        self.d_in, self.d_sae, self.k = d_in, d_sae, k
        self.aux_k = min(d_in // 2 if aux_k is None else aux_k, d_sae)
        self.aux_coefficient = aux_coefficient
        rows = torch.randn(d_sae, d_in, generator=torch.Generator().manual_seed(seed))
        self.W_dec = nn.Parameter(rows / rows.norm(dim=1, keepdim=True))
        self.W_enc = nn.Parameter(self.W_dec.detach().T.contiguous())
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        self.loss_scale = 1.0
        """Normaliser of the reconstruction loss; training sets 1 / E||x - mean||^2 once, at its start."""
        self.about: dict[str, Any] = {}
        """What config.json says of a loaded SAE: site, tokens, backbone and more."""
        self.register_buffer("dead", torch.zeros(d_sae, dtype=torch.bool), persistent=False)
        self.dead: Tensor

    @abstractmethod
    def preactivations(self, x: Tensor) -> Tensor:
        """(B, F), what the activation function is applied to."""

    @abstractmethod
    def activate(self, pre: Tensor) -> Codes:
        """Codes from pre-activations (B, F)."""

    def encode(self, x: Tensor | np.ndarray) -> Codes:
        """Codes of activations (B, D), in the units of the stored activations."""
        return self.activate(self.preactivations(self._input(x)))

    def decode(self, codes: Codes) -> Tensor:
        """Reconstruction (B, D), in the units of x."""
        return codes.dense() @ self.W_dec + self.b_dec

    def forward(self, x: Tensor | np.ndarray) -> Tensor:
        """decode(encode(x)), (B, D)."""
        return self.decode(self.encode(x))

    def loss(self, x: Tensor | np.ndarray) -> Loss:
        """Reconstruction and AuxK losses.

        ``reconstruction`` is the batch mean of the squared error summed over D, times ``loss_scale``.
        """
        x = self._input(x)
        pre = self.preactivations(x)
        codes = self.activate(pre)
        x_hat = self.decode(codes)
        reconstruction = (x - x_hat).square().sum(dim=1).mean() * self.loss_scale
        aux = self._auxk(pre, (x - x_hat).detach())
        return Loss(reconstruction + self.aux_coefficient * aux, reconstruction, aux, x_hat, codes)

    def _auxk(self, pre: Tensor, residual: Tensor) -> Tensor:
        """AuxK (Gao et al. 2024): dead latents model the detached residual, error relative to its variance."""
        n_dead = int(self.dead.sum())
        if not min(n_dead, self.aux_k):
            return pre.new_zeros(())
        values, indices = pre.masked_fill(~self.dead, -torch.inf).topk(min(self.aux_k, n_dead), dim=1)
        codes = Codes(values.relu(), indices, self.d_sae)
        error = (codes.dense() @ self.W_dec - residual).square().sum(dim=1).mean()
        variance = (residual - residual.mean(dim=0)).square().sum(dim=1).mean()
        return torch.nan_to_num(error / variance)

    def _input(self, x: Tensor | np.ndarray) -> Tensor:
        tensor = torch.as_tensor(x, dtype=self.W_enc.dtype, device=self.W_enc.device)
        if tensor.ndim != 2 or tensor.shape[1] != self.d_in:
            raise SparsightError(f"SAE: expected activations of shape (batch, {self.d_in}), got {tuple(tensor.shape)}")
        return tensor

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Give every decoder row unit norm."""
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True))

    @torch.no_grad()
    def remove_parallel_gradient(self) -> None:
        """Remove from W_dec's gradient what would only change the length of its unit rows."""
        assert self.W_dec.grad is not None
        self.W_dec.grad -= (self.W_dec.grad * self.W_dec).sum(dim=1, keepdim=True) * self.W_dec

    @torch.no_grad()
    def fold_scale(self, scale: float) -> None:
        """Turn an SAE of x / ``scale`` into the equivalent SAE of x; codes and output grow by ``scale``."""
        self.b_enc.mul_(scale)
        self.b_dec.mul_(scale)

    def save(self, folder: str | Path, **about: Any) -> None:
        """Write ``sae.safetensors`` and ``config.json``; ``about`` adds keys to the latter."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in self.state_dict().items()}, folder / "sae.safetensors")
        sizes = {"kind": self.kind, "d_in": self.d_in, "d_sae": self.d_sae, "k": self.k}
        training = {"aux_k": self.aux_k, "aux_coefficient": self.aux_coefficient}
        config = {**about, "format_version": FORMAT_VERSION, **sizes, **training}
        write_json(folder / "config.json", config)


def variant(cls: type[SAE]) -> type[SAE]:
    """Register an SAE class under the name of its file."""
    cls.kind = cls.__module__.rpartition(".")[2]
    assert cls.kind not in _REGISTRY, f"two SAE variants are called {cls.kind}"
    _REGISTRY[cls.kind] = cls
    return cls


def create(kind: str, d_in: int, d_sae: int, k: int, seed: int = 0, **options: Any) -> SAE:
    """A new SAE of a registered variant; see :class:`SAE` for the arguments.

    Raises:
        SparsightError: no such variant, or sizes that do not fit together.
    """
    if kind not in names():
        raise SparsightError(f"there is no SAE {kind!r}; known: {', '.join(names())}")
    importlib.import_module(f"sparsight.sae.{kind}")
    return _REGISTRY[kind](d_in, d_sae, k, seed, **options)


def load(folder: str | Path) -> SAE:
    """The SAE that :meth:`SAE.save` wrote.

    Raises:
        SparsightError: no SAE there, or one of another format.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text())
    except OSError as error:
        raise SparsightError(f"{folder}: no SAE here ({error.strerror}: config.json)") from None
    if config.get("format_version") != FORMAT_VERSION:
        raise SparsightError(f"{folder}: format_version {config.get('format_version')}, expected {FORMAT_VERSION}")
    sae = create(config["kind"], **{key: config[key] for key in ("d_in", "d_sae", "k", "aux_k", "aux_coefficient")})
    sae.load_state_dict(load_file(folder / "sae.safetensors"))
    sae.about = config
    return sae
