"""The headline numbers of a run, under flat keys."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from sparsight.common import tables
from sparsight.common.files import write_json
from sparsight.images.manifest import Manifest

_OF_SAES = (
    "fvu", "fvu_pca_k", "l0", "dead_train", "dense_test", "bits", "bits_pca", "monosemanticity", "nearest_duplicates",
    "other_expert_duplicates", "macs_encode", "probing_sae_5", "probing_random_5", "probing_neurons_5",
    "monosemanticity_judge", "accuracy_spliced", "kl_spliced", "kl_mean_instead", "kl_recovered",
)  # fmt: skip
_WAYS = ("forced", "unchained", "online", "mean_instead")


def write_metrics(inputs: dict[str, Any], path: Path) -> None:
    """Write ``metrics.json``: test-split numbers under flat keys ``<stage>.<name>...``.

    Args:
        inputs: ``images`` (the manifest), ``backbones`` (config.json), ``saes``, ``chains`` and ``policies``
            (metrics.json), ``stabilities`` and ``transfers`` (JSON), ``steerings``, ``disentanglings``,
            ``localisations``, ``attributions`` and ``spurious`` (Parquet).
    """
    about = Manifest(inputs["images"]).about
    flat: dict[str, float] = {f"images.{key}": len(about[key]) for key in ("duplicates", "label_conflicts")}
    for file in inputs["backbones"]:
        metadata = json.loads(file.read_text())
        if "test" in metadata["accuracy"]:
            flat[f"backbone.{file.parent.name}.accuracy"] = metadata["accuracy"]["test"]["accuracy"]
    for file in inputs["saes"]:
        metrics = json.loads(file.read_text())
        for key in _OF_SAES:
            if key in metrics:
                flat[f"sae.{file.parent.name}.{key}"] = metrics[key]
    for file in inputs["chains"]:
        metrics = json.loads(file.read_text())
        shown = [f"redundancy{kind}" for kind in ("", "_transported", "_random")]
        shown += ["fvu", "fvu_unchained", "fvu_residual", "fvu_affine", "probing_sae_1", "probing_sae_5"]
        shown += ["accuracy_untouched", *(f"{key}_{mode}" for mode in _WAYS for key in ("accuracy", "kl"))]
        flat |= {f"chain.{file.parent.name}.{key}": metrics[key] for key in shown if key in metrics}
    for file in inputs["stabilities"]:
        for site, stability in json.loads(file.read_text())["sites"].items():
            flat |= {f"{file.stem}.{site}.{key}": stability[key] for key in ("cosine", "cosine_random")}
    for file in inputs["steerings"]:
        chosen = json.loads(file.with_suffix(".json").read_text())["chosen_on_val"]
        for row in tables.read(file):
            if row["split"] == "test":
                several = "" if chosen else f".strength-{row['strength']:g}"
                flat |= _steered(f"steering.{file.stem}.{row['method']}.{row['labels']}{several}", row)
        flat |= _gate(f"steering.{file.stem}", file.with_suffix(".json"))
    for file in inputs["transfers"]:
        name = f"steering.{file.parent.name}.{file.stem}"
        for row in tables.read(file.with_suffix(".parquet")):
            flat |= _steered(f"{name}.{row['method']}.{row['labels']}", row)
        flat |= _gate(name, file)
    for file in inputs["disentanglings"]:
        flat |= _disentangled(file)
    for file in inputs["localisations"]:
        for sae, numbers in json.loads(file.with_suffix(".json").read_text())["saes"].items():
            flat |= {f"localisation.{sae}.{key}": value for key, value in numbers.items()}
    for file in inputs["attributions"]:
        flat |= _attributed(file)
    for file in inputs["spurious"]:
        flat |= _spurious(file)
    for file in inputs["policies"]:
        policy = file.parent.name
        flat[f"pruning.{policy}.unpruned.accuracy"] = json.loads(file.read_text())["unpruned"]["accuracy"]
        for (strategy, labels), rows in by_strategy(tables.read(file.with_name("overall.parquet"))).items():
            for column in ("accuracy", "usage_last", "usage_all"):
                flat[f"pruning.{policy}.{strategy}.{labels}.{column}"] = float(np.mean([row[column] for row in rows]))
    write_json(path, flat)


def write_curves(saes: list[Path], path: Path) -> None:
    """Write ``curves.json``: one entry per logged step of every SAE, for ``dvc plots``.

    Args:
        saes: metrics.json of every SAE, beside its training.jsonl.
    """
    lines = []
    for file in saes:
        for line in map(json.loads, file.with_name("training.jsonl").read_text().splitlines()):
            lines.append({"sae": file.parent.name, "epoch": line["epoch"], "fvu": line["fvu"]})
    write_json(path, lines)


def _steered(name: str, row: dict[str, Any]) -> dict[str, float]:
    """Accuracy on test; if it is unknown, the effects."""
    keys = ("accuracy",) if row["accuracy"] is not None else ("changed", "kl", "cosine")
    return {f"{name}.{key}": row[key] for key in keys if row[key] is not None}


def _disentangled(file: Path) -> dict[str, float]:
    """Cause, isolate and score of every interchange, and absorption; what belongs to a seed has it in its name."""
    flat: dict[str, float] = {}
    for row in tables.read(file):
        name = f"disentangling.{_with_seed(file.stem, row['sae'])}.{row['attribute']}.{row['method']}.{row['features']}"
        flat |= {f"{name}.{key}": row[key] for key in ("cause", "isolate", "score")}
    for row in tables.read(file.with_name(f"{file.stem}-absorption.parquet")):
        if row["value"] is None:
            name = f"disentangling.{_with_seed(file.stem, row['sae'])}.{row['attribute']}.{row['method']}"
            flat[f"{name}.absorption"] = row["rate"]
    return flat


def _attributed(file: Path) -> dict[str, float]:
    """Areas under the curves and the agreement of both estimates, by SAE."""
    of_saes = json.loads(file.with_suffix(".json").read_text())["saes"]
    return {
        f"attribution.{_with_seed(file.stem, sae)}.{key}": value
        for sae, flat in of_saes.items()
        for key, value in flat.items()
        if key.startswith(("deletion", "insertion", "gradient_ablation")) and not key.endswith(("_lo", "_hi"))
    }


def _spurious(file: Path) -> dict[str, float]:
    """Accuracy in the worst group and in all images, by method; what belongs to a seed has it in its name."""
    return {
        f"spurious.{_with_seed(file.stem, row['sae'])}.{row['method']}.{key}": row[key]
        for row in tables.read(file)
        for key in ("worst", "mean")
    }


def _with_seed(name: str, sae: str | None) -> str:
    return name if sae is None else f"{name}-s{sae.rpartition('-s')[2]}"


def _gate(name: str, summary: Path) -> dict[str, float]:
    """By quantile of the gate, if any, the share of steered images and, if val chose a strength, accuracy on test."""
    lines = [line for line in json.loads(summary.read_text())["gate"] if line["split"] == "test"]
    chosen = any(line["chosen"] for line in lines)
    return {
        f"{name}.gate-{line['quantile']:g}.{key}": line[key]
        for line in lines
        for key in ("accuracy", "steered")
        if line[key] is not None and (chosen or key == "steered")
    }


def by_strategy(rows: list[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """The rows of ``overall.parquet`` by (strategy, labels); each group has one row per SAE, to be averaged."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["strategy"], row["labels"]), []).append(row)
    return groups
