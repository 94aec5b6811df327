"""What steering does to the head policy: accuracy and head usage per strategy, beside controls.

Routing is policy-only: the steered class token decides which heads of the last block are kept; the block
itself runs on the unsteered residual stream. So a strategy acts through its mask alone, and each image's
distinct masks are run once, whatever the number of strategies.

Shapes: B batch, D width (d_in), L blocks, H heads, C classes, S strategies, n images.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparsight import config, tables
from sparsight.backbones import Backbone
from sparsight.errors import SparsightError
from sparsight.images import Manifest, Split
from sparsight.progress import Progress, say
from sparsight.pruning.policy import HeadPolicy
from sparsight.sae.base import SAE
from sparsight.sae.base import load as load_sae
from sparsight.statistics import paired, wilson
from sparsight.steering.controls import unit_edit
from sparsight.steering.latents import ClassLatents
from sparsight.work import Work, write_json


class Row(NamedTuple):
    """What one row of the tables is about; ``sae`` is empty where no SAE is involved."""

    strategy: str
    strength: float
    labels: str
    sae: str


NONE = Row("none", 1.0, "none", "")


@dataclass(frozen=True)
class Steered:
    """An SAE with its class latents."""

    name: str
    sae: SAE
    found: ClassLatents

    @classmethod
    def load(cls, sae_folder: Path, vectors: Path, device: torch.device) -> "Steered":
        """From the folder of the SAE and the safetensors file of its steering result."""
        return cls(sae_folder.name, load_sae(sae_folder).to(device), ClassLatents.load(vectors, device))


@dataclass
class Outcome:
    """What happened to each image under one row."""

    hits: np.ndarray
    """bool (n,), classified correctly."""
    last: np.ndarray
    """bool (n, H), heads kept in the last block."""
    all: np.ndarray
    """bool (n, L, H), heads kept in every block (the first is always whole)."""


def evaluate(
    section: config.Pruning, backbone: Backbone, policy: HeadPolicy, steered: list[Steered], manifest: Manifest,
    work: Work, record: dict[str, Any],
) -> None:  # fmt: skip
    """Write the test tables ``overall``, ``per_class`` and ``per_head``, ``validation`` and ``metrics.json``.

    The strength of a strategy is chosen on val, over all SAEs together: the least last-block usage among
    those that cost at most ``section.tolerance`` of the unsteered policy's accuracy.
    """
    for one in steered:
        _check_site(one.sae, backbone)
    train_shift = class_shift(backbone, policy, manifest.split("train"), len(manifest.classes), section.batch_size)
    every = _rows(section, [one.name for one in steered])
    runner = _Runner(backbone, policy, {one.name: one for one in steered}, train_shift, section.batch_size)
    on_val = runner.run(every, manifest.split("val"))
    strengths = _choose(on_val, section.tolerance)
    chosen = [row for row in every if strengths[row.strategy, row.labels] == row.strength]
    test = manifest.split("test")
    on_test = runner.run(chosen, test)
    tables.write(work.out / "validation.parquet", [_describe(row, on_val, backbone) for row in every])
    overall = [_describe(row, on_test, backbone) for row in chosen]
    tables.write(work.out / "overall.parquet", overall)
    _write_classes(on_test, test, manifest.classes, backbone, work)
    whole = runner.whole(test)
    none = on_test[NONE]
    distinct_masks = len(np.unique(none.all.reshape(len(none.all), -1), axis=0))
    metrics = {
        "format_version": 1,
        "unpruned": wilson(whole),
        "policy": {**overall[0], "minus_unpruned": paired(none.hits, whole)},
        "distinct_masks_last": len(np.unique(none.last, axis=0)),
        "distinct_masks_all": distinct_masks,
        "static_policy": distinct_masks == 1,
        "gathered_against_masked": runner.gathered_against_masked(test),
        "chosen_on_val": [{"strategy": s, "labels": labels, "strength": v} for (s, labels), v in strengths.items()],
        "fvu_on_pruned_stream": {one.name: runner.fvu(one, test) for one in steered},
        "record": record,
    }
    write_json(work.out / "metrics.json", metrics)
    for line in overall:
        say(
            f"{line['strategy']} x{line['strength']:g} ({line['labels']} labels, {line['sae'] or 'no SAE'}): "
            f"accuracy {line['accuracy']:.4f}, usage last {line['usage_last']:.3f}, all {line['usage_all']:.3f}"
        )


def _check_site(sae: SAE, backbone: Backbone) -> None:
    site, tokens, wanted = sae.about["site"], sae.about["tokens"], f"blocks.{backbone.n_blocks - 1}.input"
    if (site, tokens) != (wanted, "cls"):
        raise SparsightError(
            f"pruning: the SAE reads {site}, tokens {tokens}; heads are steered at {wanted}, tokens cls"
        )


def _rows(section: config.Pruning, saes: list[str]) -> list[Row]:
    rows = [NONE]
    for name in section.strategies:
        if name == "reconstruct":
            rows += [Row(name, 1.0, "none", sae) for sae in saes]
        elif name in ("class-latents", "random-latents"):
            rows += [Row(name, s, to, sae) for to in ("predicted", "oracle") for s in section.strengths for sae in saes]
        elif name == "logit-bias":
            rows += [Row(name, s, to, "") for to in ("predicted", "oracle") for s in section.bias_strengths]
    return rows


def _choose(outcomes: dict[Row, Outcome], tolerance: float) -> dict[tuple[str, str], float]:
    """The strength per (strategy, labels); a tie goes to the smaller strength.

    If every strength costs more than ``tolerance``, the one that costs least.
    """
    groups: dict[tuple[str, str], dict[float, list[Outcome]]] = {}
    for row, outcome in outcomes.items():
        groups.setdefault((row.strategy, row.labels), {}).setdefault(row.strength, []).append(outcome)
    floor = outcomes[NONE].hits.mean() - tolerance
    chosen = {}
    for key, by_strength in groups.items():
        accuracy = {s: float(np.mean([o.hits.mean() for o in group])) for s, group in by_strength.items()}
        usage = {s: float(np.mean([o.last.mean() for o in group])) for s, group in by_strength.items()}
        allowed = [s for s in accuracy if accuracy[s] >= floor]
        chosen[key] = (
            min(allowed, key=lambda s: (usage[s], s)) if allowed else max(accuracy, key=lambda s: (accuracy[s], -s))
        )
    return chosen


class _Runner:
    """Runs rows over a split: the pruned prefix once, then the last block once per distinct mask."""

    def __init__(
        self, backbone: Backbone, policy: HeadPolicy, steered: dict[str, Steered], shift_CH: Tensor, batch_size: int
    ) -> None:
        self.backbone, self.policy, self.steered = backbone, policy, steered
        self.shift_CH, self.batch_size, self.last = shift_CH, batch_size, backbone.n_blocks - 1

    def prefixes(self, split: Split) -> Iterator[tuple[Tensor, Tensor, dict[int, Tensor]]]:
        """Per batch: images, the residual stream entering the last block, and the masks before it."""
        for pixels in split.batches(self.backbone.preprocess, self.batch_size, torch.get_num_threads()):
            images = self.backbone.normalize(pixels)
            yield images, *self.backbone.run_blocks(self.backbone.tokens(images), 0, self.last, self.policy, "gathered")

    @torch.no_grad()
    def run(self, rows: list[Row], split: Split) -> dict[Row, Outcome]:
        """What each row does to each image."""
        n, L, H = len(split), self.backbone.n_blocks, self.backbone.n_heads
        out = {row: Outcome(np.zeros(n, bool), np.zeros((n, H), bool), np.ones((n, L, H), bool)) for row in rows}
        done = 0
        with Progress(n, "images") as progress:
            for images, x_BTD, before in self.prefixes(split):
                window = slice(done, done + len(images))
                truth_B = torch.from_numpy(split.labels[window]).long().to(x_BTD.device)
                logits_BH = self.policy.logits(self.last, x_BTD[:, 0])
                unsteered_B = self._predict(x_BTD, logits_BH[None] > 0)[0]
                masks_SBH = self._masks(rows, x_BTD[:, 0], logits_BH, truth_B, unsteered_B)
                hits_SB = (self._predict(x_BTD, masks_SBH) == truth_B).cpu().numpy()
                for row, hits, mask in zip(rows, hits_SB, masks_SBH.cpu().numpy(), strict=True):
                    out[row].hits[window], out[row].last[window] = hits, mask
                    out[row].all[window, self.last] = mask
                    for block, kept in before.items():
                        out[row].all[window, block] = kept.cpu().numpy()
                done = window.stop
                progress(len(images))
        return out

    def _masks(
        self, rows: list[Row], cls_BD: Tensor, logits_BH: Tensor, truth_B: Tensor, unsteered_B: Tensor
    ) -> Tensor:
        """Last-block masks, bool (S, B, H). The policy is linear, so an edit shifts its logits by edit @ weight."""
        weight_HD = self.policy.weight[self.policy.blocks.index(self.last)]
        unit: dict[tuple[str, str, str], Tensor] = {}
        masks = []
        for row in rows:
            key = row.strategy, row.labels, row.sae
            classes_B = truth_B if row.labels == "oracle" else unsteered_B
            if row.strategy == "none":
                shift = torch.zeros_like(logits_BH)
            elif row.strategy == "reconstruct":
                shift = self.policy.logits(self.last, self.steered[row.sae].sae(cls_BD)) - logits_BH
            elif row.strategy == "logit-bias":
                shift = row.strength * self.shift_CH[classes_B]
            else:
                if key not in unit:
                    one = self.steered[row.sae]
                    unit[key] = unit_edit(row.strategy, one.sae, cls_BD, classes_B, one.found) @ weight_HD.T
                shift = (row.strength - 1) * unit[key]
            masks.append(logits_BH + shift > 0)
        return torch.stack(masks)

    def _predict(self, x_BTD: Tensor, masks_SBH: Tensor) -> Tensor:
        """Predicted classes (S, B) under each mask of the last block; equal masks of an image run once."""
        S, B, H = masks_SBH.shape
        images = torch.arange(B, device=x_BTD.device).repeat(S)[:, None]
        pairs, inverse = torch.unique(torch.cat([images, masks_SBH.reshape(S * B, H)], 1), dim=0, return_inverse=True)
        predicted = []
        for part in pairs.split(self.batch_size):
            keep = _Last(self.last, part[:, 1:].bool())
            x, _ = self.backbone.run_blocks(x_BTD[part[:, 0]], self.last, self.last + 1, keep, "gathered")
            predicted.append(self.backbone.classify(x).argmax(dim=1))
        return torch.cat(predicted)[inverse].reshape(S, B)

    @torch.no_grad()
    def whole(self, split: Split) -> np.ndarray:
        """Whether the unpruned model is right, bool (n,)."""
        batches = split.batches(self.backbone.preprocess, self.batch_size, torch.get_num_threads())
        logits = [self.backbone(self.backbone.normalize(pixels)).argmax(dim=1).cpu().numpy() for pixels in batches]
        return np.concatenate(logits) == split.labels

    @torch.no_grad()
    def gathered_against_masked(self, split: Split) -> dict[str, float]:
        """Largest difference of class logits between the two ways of pruning, over a split."""
        largest, same, scale = 0.0, True, 0.0
        for pixels in split.batches(self.backbone.preprocess, self.batch_size, torch.get_num_threads()):
            images = self.backbone.normalize(pixels)
            masked = self.backbone(images, policy=self.policy, heads="masked")
            gathered = self.backbone(images, policy=self.policy, heads="gathered")
            largest = max(largest, float((masked - gathered).abs().max()))
            scale = max(scale, float(masked.abs().max()))
            same &= bool((masked.argmax(dim=1) == gathered.argmax(dim=1)).all())
        return {"max_abs_logit_difference": largest, "max_abs_logit": scale, "same_predictions": same}

    @torch.no_grad()
    def fvu(self, one: Steered, split: Split) -> float:
        """FVU of an SAE on the class tokens that reach the last block when the policy prunes the others."""
        x = torch.cat([x_BTD[:, 0] for _, x_BTD, _ in self.prefixes(split)])
        error = (x - one.sae(x)).double().square().sum()
        return float(error / (x - x.double().mean(dim=0)).double().square().sum())


@dataclass
class _Last:
    """Given masks for the last block, as a policy."""

    block: int
    mask_BH: Tensor

    def decide(self, block: int, cls_BD: Tensor) -> Tensor:
        assert block == self.block
        return self.mask_BH


@torch.no_grad()
def class_shift(backbone: Backbone, policy: HeadPolicy, split: Split, n_classes: int, batch_size: int) -> Tensor:
    """Mean last-block head logits of a class minus the mean over classes, on labelled images; (C, H).

    The direction of the SAE-free control ``logit-bias``: what sets the class apart, amplified in logit
    space, where ``class-latents`` amplifies it in latent space.
    """
    last, done = backbone.n_blocks - 1, 0
    total_CH = torch.zeros(n_classes, backbone.n_heads, dtype=torch.float64, device=backbone.device)
    for pixels in split.batches(backbone.preprocess, batch_size, torch.get_num_threads()):
        tokens = backbone.tokens(backbone.normalize(pixels))
        x_BTD, _ = backbone.run_blocks(tokens, 0, last, policy, "gathered")
        labels = torch.from_numpy(split.labels[done : done + len(pixels)]).long().to(backbone.device)
        onehot_BC = torch.nn.functional.one_hot(labels, n_classes).double()
        total_CH += onehot_BC.T @ policy.logits(last, x_BTD[:, 0]).double()
        done += len(pixels)
    count = torch.from_numpy(np.bincount(split.labels, minlength=n_classes)).to(backbone.device)
    mean_CH = total_CH / count[:, None]
    return (mean_CH - mean_CH.mean(dim=0)).float()


def _describe(
    row: Row, outcomes: dict[Row, Outcome], backbone: Backbone, rows: np.ndarray | None = None
) -> dict[str, Any]:
    """One row of a table, over all images or over ``rows``."""
    outcome, reference = outcomes[row], outcomes[NONE]
    rows = np.arange(len(outcome.hits)) if rows is None else rows
    kept = outcome.all[rows].sum(axis=(1, 2))
    return {
        **row._asdict(),
        **wilson(outcome.hits[rows]),
        **paired(outcome.hits[rows], reference.hits[rows]),
        "usage_last": float(outcome.last[rows].mean()),
        "usage_all": float(outcome.all[rows].mean()),
        "macs": float(backbone.macs(float(kept.mean())) + backbone.macs_outside_attention),
        "distinct_masks_last": len(np.unique(outcome.last[rows], axis=0)),
    }


def _write_classes(
    outcomes: dict[Row, Outcome], split: Split, classes: list[str], backbone: Backbone, work: Work
) -> None:
    """``per_class.parquet``, and ``per_head.parquet``, whose usages are those of the one head."""
    per_class, per_head = [], []
    for row, outcome in outcomes.items():
        for c, class_name in enumerate(classes):
            rows = np.flatnonzero(split.labels == c)
            if len(rows) == 0:
                continue  # an official split need not have every class
            line = {"class": c, "class_name": class_name, **_describe(row, outcomes, backbone, rows)}
            per_class.append(line)
            for head in range(backbone.n_heads):
                own = {"usage_last": outcome.last[rows, head].mean(), "usage_all": outcome.all[rows, :, head].mean()}
                per_head.append({"head": head, **line, **{name: float(value) for name, value in own.items()}})
    tables.write(work.out / "per_class.parquet", per_class)
    tables.write(work.out / "per_head.parquet", per_head)
