"""How each strategy changes the policy's head logits, in closed form.

The policy is linear: amplifying latents of what it reads, x' = x + sum (g_i - 1) z_i d_i, changes the logit of head h
by sum (g_i - 1) z_i <w_h, d_i>. So W_head W_dec holds the effect of every latent on every head. Latents are ranked for
a head without running them, and another strength costs one product.

Shapes: N images, D width (d_in), F latents (d_sae), H heads, C classes, m latents amplified.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparsight import config
from sparsight.pruning.controls import THRESHOLD_SHARES, Controls, static_shares
from sparsight.pruning.last_block import LastBlockInputs
from sparsight.pruning.latent_effects import Edit, LatentEffects
from sparsight.pruning.masks import pack
from sparsight.pruning.policy import HeadPolicy

LABELS = ("predicted", "probe", "oracle")
"""Kinds of label: the prediction of the unsteered pruned model, that of a linear probe at the block's input, the true
class."""


@dataclass(frozen=True)
class Kind:
    """The rows that a strategy has."""

    sae: bool = False
    """Whether it has one row for each SAE."""
    by_class: bool = False
    """Whether it has one row for each kind of label."""
    grid: str = ""
    """Its strengths: ``strengths``, ``bias_strengths``, ``shares`` of heads; empty for one row of strength 1."""
    counts: bool = False
    """Whether it has one row for each number of latents."""


KINDS: dict[config.Strategy, Kind] = {
    "none": Kind(),
    "reconstruct": Kind(sae=True),
    "uniform": Kind(sae=True, grid="strengths"),
    "sample-top": Kind(sae=True, grid="strengths", counts=True),
    "class-latents": Kind(sae=True, by_class=True, grid="strengths", counts=True),
    "class-latents-in-stream": Kind(sae=True, by_class=True, grid="strengths", counts=True),
    "targeted": Kind(sae=True, grid="strengths", counts=True),
    "latent-atlas": Kind(sae=True, grid="strengths"),
    "random-latents": Kind(sae=True, by_class=True, grid="strengths", counts=True),
    "random-sae": Kind(sae=True, by_class=True, grid="strengths", counts=True),
    "logit-bias": Kind(by_class=True, grid="bias_strengths"),
    "logit-bias-matched": Kind(sae=True, by_class=True, grid="strengths", counts=True),
    "class-threshold": Kind(by_class=True, grid="shares"),
    "class-static": Kind(by_class=True, grid="shares"),
    "skip-block": Kind(),
    "zero-heads": Kind(),
    "all-heads": Kind(),
}
IN_STREAM: config.Strategy = "class-latents-in-stream"
BOUNDS = ("skip-block", "zero-heads", "all-heads")


class Row(NamedTuple):
    """Key of a row of the tables."""

    strategy: config.Strategy
    strength: float = 1.0
    labels: str = "none"
    sae: str = ""
    """Name of the SAE; empty for strategies without one."""
    latents: int = 0
    """Number of amplified latents; 0 if none or all active ones are amplified."""
    target: int = -1
    """The head that ``targeted`` switches off, or the latent of ``latent-atlas``; -1 for other strategies."""


NONE = Row("none")


class Decided(NamedTuple):
    """The decision of a row for every image."""

    row: Row
    codes: np.ndarray
    """(N,) codes of the masks."""
    edit: Edit | None = None
    """Edit of what the policy reads that is made in the stream, or None."""


def every_row(section: config.Pruning, n_heads: int, effects_by_sae: dict[str, LatentEffects]) -> list[Row]:
    """Every row that is tried on val; ``none`` comes first."""
    rows = []
    for name in sorted(section.strategies, key=lambda name: name != "none"):
        kind = KINDS[name]
        shares = static_shares(n_heads) if name == "class-static" else THRESHOLD_SHARES
        grids = {"strengths": section.strengths, "bias_strengths": section.bias_strengths, "shares": shares}
        for labels in LABELS if kind.by_class else ("none",):
            for sae in effects_by_sae if kind.sae else ("",):
                counts, targets = section.latents if kind.counts else (0,), [-1]
                if name == "targeted":
                    targets = list(range(n_heads))
                elif name == "latent-atlas":
                    counts, targets = (1,), effects_by_sae[sae].alive.tolist()
                steps = itertools.product(counts, targets, grids.get(kind.grid, (1.0,)))
                rows += [Row(name, float(s), labels, sae, m, target) for m, target, s in steps]
    return rows


@dataclass(frozen=True)
class Strategies:
    """Everything that decides masks, fitted on train."""

    policy: HeadPolicy
    effects_by_sae: dict[str, LatentEffects]
    """By name of the SAE."""
    scrambled: dict[str, LatentEffects]
    """The same for each SAE with random weights, by the same names."""
    controls: Controls

    @torch.no_grad()
    def codes(self, rows: list[Row], inputs: LastBlockInputs, routes: dict[str, np.ndarray]) -> Iterator["Decided"]:
        """The decision of each row. Rows that differ only in strength come together, so the order may change.

        Args:
            rows: the rows to decide.
            inputs: inputs of the last block.
            routes: (N,) the class whose configuration each image gets, by kind of label.
        """
        groups: dict[Row, list[Row]] = {}
        for row in rows:
            groups.setdefault(row._replace(strength=0.0), []).append(row)
        for unit, group in groups.items():
            classes_N = routes[unit.labels] if unit.labels != "none" else np.zeros(len(inputs), np.int64)
            if KINDS[unit.strategy].grid in ("", "shares"):
                yield from (Decided(row, self._unamplified(row, inputs, classes_N)) for row in group)
                continue
            classes = torch.from_numpy(classes_N).to(inputs.logits_NH.device).long()
            change_NH, edit = self._change(unit, inputs, classes), None
            if unit.strategy == IN_STREAM:
                effects = self.effects_by_sae[unit.sae]
                edit = effects.class_edit(effects.encode(inputs.read_ND), classes, unit.latents)
            for row in group:
                factor = row.strength - (row.strategy != "logit-bias")
                codes = pack(inputs.logits_NH + factor * change_NH > 0)
                yield Decided(row, codes, None if edit is None else edit.times(factor))

    def _unamplified(self, row: Row, inputs: LastBlockInputs, classes_N: np.ndarray) -> np.ndarray:
        """Codes (N,) of a strategy without a change of the head logits that scales with the strength."""
        strategy, n, H = row.strategy, len(inputs), inputs.n_heads
        if strategy == "class-static":
            return self.controls.subsets[row.labels, row.strength][classes_N]
        if strategy == "class-threshold":
            offset_N = self.controls.offsets[row.labels, row.strength][torch.from_numpy(classes_N)]
            return pack(inputs.logits_NH + offset_N[:, None].to(inputs.logits_NH) > 0)
        if strategy == "reconstruct":
            x_hat_ND = self.effects_by_sae[row.sae].sae(inputs.read_ND)
            return pack(self.policy.logits(self.policy.blocks[-1], x_hat_ND) > 0)
        if strategy == "none":
            return inputs.unsteered
        assert strategy in BOUNDS, strategy
        return np.full(n, 2**H - 1 if strategy == "all-heads" else 0, np.int32)

    def _change(self, unit: Row, inputs: LastBlockInputs, classes_N: Tensor) -> Tensor:
        """Change (N, H) of the head logits at factor 2 (``logit-bias``: at strength 1)."""
        strategy, m = unit.strategy, unit.latents
        if strategy == "logit-bias":
            return self.controls.shift_CH[classes_N]
        effects = (self.scrambled if strategy == "random-sae" else self.effects_by_sae)[unit.sae]
        if strategy == "logit-bias-matched":
            return effects.mean_change(m)[classes_N]
        z_NF = effects.encode(inputs.read_ND)
        if strategy == "uniform":
            return z_NF @ effects.push_HF.T
        if strategy == "sample-top":
            values, indices = z_NF.topk(m, dim=1)
            return (values[:, :, None] * effects.push_HF.T[indices]).sum(dim=1)
        if strategy in ("class-latents", "random-sae", IN_STREAM):
            return effects.class_change(z_NF, classes_N, m)
        if strategy == "random-latents":
            return effects.random_change(z_NF, classes_N, m)
        if strategy == "targeted":
            latents = effects.against_head(unit.target)[:m]
        else:
            assert strategy == "latent-atlas", strategy
            latents = torch.tensor([unit.target], device=z_NF.device)
        return z_NF[:, latents] @ effects.push_HF[:, latents].T
