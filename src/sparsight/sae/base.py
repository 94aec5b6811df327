"""What every SAE variant shares: parameters, losses, the registry, saving and loading.

Shapes: B batch, D width (d_in), F latents (d_sae), K active latents (k).
"""

import dataclasses
import importlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sparsight import kernels
from sparsight.common.errors import SparsightError, reason
from sparsight.common.files import write_json
from sparsight.common.modules import Module
from sparsight.sae import names
from sparsight.sae.codes import Codes

FORMAT_VERSION = 1
_ROWS = 256  # decoder rows that stay in the cache of a CPU
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
    """The variant's own loss term, weighted: sparsity, prefixes or load balance."""
    x_hat: Tensor
    codes: Codes


class SAE(Module, ABC):
    """A sparse autoencoder x_hat = decode(encode(x)).

    A variant defines :meth:`encode`. It also defines :meth:`training_codes` if training differs from inference or adds
    a loss term.

    Args:
        d_in: D.
        d_sae: F.
        k: K, the number of active latents; a target for variants without a fixed number.
        seed: seed of the initial weights. Decoder rows are uniform on the unit sphere; the encoder is the transpose.
        aux_k: number of dead latents that the AuxK loss uses; None means d_in / 2 (Gao et al. 2024, section A.2).
        aux_coefficient: weight of the AuxK loss.

    Raises:
        SparsightError: sizes that do not fit together.
    """

    kind: str
    options: ClassVar[tuple[str, ...]] = ("aux_k", "aux_coefficient")
    """Names of the arguments besides the sizes and the seed. Attributes of the same names are saved in config.json."""
    has_auxk: ClassVar[bool] = True
    """Whether the variant's loss has the AuxK term."""
    has_b_enc: ClassVar[bool] = True
    """Whether latents have a bias."""
    scaled: ClassVar[tuple[str, ...]] = ("b_enc", "b_dec")
    """Names of the parameters and buffers in the units of x."""

    def __init__(
        self, d_in: int, d_sae: int, k: int, seed: int = 0, aux_k: int | None = None, aux_coefficient: float = 1 / 32
    ) -> None:
        super().__init__()
        if min(d_in, d_sae, k) < 1 or k > d_sae:
            raise SparsightError(f"SAE: d_in = {d_in}, d_sae = {d_sae}, k = {k}; needs 1 <= k <= d_sae and d_in >= 1")
        self.d_in, self.d_sae, self.k = d_in, d_sae, k
        self.aux_k = min(d_in // 2 if aux_k is None else aux_k, d_sae)
        self.aux_coefficient = aux_coefficient
        self._make_weights(seed)
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        self.loss_scale = 1.0
        """Factor on the reconstruction loss: 1 / E||x - mean||^2 once training has started, 1 before."""
        self.started = False
        """Whether :meth:`start` was called."""
        self.about: dict[str, Any] = {}
        """Metadata; of a loaded SAE the content of config.json: site, tokens, backbone and more."""
        self.register_buffer("dead", torch.zeros(d_sae, dtype=torch.bool), persistent=False)
        self.dead: Tensor
        self.none_dead = False
        """Whether the trainer knows, without asking the device, that ``dead`` is false throughout."""

    def _make_weights(self, seed: int) -> None:
        """Create the parameters that have a row, column or entry for every latent."""
        rows = torch.randn(self.d_sae, self.d_in, generator=torch.Generator().manual_seed(seed))
        self.W_dec = nn.Parameter(rows / rows.norm(dim=1, keepdim=True))
        # A transposed view of (F, D) memory: the gradient of a latent is one contiguous row.
        self.W_enc = nn.Parameter(self.W_dec.detach().clone().T)
        if self.has_b_enc:
            self.b_enc = nn.Parameter(torch.zeros(self.d_sae))

    @property
    def gpu_step(self) -> bool:
        """Whether training takes the step for a GPU.

        Its shapes do not depend on values, so that nothing waits for the device, and one kernel updates the decoder.
        """
        return "W_dec" in self._parameters and self.W_dec.is_cuda

    @property
    def macs_encode(self) -> int:
        """Multiply-accumulates of encoding one activation: its product with the encoder."""
        return self.d_in * self.d_sae

    @abstractmethod
    def encode(self, x: Tensor | np.ndarray) -> Codes:
        """Codes of activations (B, D), in the units of the stored activations.

        Raises:
            SparsightError: activations of another width, NaN or infinite.
        """

    def training_codes(self, x: Tensor) -> tuple[Codes, Tensor | None]:
        """Codes of the training forward pass, and the variant's own loss term, weighted, or None."""
        return self.encode(x), None

    def learn(self, codes: Codes) -> None:
        """Update, from the codes of a training batch, what gradients do not train."""

    def decode(self, codes: Codes) -> Tensor:
        """Reconstruction (B, D), in the units of x."""
        return codes.combine(self.W_dec) + self.b_dec

    def _topk(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Values and indices, (B, K) both, of the ``k`` largest ReLU((x - b_dec) W_enc + b_enc)."""
        return kernels.topk(x, self.W_enc, self.b_enc, k, self.b_dec)

    def _combine(self, values_BK: Tensor, indices_BK: Tensor) -> Tensor:
        """Sum of decoder rows weighted by the values, (B, D), without bias."""
        return kernels.decode(values_BK, indices_BK, self.W_dec)

    def forward(self, x: Tensor | np.ndarray) -> Tensor:
        """decode(encode(x)), (B, D)."""
        return self.decode(self.encode(x))

    def loss(self, x: Tensor | np.ndarray) -> Loss:
        """Reconstruction and AuxK losses and the variant's own term on activations (B, D).

        ``reconstruction`` is the batch mean of the squared error summed over D, times ``loss_scale``.

        Raises:
            SparsightError: activations of another width; on the CPU, also NaN or infinite ones. On a GPU these give a
                loss that is not finite, because the check would wait for the device in every step.
        """
        x = self._rows(x) if self.W_dec.is_cuda else self.validate(x)
        codes, x_hat, penalty = self._forward(x)
        reconstruction = self._squared_error(x_hat, x, len(x))
        aux, none = self._auxk(x, x_hat.detach()), reconstruction.new_zeros(())
        total = reconstruction if aux is None else reconstruction + self.aux_coefficient * aux
        total = total if penalty is None else total + penalty
        aux, penalty = (none if term is None else term for term in (aux, penalty))
        return Loss(total, reconstruction, aux, penalty, x_hat, codes)

    def _forward(self, x: Tensor) -> tuple[Codes, Tensor, Tensor | None]:
        """:meth:`training_codes` with the reconstruction between codes and loss term."""
        codes, penalty = self.training_codes(x)
        return codes, self.decode(codes), penalty

    def _squared_error(self, x_hat: Tensor, x: Tensor, n_rows: int) -> Tensor:
        """The squared error summed over all entries, per row and relative to the data's variance."""
        error = nn.functional.mse_loss(x_hat, x, reduction="sum")
        # One launch instead of two; on a CPU, where that does not matter, results keep the bits they always had.
        return error * (self.loss_scale / n_rows) if self.gpu_step else error / n_rows * self.loss_scale

    def _auxk(self, x: Tensor, x_hat: Tensor) -> Tensor | None:
        """AuxK loss (Gao et al. 2024, section A.2): error of dead latents on the detached residual over its variance.

        None without dead latents.
        """
        if not (self.has_auxk and self.aux_k) or self.none_dead:
            return None
        dead = self._dead_latents()
        if dead is not None and not len(dead):
            return None
        residual = x - x_hat
        error = (self._from_dead(x, dead) - residual).square().sum()
        variance = (residual - residual.mean(dim=0)).square().sum()
        counts = variance > 0  # false for a batch of one row
        if dead is None:
            counts &= self.dead.any()
        return error / torch.where(counts, variance, 1.0) * counts

    def _dead_latents(self) -> Tensor | None:
        """The numbers of the dead latents; on a GPU, which would make the host wait for them, None."""
        return None if self.gpu_step else self.dead.nonzero().squeeze(1)

    def _from_dead(self, x: Tensor, dead: Tensor | None) -> Tensor:
        """Decoded ReLU of the ``aux_k`` largest pre-activations of dead latents, (B, D), without bias.

        Args:
            dead: the numbers of the dead latents; None takes them from ``self.dead``, in shapes that do not depend on
                how many there are.
        """
        if dead is None:
            only_dead = torch.where(self.dead, self.b_enc, -torch.inf)
            return self._combine(*kernels.topk(x, self.W_enc, only_dead, self.aux_k, self.b_dec))
        W_enc, W_dec = self.W_enc.T.index_select(0, dead).T, self.W_dec.index_select(0, dead)
        if len(dead) <= self.aux_k:  # all of them are used, and for so few dense products are faster
            return torch.addmm(self.b_enc[dead], x - self.b_dec, W_enc).relu() @ W_dec
        return kernels.decode(*kernels.topk(x - self.b_dec, W_enc, self.b_enc[dead], self.aux_k), W_dec)

    def validate(self, x: Tensor | np.ndarray) -> Tensor:
        """The activations (B, D) as a tensor of this SAE's type, on its device.

        Raises:
            SparsightError: activations of another width, NaN or infinite.
        """
        tensor = self._rows(x)
        if not tensor.detach().sum().isfinite():  # one pass; the sum of finite rows may overflow, so check the rows
            bad = ~tensor.isfinite().all(dim=1)
            if bad.any():
                row = int(bad.nonzero()[0])
                raise SparsightError(
                    f"SAE: NaN or infinite activation in row {row} of the batch; check where x is from"
                )
        return tensor

    def _rows(self, x: Tensor | np.ndarray) -> Tensor:
        """:meth:`validate` without a look at the values."""
        tensor = torch.as_tensor(x, dtype=self.W_dec.dtype, device=self.W_dec.device)
        if tensor.ndim != 2 or tensor.shape[1] != self.d_in:
            raise SparsightError(f"SAE: expected activations of shape (batch, {self.d_in}), got {tuple(tensor.shape)}")
        return tensor

    def start(self, variance: float) -> None:
        """Begin training on data with this variance E||x - mean||^2. From now on losses are relative to it."""
        self.loss_scale = 1 / variance if variance > 0 else 1.0
        self.started = True

    @torch.no_grad()
    def set_center(self, center_D: Tensor | np.ndarray) -> None:
        """Initialise b_dec with a centre (D,): the mean of the activations or their geometric median."""
        self.b_dec.copy_(torch.as_tensor(center_D))

    def constrain(self) -> None:
        """Restore the constraints on the parameters after an optimiser step: decoder rows of unit norm, and bounds."""
        self.normalize_decoder()
        self.bound()

    def bound(self) -> None:
        """Restore the constraints on parameters other than the decoder."""

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Scale every decoder row to unit norm."""
        for W_dec in self._decoders():
            for rows in blocks(W_dec):
                rows.div_(torch.linalg.vector_norm(rows, dim=1, keepdim=True))

    @torch.no_grad()
    def remove_parallel_gradient(self) -> None:
        """Remove from W_dec's gradient the part along each row, which would only change the row's length."""
        for W_dec in self._decoders():
            assert W_dec.grad is not None
            for gradient, rows in zip(blocks(W_dec.grad), blocks(W_dec), strict=True):
                gradient.addcmul_(torch.linalg.vecdot(gradient, rows).unsqueeze(1), rows, value=-1)

    def _decoders(self) -> list[Tensor]:
        """The parts of the decoder that this process holds."""
        return [self.W_dec]

    @torch.no_grad()
    def fold_scale(self, scale: float) -> None:
        """Turn an SAE of x / ``scale`` into the equivalent SAE of x. Codes and output are multiplied by ``scale``."""
        for name in self.scaled:
            getattr(self, name).mul_(scale)

    def save(self, folder: str | Path, **about: Any) -> None:
        """Write ``sae.safetensors`` and ``config.json``; ``about`` adds keys to config.json."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in self.state_dict().items()}, folder / "sae.safetensors")
        self._save_config(folder, about)

    def _save_config(self, folder: Path, about: Mapping[str, Any]) -> None:
        sizes = {"kind": self.kind, "d_in": self.d_in, "d_sae": self.d_sae, "k": self.k}
        options = {name: getattr(self, name) for name in self.options}
        write_json(folder / "config.json", {**about, "format_version": FORMAT_VERSION, **sizes, **options})


def blocks(W_FD: Tensor) -> tuple[Tensor, ...]:
    """Rows to handle at a time: on a GPU all of them, because it takes longer to launch a block than to read it."""
    return (W_FD,) if W_FD.is_cuda else W_FD.split(_ROWS)


def variant(cls: type[SAE]) -> type[SAE]:
    """Register an SAE class under the name of its file."""
    cls.kind = cls.__module__.rpartition(".")[2]
    assert cls.kind not in _REGISTRY, f"two SAE variants are called {cls.kind}"
    _REGISTRY[cls.kind] = cls
    return cls


def create(kind: str, d_in: int, d_sae: int, k: int, seed: int = 0, **options: Any) -> SAE:
    """A new SAE of a registered variant; see its class for the options.

    Raises:
        SparsightError: an unknown variant, an option that it does not have, or sizes that do not fit together.
    """
    cls = variant_class(kind)
    for name in options:
        if name not in cls.options:
            raise SparsightError(f"the SAE {kind!r} has no option {name!r}; it has {', '.join(cls.options)}")
    return cls(d_in, d_sae, k, seed, **options)


def variant_class(kind: str) -> type[SAE]:
    """The class of a variant; raises SparsightError if there is none of this name."""
    if kind not in names():
        raise SparsightError(f"there is no SAE {kind!r}; known: {', '.join(names())}")
    importlib.import_module(f"sparsight.sae.variants.{kind}")
    return _REGISTRY[kind]


def load(folder: str | Path) -> SAE:
    """The SAE that :meth:`SAE.save` wrote.

    Raises:
        SparsightError: no SAE in the folder, or one of another format version.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text())
    except OSError as error:
        raise SparsightError(f"{folder}: no SAE here ({reason(error)}: config.json)") from None
    if config.get("format_version") != FORMAT_VERSION:
        raise SparsightError(f"{folder}: format_version {config.get('format_version')}, expected {FORMAT_VERSION}")
    cls = variant_class(config["kind"])
    options = {name: config[name] for name in cls.options if name in config}  # those of a file older than an option
    sae = cls(config["d_in"], config["d_sae"], config["k"], **options)
    sae.load_state_dict(load_file(folder / "sae.safetensors"))
    sae.about = config
    return sae
