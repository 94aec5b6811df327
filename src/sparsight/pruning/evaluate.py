"""What steering does to the head policy: accuracy and head usage per strategy, beside controls.

Routing is policy-only: the steered class token decides which heads of the last block are kept; the block itself
runs on the unsteered residual stream. So a strategy acts through its masks alone. The one exception,
``class-latents-in-stream``, is run through the block row by row.

Val chooses everything (strengths, numbers of latents, targets, frontiers, classes), test is looked at once.

Shapes: N images, D width (d_in), L blocks, H heads, C classes.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from sparsight import config, tables
from sparsight.attention import HeadMode
from sparsight.backbones import Backbone
from sparsight.errors import SparsightError
from sparsight.images import Manifest, Split
from sparsight.progress import say
from sparsight.pruning import classes, controls, frontiers, probe
from sparsight.pruning.dictionary import Dictionary, scramble
from sparsight.pruning.headwise import unpack
from sparsight.pruning.last_block import Arrival, arrive
from sparsight.pruning.outcomes import Outcome, Point, choose, frontier, pick_targets, points, run
from sparsight.pruning.policy import HeadPolicy
from sparsight.pruning.strategies import LABELS, NONE, Row, Strategies, every_row
from sparsight.pruning.tables import Costs, by_class, describe
from sparsight.sae.base import SAE
from sparsight.sae.base import load as load_sae
from sparsight.seeds import derive_seed
from sparsight.statistics import paired, wilson
from sparsight.steering import latents
from sparsight.steering.latents import ClassLatents
from sparsight.work import Work, write_json


@dataclass(frozen=True)
class Steered:
    """An SAE with what steering found on train."""

    name: str
    sae: SAE
    found: ClassLatents

    @classmethod
    def load(cls, sae_folder: Path, vectors: Path, device: torch.device) -> "Steered":
        """From the folder of the SAE and the safetensors file of its steering result."""
        return cls(sae_folder.name, load_sae(sae_folder).to(device), ClassLatents.load(vectors, device))


def evaluate(
    section: config.Pruning, backbone: Backbone, policy: HeadPolicy, steered: list[Steered], manifest: Manifest,
    seed: int, work: Work, at_once: int, record: dict[str, Any],
) -> None:  # fmt: skip
    """Write the tables of docs/pruning.md, ``head_latents.safetensors`` and ``metrics.json`` to ``work.out``.

    Args:
        at_once: passes of the last block that run side by side; no result depends on it.

    Raises:
        SparsightError: a policy or an SAE for another model.
    """
    policy.check(backbone)
    for one in steered:
        _check_site(one.sae, backbone)
    whole, backbone = backbone, policy.own(backbone)
    names = manifest.classes
    train, val, test = (
        arrive(backbone, policy, manifest.split(part), section.batch_size, at_once) for part in ("train", "val", "test")
    )
    linear = probe.fit(train.cls_ND, train.labels, len(names))
    strategies = _strategies(section, policy, steered, train, _routes(linear, train), len(names), seed)
    on_val, targets, groups, chosen, lines = _choices(section, strategies, val, _routes(linear, val))
    routes = _routes(linear, test)
    seen = itertools.chain(chosen.values(), *lines.values())
    wanted = {row for point in seen for row in point.rows}
    on_test = dict(run(strategies, [row for row in on_val if row in wanted], test, routes))
    per_class = classes.configurations(on_val, val, len(names), section.tolerance)
    own = classes.evaluate(strategies, per_class, test, on_test[NONE], routes, names, section, seed)
    costs = Costs.of(backbone, strategies, len(names))
    rows = {row: on_test[row] for point in chosen.values() for row in point.rows}
    overall = [describe(row, rows, test, costs, section.margin) for row in rows]
    class_rows, head_rows = by_class(rows, test, names, costs, section.margin)
    written = {
        "overall": overall,
        "per_class": class_rows,
        "per_head": head_rows,
        "validation": [describe(row, on_val, val, costs, section.margin) for row in on_val],
        "targets": targets,
        "frontier": frontiers.table(groups, lines, chosen, {"val": on_val, "test": on_test}, seed),
        "class_subsets": own.subsets,
        "false_positives": own.false_positives,
    }
    for name, table in written.items():
        tables.write(work.out / f"{name}.parquet", table)
    pushes = {name: one.push_HF.contiguous() for name, one in strategies.dictionaries.items()}
    save_file(pushes, work.out / "head_latents.safetensors")
    unpruned, difference = _other_ways(whole, backbone, policy, manifest.split("test"), section.batch_size)
    metrics = {
        "format_version": 1,
        "unpruned": wilson(unpruned),
        "policy": {**overall[0], "minus_unpruned": paired(on_test[NONE].hits, unpruned)},
        **_masks(test, on_test[NONE]),
        "gathered_against_masked": difference,
        "label_accuracy": {name: float((routes[name] == test.labels).mean()) for name in LABELS},
        "chosen_on_val": [frontiers.named(point) for point in chosen.values()],
        "matched_usage": frontiers.matched(chosen, lines, on_test, seed),
        "against_none": frontiers.against_none(chosen, on_test, section.margin, seed),
        "selected_classes": own.deployed,
        "fvu_on_pruned_stream": {name: _fvu(one.sae, test) for name, one in strategies.dictionaries.items()},
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


def _routes(linear: probe.Probe, arrival: Arrival) -> dict[str, np.ndarray]:
    """The class of each image by kind of label, (N,)."""
    unsteered = arrival.predict(arrival.unsteered[None])[0]
    return {"predicted": unsteered, "probe": linear(arrival.cls_ND), "oracle": arrival.labels.astype(np.int64)}


def _strategies(
    section: config.Pruning, policy: HeadPolicy, steered: list[Steered], train: Arrival,
    routes: dict[str, np.ndarray], n_classes: int, seed: int,
) -> Strategies:  # fmt: skip
    """Fit everything that decides masks."""
    device = train.cls_ND.device
    weight_HD = policy.weight[-1]
    count_C = torch.from_numpy(np.bincount(train.labels, minlength=n_classes)).to(device)

    def dictionary(sae: SAE, mean_CF: torch.Tensor, *about: str) -> Dictionary:
        drawn = derive_seed(seed, "random-latents", *about)
        return Dictionary(sae, weight_HD, mean_CF, count_C, section.latents[-1], drawn)

    dictionaries, scrambled = {}, {}
    for one in steered:
        dictionaries[one.name] = dictionary(one.sae, one.found.mean_activation, one.name)
        random = scramble(one.sae, derive_seed(seed, "random-sae", one.name))
        found = latents.find(random, train.cls_ND.cpu().numpy(), train.labels, n_classes, 1, seed)
        scrambled[one.name] = dictionary(random, found.mean_activation, one.name, "random-sae")
    return Strategies(policy, dictionaries, scrambled, controls.fit(train, routes, n_classes))


class _Choices(NamedTuple):
    """What val decides."""

    outcomes: dict[Row, Outcome]
    targets: list[dict[str, Any]]
    """Every head and latent that was tried as a target."""
    groups: dict[tuple[str, str], list[Point]]
    """By (strategy, labels)."""
    chosen: dict[tuple[str, str], Point]
    lines: dict[tuple[str, str], list[Point]]
    """The frontiers."""


def _choices(
    section: config.Pruning, strategies: Strategies, val: Arrival, routes: dict[str, np.ndarray]
) -> _Choices:  # fmt: skip
    every = every_row(section, val.n_heads, strategies.dictionaries)
    none = dict(run(strategies, [NONE], val, routes))[NONE]
    outcomes, tried = pick_targets(run(strategies, every, val, routes), none, section.tolerance)
    place = {row._replace(target=-1): i for i, row in enumerate(every)}
    outcomes = dict(sorted(outcomes.items(), key=lambda item: place[item[0]._replace(target=-1)]))
    targets = [{**row._asdict(), "accuracy": hits, "usage_last": usage} for row, hits, usage in tried]
    groups = points(outcomes)
    chosen = {key: choose(group, outcomes, section.tolerance) for key, group in groups.items()}
    return _Choices(
        outcomes, targets, groups, chosen, {key: frontier(group, outcomes) for key, group in groups.items()}
    )


def _masks(test: Arrival, none: Outcome) -> dict[str, Any]:
    """How many masks the unsteered policy uses."""
    in_all = np.concatenate([test.before.reshape(len(test), -1), unpack(none.codes, test.n_heads)], axis=1)
    distinct = len(np.unique(in_all, axis=0))
    return {
        "distinct_masks_last": len(np.unique(none.codes)),
        "distinct_masks_all": distinct,
        "static_policy": distinct == 1,
        "tabulated_masks": 2**test.n_heads if test.tabulated else 0,
    }


@torch.no_grad()
def _other_ways(
    whole: Backbone, backbone: Backbone, policy: HeadPolicy, split: Split, batch_size: int
) -> tuple[np.ndarray, dict[str, Any]]:
    """The model without pruning, and pruned by masking, beside pruned by gathering.

    Args:
        whole: the model without pruning.
        backbone: the one that the policy prunes; the same but for fine-tuned weights.

    Returns:
        Whether the former is right, bool (N,); the largest difference of class logits between the two ways of pruning.
    """
    first, L = policy.blocks[0], backbone.n_blocks
    hits, largest, same, scale = [], 0.0, True, 0.0
    labels = iter(np.split(split.labels, range(batch_size, len(split), batch_size)))

    def pruned(x_BTD: Tensor, heads: HeadMode) -> Tensor:
        return backbone.classify(backbone.run_blocks(x_BTD, first, L, policy, heads)[0])

    for pixels in split.batches(backbone.preprocess, batch_size, torch.get_num_threads()):
        images = backbone.normalize(pixels)
        x_BTD, _ = backbone.run_blocks(backbone.tokens(images), 0, first)  # once: nothing is decided there
        masked, gathered = pruned(x_BTD, "masked"), pruned(x_BTD, "gathered")
        largest = max(largest, float((masked - gathered).abs().max()))
        scale = max(scale, float(masked.abs().max()))
        same &= bool((masked.argmax(dim=1) == gathered.argmax(dim=1)).all())
        logits = whole(images) if policy.finetuned else whole.classify(whole.run_blocks(x_BTD, first, L)[0])
        hits.append(logits.argmax(dim=1).cpu().numpy() == next(labels))
    difference = {"max_abs_logit_difference": largest, "max_abs_logit": scale, "same_predictions": same}
    return np.concatenate(hits), difference


@torch.no_grad()
def _fvu(sae: SAE, arrival: Arrival) -> float:
    """FVU of an SAE on the class tokens that reach the last block when the policy prunes the others."""
    x = arrival.cls_ND
    error = (x - sae(x)).double().square().sum()
    return float(error / (x - x.double().mean(dim=0)).double().square().sum())
