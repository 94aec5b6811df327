"""What every SAE variant shares: parameters, losses, the registry, saving and loading.

Shapes: B batch, D width (d_in), F latents (d_sae), K active latents (k).
"""

import dataclasses
import importlib
import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sparsight import kernels
from sparsight.common.errors import SparsightError
from sparsight.common.files import write_json
from sparsight.sae import names
from sparsight.sae.codes import Codes

FORMAT_VERSION = 1
_ROWS = 256  # of the decoder at a time: what is worked on stays in the cache
_REGISTRY: dict[str, type["SAE"]] = {}


@dataclasses.dataclass(frozen=True)
class Loss:
    """What :meth:`SAE.loss` returns; the scalars carry gradients.

    total = reconstruction + aux_coefficient * aux + penalty
    """

    total: Tensor
    reconstruction: Tensor
    aux: Tensor
    penalty: Tensor
    """The variant's own term, weighted: sparsity, prefixes, load balance."""
    x_hat: Tensor
    codes: Codes


class SAE(nn.Module, ABC):
    """A sparse autoencoder x_hat = decode(encode(x)).

    A variant defines :meth:`encode` and, where training differs from inference or needs a term of its own,
    :meth:`training_codes`.

    Args:
        d_in: D.
        d_sae: F.
        k: K; the number (or for variants without a fixed one the target) of active latents.
        seed: of the initial weights: decoder rows uniform on the unit sphere, encoder its transpose.
        aux_k: dead latents that the AuxK loss uses; None takes d_in / 2 (Gao et al. 2024, section A.2).
        aux_coefficient: weight of the AuxK loss.

    Raises:
        SparsightError: sizes that do not fit together.
    """

    kind: str
    options: ClassVar[tuple[str, ...]] = ("aux_k", "aux_coefficient")
    """Arguments beside the sizes and the seed; attributes of the same name go to config.json."""
    has_auxk: ClassVar[bool] = True
    """Whether the variant's loss has the AuxK term."""
    scaled: ClassVar[tuple[str, ...]] = ("b_enc", "b_dec")
    """Parameters and buffers in the units of x."""

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
        # A transposed view of (F, D) memory: the gradient of a latent is one contiguous row.
        self.W_enc = nn.Parameter(self.W_dec.detach().clone().T)
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        self.loss_scale = 1.0
        """Normaliser of the reconstruction loss, 1 / E||x - mean||^2 from the start of training on."""
        self.started = False
        """Whether :meth:`start` was called."""
        self.about: dict[str, Any] = {}
        """What config.json says of a loaded SAE: site, tokens, backbone and more."""
        self.register_buffer("dead", torch.zeros(d_sae, dtype=torch.bool), persistent=False)
        self.dead: Tensor

    @property
    def macs_encode(self) -> int:
        """Multiply-accumulates of encoding an activation: its product with the encoder."""
        return self.d_in * self.d_sae

    @abstractmethod
    def encode(self, x: Tensor | np.ndarray) -> Codes:
        """Codes of activations (B, D), in the units of the stored activations.

        Raises:
            SparsightError: another width, NaN or infinity.
        """

    def training_codes(self, x: Tensor) -> tuple[Codes, Tensor]:
        """Codes of the training forward pass, and the variant's own term of the loss, weighted."""
        return self.encode(x), x.new_zeros(())

    def learn(self, codes: Codes) -> None:
        """Take over from a training batch what is not learnt by gradients."""

    def decode(self, codes: Codes) -> Tensor:
        """Reconstruction (B, D), in the units of x."""
        return codes.combine(self.W_dec) + self.b_dec

    def forward(self, x: Tensor | np.ndarray) -> Tensor:
        """decode(encode(x)), (B, D)."""
        return self.decode(self.encode(x))

    def loss(self, x: Tensor | np.ndarray) -> Loss:
        """Reconstruction and AuxK losses and the variant's own term on activations (B, D).

        ``reconstruction`` is the batch mean of the squared error summed over D, times ``loss_scale``.

        Raises:
            SparsightError: another width, NaN or infinity.
        """
        x = self.validate(x)
        codes, penalty = self.training_codes(x)
        x_hat = self.decode(codes)
        error = x - x_hat
        reconstruction = self._squared_error(error)
        aux = self._auxk(x, error.detach())
        return Loss(reconstruction + self.aux_coefficient * aux + penalty, reconstruction, aux, penalty, x_hat, codes)

    def _squared_error(self, error_BD: Tensor) -> Tensor:
        return error_BD.square().sum() / len(error_BD) * self.loss_scale

    def _auxk(self, x: Tensor, residual: Tensor) -> Tensor:
        """AuxK (Gao et al. 2024, section A.2): dead latents model the detached residual, relative to its variance."""
        dead = self.dead.nonzero().squeeze(1)
        if not (self.has_auxk and self.aux_k and len(dead)):
            return x.new_zeros(())
        error = (self._from_dead(x, dead) - residual).square().sum()
        variance = (residual - residual.mean(dim=0)).square().sum()
        known = variance > 0  # it is not for a batch of one row
        return error / torch.where(known, variance, 1.0) * known

    def _from_dead(self, x: Tensor, dead: Tensor) -> Tensor:
        """What the ``aux_k`` largest pre-activations among the dead latents, ReLU'd, decode to, (B, D), no bias."""
        W_enc, W_dec = self.W_enc.T.index_select(0, dead).T, self.W_dec.index_select(0, dead)
        if len(dead) <= self.aux_k:  # all of them: nothing to choose, and so few that whole products are quicker
            return torch.addmm(self.b_enc[dead], x - self.b_dec, W_enc).relu() @ W_dec
        return kernels.decode(*kernels.topk(x - self.b_dec, W_enc, self.b_enc[dead], self.aux_k), W_dec)

    def validate(self, x: Tensor | np.ndarray) -> Tensor:
        """The activations (B, D) as a tensor of this SAE's type, on its device.

        Raises:
            SparsightError: another width, NaN or infinity.
        """
        tensor = torch.as_tensor(x, dtype=self.W_dec.dtype, device=self.W_dec.device)
        if tensor.ndim != 2 or tensor.shape[1] != self.d_in:
            raise SparsightError(f"SAE: expected activations of shape (batch, {self.d_in}), got {tuple(tensor.shape)}")
        if not tensor.detach().sum().isfinite():  # one pass; a sum may overflow, so look again before blaming x
            bad = ~tensor.isfinite().all(dim=1)
            if bad.any():
                row = int(bad.nonzero()[0])
                raise SparsightError(
                    f"SAE: NaN or infinite activation in row {row} of the batch; check where x is from"
                )
        return tensor

    def start(self, variance: float) -> None:
        """Begin training on data of this variance E||x - mean||^2: losses are relative to it from here on."""
        self.loss_scale = 1 / variance if variance > 0 else 1.0
        self.started = True

    @torch.no_grad()
    def set_center(self, center_D: Tensor | np.ndarray) -> None:
        """Initialise b_dec, with the mean of the activations or their :func:`geometric_median`, (D,)."""
        self.b_dec.copy_(torch.as_tensor(center_D))

    def constrain(self) -> None:
        """Project the parameters on what they must satisfy after an optimiser step: decoder rows of unit norm."""
        self.normalize_decoder()

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Give every decoder row unit norm."""
        for rows in self.W_dec.split(_ROWS):
            rows.div_(torch.linalg.vector_norm(rows, dim=1, keepdim=True))

    @torch.no_grad()
    def remove_parallel_gradient(self) -> None:
        """Remove from W_dec's gradient what would only change the length of its unit rows."""
        assert self.W_dec.grad is not None
        for gradient, rows in zip(self.W_dec.grad.split(_ROWS), self.W_dec.split(_ROWS), strict=True):
            gradient.addcmul_(torch.linalg.vecdot(gradient, rows).unsqueeze(1), rows, value=-1)

    @torch.no_grad()
    def fold_scale(self, scale: float) -> None:
        """Turn an SAE of x / ``scale`` into the equivalent SAE of x; codes and output grow by ``scale``."""
        for name in self.scaled:
            getattr(self, name).mul_(scale)

    def save(self, folder: str | Path, **about: Any) -> None:
        """Write ``sae.safetensors`` and ``config.json``; ``about`` adds keys to the latter."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in self.state_dict().items()}, folder / "sae.safetensors")
        sizes = {"kind": self.kind, "d_in": self.d_in, "d_sae": self.d_sae, "k": self.k}
        options = {name: getattr(self, name) for name in self.options}
        write_json(folder / "config.json", {**about, "format_version": FORMAT_VERSION, **sizes, **options})


def geometric_median(x_ND: Tensor | np.ndarray, iterations: int = 100, tolerance: float = 1e-6) -> Tensor:
    """The point of least summed distance to the rows, (D,), by Weiszfeld's iteration in float64.

    Gao et al. 2024 (section A.1) initialise b_dec with it, on at most 32,768 rows.
    """
    rows = torch.as_tensor(x_ND).double()
    median = rows.mean(dim=0)
    for _ in range(iterations):
        distance_N = (rows - median).norm(dim=1).clamp(min=1e-12)
        last, median = median, (rows / distance_N.unsqueeze(1)).sum(dim=0) / (1 / distance_N).sum()
        if (median - last).norm() <= tolerance * median.norm():
            break
    return median.float()


def variant(cls: type[SAE]) -> type[SAE]:
    """Register an SAE class under the name of its file."""
    cls.kind = cls.__module__.rpartition(".")[2]
    assert cls.kind not in _REGISTRY, f"two SAE variants are called {cls.kind}"
    _REGISTRY[cls.kind] = cls
    return cls


def create(kind: str, d_in: int, d_sae: int, k: int, seed: int = 0, **options: Any) -> SAE:
    """A new SAE of a registered variant; see its class for the options.

    Raises:
        SparsightError: no such variant, an option it does not have, or sizes that do not fit together.
    """
    cls = _class(kind)
    for name in options:
        if name not in cls.options:
            raise SparsightError(f"the SAE {kind!r} has no option {name!r}; it has {', '.join(cls.options)}")
    return cls(d_in, d_sae, k, seed, **options)


def _class(kind: str) -> type[SAE]:
    if kind not in names():
        raise SparsightError(f"there is no SAE {kind!r}; known: {', '.join(names())}")
    importlib.import_module(f"sparsight.sae.variants.{kind}")
    return _REGISTRY[kind]


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
    cls = _class(config["kind"])
    sae = cls(config["d_in"], config["d_sae"], config["k"], **{name: config[name] for name in cls.options})
    sae.load_state_dict(load_file(folder / "sae.safetensors"))
    sae.about = config
    return sae
