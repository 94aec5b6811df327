"""The effect of steering on the head policy: accuracy and head usage per strategy, beside controls.

The policy reads the class token, or in a model without one the mean over the patches. Routing is policy-only: this
activation, steered, decides which heads of the last block are kept, and the block runs on the unsteered residual
stream. So a strategy acts through its masks alone. The one exception is ``class-latents-in-stream``, which also edits
the stream; it runs the block once per row.

Everything is chosen on val: strengths, numbers of latents, targets, frontiers, classes. Test is evaluated once.

Shapes: N images, D width (d_in), L blocks, H heads, C classes.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from sparsight import config
from sparsight.backbones.attention import HeadMode
from sparsight.backbones.backbone import Backbone
from sparsight.common import tables
from sparsight.common.errors import SparsightError
from sparsight.common.files import write_json
from sparsight.common.intervals import paired, wilson
from sparsight.common.progress import followed, log
from sparsight.common.seeds import derive_seed
from sparsight.common.work import Work
from sparsight.images.labels import need_labels, needs
from sparsight.images.manifest import Manifest
from sparsight.images.split import Split
from sparsight.pruning import comparisons, controls, image_table, linear_probe, per_class
from sparsight.pruning.last_block import LastBlockInputs, last_block_inputs
from sparsight.pruning.latent_effects import LatentEffects, scramble
from sparsight.pruning.masks import unpack
from sparsight.pruning.outcomes import Outcome, run
from sparsight.pruning.policy import HeadPolicy
from sparsight.pruning.rows import Costs, by_class, describe
from sparsight.pruning.selection import Point, choose, frontier, pick_targets, points
from sparsight.pruning.strategies import LABELS, NONE, Row, Strategies, every_row
from sparsight.sae.base import SAE
from sparsight.steering import class_latents


def evaluate(
    section: config.Pruning, backbone: Backbone, policy: HeadPolicy, saes: Mapping[str, SAE], manifest: Manifest,
    seed: int, work: Work, n_parallel: int, record: dict[str, Any],
) -> None:  # fmt: skip
    """Write the tables of docs/pruning.md, two files of tensors and ``metrics.json`` to ``work.out``.

    The tensors are W_head W_dec of each SAE, ``head_latents.safetensors``, and ``test_images.safetensors``
    (:mod:`sparsight.pruning.image_table`).

    Args:
        saes: SAEs of what the policy reads at the last block's input, by name.
        n_parallel: passes of the last block that run at the same time; no result depends on it.

    Raises:
        SparsightError: images without labels, a policy or an SAE for another model.
    """
    need_labels(manifest, needs("pruning", section))
    policy.check(backbone)
    for sae in saes.values():
        _check_site(sae, backbone)
    whole, backbone = backbone, policy.own(backbone)
    names = manifest.classes
    train, val, test = (
        last_block_inputs(backbone, policy, manifest.split(part), section.batch_size, n_parallel)
        for part in ("train", "val", "test")
    )
    probe = linear_probe.fit(train.read_ND, train.labels, len(names))
    strategies = _strategies(section, policy, saes, train, _routes(probe, train), len(names), seed)
    on_val, targets, groups, chosen, frontiers = _choices(section, strategies, val, _routes(probe, val))
    routes = _routes(probe, test)
    used_points = itertools.chain(chosen.values(), *frontiers.values())
    wanted = {row for point in used_points for row in point.rows}
    on_test = dict(_run(strategies, [row for row in on_val if row in wanted], test, routes))
    configurations = per_class.configurations(on_val, val, len(names), section.tolerance)
    class_tables = per_class.evaluate(strategies, configurations, test, on_test[NONE], routes, names, section, seed)
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
        "frontier": comparisons.table(groups, frontiers, chosen, {"val": on_val, "test": on_test}, seed),
        "class_subsets": class_tables.subsets,
        "false_positives": class_tables.false_positives,
    }
    for name, table in written.items():
        tables.write(work.out / f"{name}.parquet", table)
    pushes = {name: effects.push_HF.contiguous() for name, effects in strategies.effects_by_sae.items()}
    save_file(pushes, work.out / "head_latents.safetensors")
    image_table.write(test, strategies.effects_by_sae, work.out / "test_images.safetensors")
    unpruned, difference = _other_ways(whole, backbone, policy, manifest.split("test"), section.batch_size)
    metrics = {
        "format_version": 1,
        "unpruned": wilson(unpruned),
        "policy": {**overall[0], "minus_unpruned": paired(on_test[NONE].hits, unpruned)},
        **_masks(test, on_test[NONE]),
        "gathered_against_masked": difference,
        "label_accuracy": {name: float((routes[name] == test.labels).mean()) for name in LABELS},
        "chosen_on_val": [comparisons.named(point) for point in chosen.values()],
        "matched_usage": comparisons.matched(chosen, frontiers, on_test, seed),
        "against_none": comparisons.against_none(chosen, on_test, section.margin, seed),
        "selected_classes": class_tables.deployed,
        "fvu_on_pruned_stream": {name: _fvu(effects.sae, test) for name, effects in strategies.effects_by_sae.items()},
        "record": record,
    }
    write_json(work.out / "metrics.json", metrics)
    for line in overall:
        log(
            f"{line['strategy']} x{line['strength']:g} ({line['labels']} labels, {line['sae'] or 'no SAE'}): "
            f"accuracy {line['accuracy']:.4f}, usage last {line['usage_last']:.3f}, all {line['usage_all']:.3f}"
        )


def _check_site(sae: SAE, backbone: Backbone) -> None:
    read = sae.about["site"], sae.about["tokens"]
    wanted = f"blocks.{backbone.n_blocks - 1}.input", backbone.policy_tokens
    if read != wanted:
        raise SparsightError(
            "pruning: the SAE reads {}, tokens {}; heads are steered at {}, tokens {}".format(*read, *wanted)
        )


def _routes(linear: linear_probe.LinearProbe, inputs: LastBlockInputs) -> dict[str, np.ndarray]:
    """The class of each image, (N,), by kind of label."""
    unsteered = inputs.predict(inputs.unsteered[None])[0]
    return {"predicted": unsteered, "probe": linear(inputs.read_ND), "oracle": inputs.labels.astype(np.int64)}


def _strategies(
    section: config.Pruning, policy: HeadPolicy, saes: Mapping[str, SAE], train: LastBlockInputs,
    routes: dict[str, np.ndarray], n_classes: int, seed: int,
) -> Strategies:  # fmt: skip
    """Fit everything that decides masks, on what the policy reads of train in the pruned model."""
    x_ND, n_latents = train.read_ND.cpu().numpy(), section.latents[-1]

    def effects(sae: SAE, *about: str) -> LatentEffects:
        drawn = derive_seed(seed, "random-latents", *about)
        found = class_latents.find(sae, x_ND, train.labels, n_classes, n_latents, drawn)
        return LatentEffects(sae, policy.weight[-1], found)

    effects_by_sae, scrambled = {}, {}
    for name, sae in saes.items():
        effects_by_sae[name] = effects(sae, name)
        scrambled[name] = effects(scramble(sae, derive_seed(seed, "random-sae", name)), name, "random-sae")
    return Strategies(policy, effects_by_sae, scrambled, controls.fit(train, routes, n_classes))


class _Choices(NamedTuple):
    """Choices made on val, by (strategy, labels)."""

    outcomes: dict[Row, Outcome]
    """Outcomes on val of every row, with the chosen targets only."""
    targets: list[dict[str, Any]]
    """Every head and latent that was tried as a target."""
    groups: dict[tuple[str, str], list[Point]]
    """All points."""
    chosen: dict[tuple[str, str], Point]
    """The chosen points."""
    lines: dict[tuple[str, str], list[Point]]
    """The frontiers."""


def _choices(
    section: config.Pruning, strategies: Strategies, val: LastBlockInputs, routes: dict[str, np.ndarray]
) -> _Choices:  # fmt: skip
    candidates = every_row(section, val.n_heads, strategies.effects_by_sae)
    none = dict(run(strategies, [NONE], val, routes))[NONE]
    outcomes, tried = pick_targets(_run(strategies, candidates, val, routes), none, section.tolerance)
    place = {row._replace(target=-1): i for i, row in enumerate(candidates)}
    outcomes = dict(sorted(outcomes.items(), key=lambda item: place[item[0]._replace(target=-1)]))
    targets = [{**row._asdict(), "accuracy": hits, "usage_last": usage} for row, hits, usage in tried]
    groups = points(outcomes)
    chosen = {key: choose(group, outcomes, section.tolerance) for key, group in groups.items()}
    return _Choices(
        outcomes, targets, groups, chosen, {key: frontier(group, outcomes) for key, group in groups.items()}
    )


def _run(
    strategies: Strategies, rows: list[Row], inputs: LastBlockInputs, routes: dict[str, np.ndarray]
) -> Iterator[tuple[Row, Outcome]]:
    return followed(run(strategies, rows, inputs, routes), len(rows), "strategies")


def _masks(test: LastBlockInputs, none: Outcome) -> dict[str, Any]:
    """Numbers of distinct masks of the unsteered policy."""
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
    """The model without pruning, and the difference between pruning by masking and by gathering.

    Args:
        whole: the model without pruning.
        backbone: the model that the policy prunes. It differs from ``whole`` only if weights were fine-tuned.

    Returns:
        Whether the unpruned model is correct, bool (N,), and the difference of class logits between the two ways.
    """
    first, L = policy.blocks[0], backbone.n_blocks
    hits, largest, same, scale = [], 0.0, True, 0.0
    labels = iter(np.split(split.labels, range(batch_size, len(split), batch_size)))

    def pruned(x_BTD: Tensor, heads: HeadMode) -> Tensor:
        return backbone.classify(backbone.run_blocks(x_BTD, first, L, policy, heads)[0])

    batches = split.batches(backbone.preprocess, batch_size, backbone.decoding_threads)
    for pixels in followed(batches, math.ceil(len(split) / batch_size), "batches"):
        images = backbone.normalize(pixels)
        x_BTD, _ = backbone.run_blocks(backbone.tokens(images), 0, first)  # once for all: no head is decided there
        masked, gathered = pruned(x_BTD, "masked"), pruned(x_BTD, "gathered")
        largest = max(largest, float((masked - gathered).abs().max()))
        scale = max(scale, float(masked.abs().max()))
        same &= bool((masked.argmax(dim=1) == gathered.argmax(dim=1)).all())
        logits = whole(images) if policy.finetuned else whole.classify(whole.run_blocks(x_BTD, first, L)[0])
        hits.append(logits.argmax(dim=1).cpu().numpy() == next(labels))
    difference = {"max_abs_logit_difference": largest, "max_abs_logit": scale, "same_predictions": same}
    return np.concatenate(hits), difference


@torch.no_grad()
def _fvu(sae: SAE, inputs: LastBlockInputs) -> float:
    """FVU of an SAE on what the policy reads at the last block's input, when the policy prunes the earlier blocks."""
    x = inputs.read_ND
    error = (x - sae(x)).double().square().sum()
    return float(error / (x - x.double().mean(dim=0)).double().square().sum())
