"""One training step of one or many SAEs.

Shapes: B batch, D width (d_in), F latents (d_sae), C classes.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from sparsight.common.devices import sent
from sparsight.common.errors import SparsightError
from sparsight.config.sae import Frozen
from sparsight.sae.adam import BETAS, EPS, Adam
from sparsight.sae.base import SAE, Loss
from sparsight.sae.class_means import ClassMeans
from sparsight.sae.frozen import freeze
from sparsight.sae.mutual import penalty


class Trainer:
    """Optimises one or many SAEs on the same rows. Unless ``mutual``, each ends with the bytes as if trained alone.

    Args:
        saes: the SAEs, on their device; their decoder rows have unit norm and keep it.
        lr: learning rate of Adam; None takes 2e-4 / sqrt(d_sae / 2^14) for each SAE (arXiv 2406.04093, section 3, in
            its common form).
        dead_after: number of activations without firing after which a latent counts as dead (AuxK revives it).
        sites: the site of each SAE, for steps on several sites; None takes ``about["site"]``.
        precision: ``bf16`` computes the products of the forward pass in bfloat16; weights stay fp32.
        prototype_weight: weight of the PASS term, used if labels are given (arXiv 2506.01247: 0.8).
        mutual: weight of the penalty that makes the decoders of a site alike (:mod:`sparsight.sae.mutual`).
        frozen: what stays as it was drawn (:mod:`sparsight.sae.frozen`).
    """

    def __init__(
        self, saes: Sequence[SAE], lr: float | None = None, dead_after: int = 10_000_000,
        sites: Sequence[str] | None = None, precision: Literal["fp32", "bf16"] = "fp32", prototype_weight: float = 0.8,
        mutual: float = 0.0, frozen: Frozen = "none",
    ) -> None:  # fmt: skip
        self.saes, self.dead_after, self.precision = list(saes), dead_after, precision
        self.prototype_weight, self.mutual, self.frozen = prototype_weight, mutual, frozen
        self.unlikeness: dict[int, Tensor] = {}
        """With ``mutual``, the penalty of each SAE's site before the last step."""
        self._pull: dict[int, Tensor] = {}
        """Its gradients to the decoders."""
        self.sites = [sae.about.get("site") for sae in self.saes] if sites is None else list(sites)
        if len(self.sites) != len(self.saes):
            raise SparsightError(f"Trainer: {len(self.sites)} sites for {len(self.saes)} SAEs; name one for each")
        self.lrs = [2e-4 / math.sqrt(sae.d_sae / 2**14) if lr is None else lr for sae in self.saes]
        self.cones = [freeze(sae, frozen) for sae in self.saes]
        """Per SAE, what keeps a soft-frozen decoder near its random rows; else None."""
        self.adams = [
            Adam({name: p for name, p in sae.named_parameters() if p.requires_grad}, rate)
            for sae, rate in zip(self.saes, self.lrs, strict=True)
        ]
        self.since_fired = [torch.zeros(sae.d_sae, dtype=torch.int64, device=sae.W_dec.device) for sae in self.saes]
        """Per SAE, the number of activations since each latent last fired, (F,)."""
        self.prototypes = [ClassMeans(sae.d_sae, sae.W_dec.device) for sae in self.saes]
        self._health = [_Health(sae.W_dec.device) for sae in self.saes]
        self._bias = [torch.zeros(3, device=sae.W_dec.device) for sae in self.saes]
        """For the update on a GPU, see :func:`sparsight.kernels.update.prepare`."""
        self._at_most = [0 for _ in self.saes]
        """Per SAE, a bound on ``since_fired`` that is known without asking the device."""

    def schedule(self, factor: float) -> None:
        """Set every learning rate to ``factor`` times its peak."""
        for adam, lr in zip(self.adams, self.lrs, strict=True):
            adam.lr = lr * factor

    def step(
        self, x: Tensor | np.ndarray | Mapping[str, Tensor | np.ndarray], labels: Tensor | np.ndarray | None = None
    ) -> list[Loss]:
        """One step of every SAE: losses, gradients, decoder constraint, clipping, Adam, dead counters.

        Args:
            x: activations (B, D), or activations by site.
            labels: (B,) class numbers; if given, the PASS term is added.

        Raises:
            SparsightError: activations that are not finite or of another width, a missing site, or a loss that is not
                finite. The weights of the SAE at fault stay as they were before the step. On a GPU, :meth:`check` says
                what is not finite, and from there on the weights stay.
        """
        if self.mutual:
            self._compare()
        return [self._step(i, self._rows(i, x), labels) for i in range(len(self.saes))]

    def _compare(self) -> None:
        """The penalty's gradients to all decoders, before any of them moves."""
        for site in dict.fromkeys(self.sites):
            members = [i for i, own in enumerate(self.sites) if own == site]
            value, gradients = penalty([self.saes[i].W_dec for i in members])
            self.unlikeness |= dict.fromkeys(members, value)
            self._pull |= dict(zip(members, gradients, strict=True))

    def check(self) -> None:
        """Read from the GPU whether all steps so far were finite; this waits for the device.

        Raises:
            SparsightError: a loss or gradient that was not finite; the message names the first such step.
        """
        for i, (sae, adam, health) in enumerate(zip(self.saes, self.adams, self._health, strict=True)):
            if sae.W_dec.is_cuda:
                taken = next(iter(adam.state.values()))["step"]  # Adam counts no other steps
                value, length, steps = torch.cat([health.loss_and_norm, taken.unsqueeze(0)]).tolist()
                self._refuse(i, value, length, f" in step {steps + 1:.0f}")
                self._at_most[i] = int(self.since_fired[i].max())  # AuxK rests while nothing can be dead

    def _refuse(self, i: int, value: float, length: float, where: str = "") -> None:
        if not math.isfinite(value + length):
            numbers = f"loss {value}, gradient norm {length}{where}"
            raise SparsightError(f"{self._name(i)}: {numbers}; lower lr, or look for extreme activations")

    def _rows(self, i: int, x: Tensor | np.ndarray | Mapping[str, Tensor | np.ndarray]) -> Tensor | np.ndarray:
        if not isinstance(x, Mapping):
            return x
        site = self.sites[i]
        if site is None and len(x) == 1:
            return next(iter(x.values()))
        if site is None or site not in x:
            raise SparsightError(
                f"{self._name(i)} trains on site {site!r}, the step has {', '.join(x)}; "
                'give Trainer(sites=...) or sae.about["site"]'
            )
        return x[site]

    def _step(self, i: int, x: Tensor | np.ndarray, labels: Tensor | np.ndarray | None) -> Loss:
        self._begin(i, x)
        loss, total, y = self._losses(i, x, labels)
        self._gradients(i, total)
        norm = self._norm(i)
        self._update(i, self._judge(i, total, norm))
        self._count(i, loss)
        if y is not None:
            self.prototypes[i].learn(loss.codes, y)
        return loss

    def _begin(self, i: int, x: Tensor | np.ndarray) -> None:
        """What the step needs to know before it starts: the data's variance, and whether latents may be dead."""
        sae = self.saes[i]
        if not sae.started:
            rows = sae.validate(x).double()
            sae.start(float((rows - rows.mean(dim=0)).square().sum() / len(rows)))
        sae.none_dead = self._at_most[i] < self.dead_after

    def _losses(
        self, i: int, x: Tensor | np.ndarray, labels: Tensor | np.ndarray | None
    ) -> tuple[Loss, Tensor, Tensor | None]:
        """The SAE's losses, what the gradients are of, and the labels on the SAE's device."""
        sae = self.saes[i]
        device = sae.W_dec.device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            loss = self._loss(sae, x)
        if labels is None:
            return loss, loss.total, None
        y = torch.as_tensor(labels).long()
        if y.shape != (len(loss.x_hat),) or y.min() < 0:
            raise SparsightError(f"labels: expected {len(loss.x_hat)} class numbers from 0, got {tuple(y.shape)}")
        self.prototypes[i].grow(int(y.max()) + 1)  # labels of the host, so that nothing waits for the device
        y = sent(y, device)
        term = self.prototypes[i].term(loss.codes, y)
        return loss, loss.total + self.prototype_weight * sae.loss_scale * term, y

    def _loss(self, sae: SAE, x: Tensor | np.ndarray) -> Loss:
        """The loss of one SAE, without the PASS term."""
        return sae.loss(x)

    def _gradients(self, i: int, total: Tensor) -> None:
        """Gradients of all parameters, without the part of W_dec's along its rows; a GPU removes it as it reads it."""
        sae = self.saes[i]
        sae.zero_grad()
        total.backward()
        if self.mutual:
            assert sae.W_dec.grad is not None
            sae.W_dec.grad.add_(self._pull[i], alpha=self.mutual)
        if not sae.gpu_step and self.frozen != "decoder":
            sae.remove_parallel_gradient()

    def _norm(self, i: int) -> Tensor:
        """Euclidean norm of all gradients together."""
        sae = self.saes[i]
        gradients = {name: p.grad for name, p in sae.named_parameters() if p.grad is not None}
        if sae.gpu_step and self.frozen != "decoder":
            from sparsight.kernels import update

            gradient, step = gradients["W_dec"], self.adams[i].state["W_dec"]["step"]
            gradients["W_dec"] = update.prepare(gradient, sae.W_dec.detach(), step, BETAS, self._bias[i])
        return torch.nn.utils.get_total_norm(gradients.values())

    def _judge(self, i: int, total: Tensor, norm: Tensor) -> Tensor:
        """Refuse a step that is not finite; a GPU does not take it. Returns what clips the gradients to norm 1."""
        if not norm.is_cuda:
            self._refuse(i, float(total.detach()), float(norm))
            return norm.clamp(min=1)
        from sparsight.kernels import update  # Triton comes with the PyTorch of GPUs only

        health = self._health[i]
        return update.judge(total.detach(), norm, health.loss_and_norm, health.failed)

    @torch.no_grad()
    def _update(self, i: int, clip: Tensor) -> None:
        """Adam, which divides the gradients by ``clip``, and the constraints."""
        sae, adam, cones = self.saes[i], self.adams[i], self.cones[i]
        gradients = {name: p.grad for name, p in sae.named_parameters() if p.grad is not None}
        failed = self._health[i].failed
        gradient = gradients.pop("W_dec", None) if sae.gpu_step else None
        adam.step(gradients, clip, failed if clip.is_cuda else None)
        if gradient is None and self.frozen != "decoder":
            sae.constrain()
        else:
            sae.bound()
        if gradient is not None:
            from sparsight.kernels import update

            update.update(
                gradient, sae.W_dec.detach(), adam.state["W_dec"], self._bias[i], clip, failed, adam.lr, BETAS, EPS
            )
        if cones is not None:
            cones.project()

    @torch.no_grad()
    def _count(self, i: int, loss: Loss) -> None:
        self._at_most[i] += len(loss.x_hat)
        self.since_fired[i] += len(loss.x_hat)
        self.since_fired[i].masked_fill_(loss.codes.fired(), 0)
        if self._at_most[i] >= self.dead_after:
            self.saes[i].dead = self.since_fired[i] >= self.dead_after
        self.saes[i].learn(loss.codes)

    def _name(self, i: int) -> str:
        return f"SAE {self.saes[i].about.get('name', i)!r} ({self.saes[i].kind})"

    def state(self) -> dict[str, Tensor]:
        """Every tensor that the next step depends on, under flat names; see :meth:`restore`."""
        state = {name: tensor.contiguous() for name, tensor in self._tensors().items()}
        for i, (sae, prototypes) in enumerate(zip(self.saes, self.prototypes, strict=True)):
            state[f"{i}.loss_scale"] = torch.tensor([sae.loss_scale, sae.started], dtype=torch.float64)
            state[f"{i}.prototypes.means"], state[f"{i}.prototypes.seen"] = prototypes.means_CF, prototypes.seen_C
        return state

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`state` returned. The following steps then give the same bytes."""
        for name, tensor in self._tensors().items():
            tensor.copy_(state[name])
        for i, (sae, prototypes) in enumerate(zip(self.saes, self.prototypes, strict=True)):
            sae.loss_scale, sae.started = float(state[f"{i}.loss_scale"][0]), bool(state[f"{i}.loss_scale"][1])
            self._at_most[i] = int(self.since_fired[i].max())
            prototypes.means_CF = state[f"{i}.prototypes.means"].to(sae.W_dec.device)
            prototypes.seen_C = state[f"{i}.prototypes.seen"].to(sae.W_dec.device)

    def _tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for i, (sae, adam) in enumerate(zip(self.saes, self.adams, strict=True)):
            tensors |= {f"{i}.{name}": buffer for name, buffer in sae.named_buffers()}
            tensors[f"{i}.since_fired"] = self.since_fired[i]
            tensors |= {f"{i}.{name}": tensor for name, tensor in adam.tensors().items()}
            tensors |= {f"{i}.{name}": p for name, p in sae.named_parameters() if not p.requires_grad}
            if (cones := self.cones[i]) is not None:
                tensors |= {f"{i}.axes.{part}": axes for part, axes in enumerate(cones.axes)}
        return tensors


class _Health:
    """On a GPU, whether all steps were finite, found out by the device itself, so that no step waits for it."""

    def __init__(self, device: torch.device) -> None:
        self.loss_and_norm = torch.zeros(2, device=device)
        """Of the last step, or of the first one where they are not finite."""
        self.failed = torch.zeros((), device=device)
        """1 from the first step on that is not finite. Adam then leaves weights and moments as they are."""
