"""Faithful? The error of the SAE beside that of other codes of the same sparsity, and of chains beside plain SAEs."""

import json
from pathlib import Path
from typing import Any

from sparsight.common.verdicts import Comparison, Interval, Measure, pooled, unpaired
from sparsight.report.cards.questions import MainSae, Question, counted, sections

FVU = Measure("unexplained variance", "points", 1, 100, lower_is_better=True)
ONLINE = Measure("accuracy with all sites replaced", "points", 1, 100)
CHAINED = Measure("unexplained variance of a chain", "points", 1, 100, lower_is_better=True)


def ask(sae: MainSae, chains: list[Path], n_test: int) -> Question:
    """FVU beside that of k principal components, k neurons, k-means and a random dictionary."""
    k = min(sae.about["k"], sae.about["d_in"])
    controls = {
        "fvu_pca_k": f"PCA ({counted(k, 'component')})",
        "fvu_neurons": f"neurons ({k} of them)",
        "fvu_kmeans": "k-means",
        "fvu_random": "a random dictionary",
    }
    own = "fvu" if sae.has("fvu") else "fvu_residual"  # of a chain
    n = counted(sae.metrics[0]["n"], "activation")
    groups = [
        [
            sae.against(
                FVU, (own, key), name, n, f"{sae.name} leaves {{}} of the variance unexplained, {name} leaves {{}}"
            )
            for key, name in controls.items()
            if sae.has(key)
        ],
        *_chains(chains, n_test),
    ]
    l0 = sae.mean("l0")
    unequal = [f"It uses {l0:.1f} latents at a time, PCA {k} components."] if abs(l0 - k) > 0.5 else []
    return Question("Faithful?", "saes", groups, unequal + _in_the_model(sae))


def _in_the_model(sae: MainSae) -> list[str]:
    """What replacing the activation by its reconstruction does to the model's predictions."""
    if sae.has("spliced_delta"):
        delta, low, high = (100 * sae.mean(f"spliced_delta{end}") for end in ("", "_lo", "_hi"))
        mean = 100 * (sae.mean("accuracy_mean_instead") - sae.mean("accuracy_untouched"))
        return [
            f"Its reconstruction in the model changes accuracy by {delta:+.1f} points ({low:.1f} to {high:.1f} over "
            f"images), the mean activation in its place by {mean:+.1f}."
        ]
    if sae.has("changed_spliced"):
        changed, mean = (100 * sae.mean(f"changed_{mode}") for mode in ("spliced", "mean_instead"))
        return [
            f"Its reconstruction in the model changes {changed:.1f} % of the predictions, the mean activation in its "
            f"place {mean:.1f} %."
        ]
    return []


def _chains(metrics: list[Path], n_test: int) -> list[list[Comparison]]:
    """Each chain with affine maps beside the one without maps over the same sites, if the run has it."""
    found = {}
    for name, folders in sections(path.parent for path in metrics).items():
        about = json.loads(next(folders[0].glob("*/config.json")).read_text())["training"]
        if about.get("control_of"):
            continue
        found[name] = about, [json.loads((folder / "metrics.json").read_text()) for folder in folders]
    groups = []
    for name, (about, seeds) in found.items():
        plain = [
            (other, of_other)
            for other, (settings, of_other) in found.items()
            if settings["affine"] == "zero" and all(settings[key] == about[key] for key in _ALIKE)
        ]
        if about["affine"] != "zero" and plain:
            other, of_other = plain[0]
            groups.append([_chained((name, seeds), (other, of_other), n_test)])
    return groups


_ALIKE = ("backbone", "sites", "tokens", "d_sae", "k")


def _chained(
    chain: tuple[str, list[dict[str, Any]]], plain: tuple[str, list[dict[str, Any]]], n_test: int
) -> Comparison:
    """Accuracy with every site replaced in one pass; without labels, the FVU of the reconstructions."""
    (name, seeds), (other, of_other) = chain, plain
    judged = all("online_delta" in metrics for metrics in (*seeds, *of_other))
    key, measure = ("accuracy_online", ONLINE) if judged else ("fvu", CHAINED)
    pairs = list(zip(seeds, of_other, strict=False))  # seed by seed, as far as both have them
    images = [unpaired(_online(one), _online(control)) for one, control in pairs] if judged else []
    found = pooled([one[key] - control[key] for one, control in pairs], images)
    value, control_value = (sum(m[key] for m in side) / len(pairs) for side in zip(*pairs, strict=True))
    says = (
        f"With all sites replaced in one pass, the chain {name} is right on {measure.level(value)} of the images, "
        f"plain SAEs ({other}) on {measure.level(control_value)}"
        if judged
        else f"The chain {name} leaves {measure.level(value)} of the variance unexplained, plain SAEs ({other}) leave "
        f"{measure.level(control_value)}"
    )
    n = f"{counted(n_test, 'image')}, {counted(len(pairs), 'seed')}"
    why = "" if found else "one seed says nothing about another; give both sections more seeds"
    return Comparison(name, f"plain SAEs ({other})", measure, value, control_value, found, n, says, why)


def _online(metrics: dict[str, Any]) -> Interval:
    """Accuracy minus that of the untouched model on the same images; its interval is narrower than the accuracy's."""
    return metrics["online_delta"], metrics["online_delta_lo"], metrics["online_delta_hi"]
