"""The verdicts of the report's first screen, computed again from a run's files, and compared with the page."""

import html
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from sparsight.common import tables

TITLES = [
    "Faithful?", "Sparse and alive?", "Interpretable?", "Stable?", "Does steering help?", "Does steering save heads?",
]  # fmt: skip


def p_of(seeds: list[float], images: list[tuple[float, ...]] | None = None) -> float | None:
    """Of the wider interval, by scipy: Student's t over seeds, or the mean interval over images as a normal one."""
    found = []
    if len(seeds) > 1 and np.ptp(seeds) > 1e-12:
        test = stats.ttest_1samp(seeds, 0)
        ends = test.confidence_interval()
        found.append((ends.high - ends.low, float(test.pvalue)))
    if images:
        delta, low, high = np.mean(images, axis=0)
        found.append((high - low, float(2 * stats.norm.sf(abs(delta) * 2 * stats.norm.ppf(0.975) / (high - low)))))
    return max(found)[1] if found else None


Expected = dict[tuple[str, str], tuple[float, float, float | None, bool]]
"""By card and control with its measure: both values, p, and whether less is better."""


def from_files(run: Path) -> Expected:
    """Every comparison of the first screen, from the tables and metrics of a run."""
    settings = json.loads((run / "configuration.json").read_text())
    steering = settings["pruning"]["steering"]
    name = settings["steering"][steering]["sae"]
    saes = sorted((run / "saes").glob(f"{name}-s?"))
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in saes]
    found: Expected = {}

    def of_metrics(card: str, control: str, key: str, other: str, less: bool, images: Any = None) -> None:
        values = [[m[one] for m in metrics] for one in (key, other)]
        p = p_of([a - b for a, b in zip(*values, strict=True)], images)
        found[card, control] = float(np.mean(values[0])), float(np.mean(values[1])), p, less

    k = json.loads((saes[0] / "config.json").read_text())["k"]
    for other, control in {"pca_k": f"PCA ({k} components)", "neurons": f"neurons ({k} of them)", "kmeans": "k-means",
                           "random": "a random dictionary"}.items():  # fmt: skip
        of_metrics(TITLES[0], f"{control} unexplained variance", "fvu", f"fvu_{other}", True)
    of_metrics(TITLES[1], "PCA (all components) bits per activation at equal error", "bits", "bits_pca", True)
    for other, control in {"kmeans": "k-means", "random": "a random dictionary", "neurons": "neurons"}.items():
        if f"monosemanticity_{other}" in metrics[0]:
            of_metrics(TITLES[2], f"{control} monosemanticity", "monosemanticity", f"monosemanticity_{other}", False)
    probed = [{(r["method"], r["features"]): r for r in tables.read(folder / "probing.parquet")} for folder in saes]
    for other, control in {"neurons": "neurons", "pca": "principal components", "random": "random features"}.items():
        images = []
        for rows in probed:
            one, its = rows["sae", 5], rows[other, 5]
            half = np.hypot(one["hi"] - one["lo"], its["hi"] - its["lo"]) / 2
            delta = one["accuracy"] - its["accuracy"]
            images.append((delta, delta - half, delta + half))
        control = f"five {control} accuracy of five features a class"
        of_metrics(TITLES[2], control, "probing_sae_5", f"probing_{other}_5", False, images)
    if (path := run / "saes" / f"{name}-stability.json").exists():
        ((_, row),) = json.loads(path.read_text())["sites"].items()
        ends = row["over_0.7_min"], row["over_0.7_max"]
        spread = np.var([*ends, 3 * row["over_0.7"] - sum(ends)], ddof=1)
        assert row["saes"] == 3, "then pairs correlated by 1/2 have a mean of 4/3 of their spread"
        t = (row["over_0.7"] - row["over_0.7_random"]) / np.sqrt(4 / 3 * spread)
        key = TITLES[3], "random dictionaries decoder rows with a partner in another seed"
        found[key] = row["over_0.7"], row["over_0.7_random"], float(2 * stats.t.sf(abs(t), 2)), False
    found |= {(TITLES[0], key): value for key, value in chains(run).items()}
    for section in settings["steering"]:
        found |= {(TITLES[4], key): value for key, value in steered(run, section, section == steering).items()}
    found |= {(TITLES[5], key): value for key, value in heads_kept(run / "pruning" / "heads").items()}
    return found


def chains(run: Path) -> dict[str, tuple[float, float, float | None, bool]]:
    """Chains of one seed with affine maps beside the plain SAEs of the run, if it has both."""
    folders = [path for path in (run / "saes").glob("*-s0") if not (path / "config.json").exists()]
    affine = {path: json.loads(next(path.glob("*/config.json")).read_text())["training"]["affine"] for path in folders}
    plain = next((json.loads((path / "metrics.json").read_text()) for path in folders if affine[path] == "zero"), None)
    found = {}
    for path in folders:
        if plain and affine[path] != "zero":
            m = json.loads((path / "metrics.json").read_text())
            delta = m["online_delta"] - plain["online_delta"]
            half = np.hypot(*(one["online_delta_hi"] - one["online_delta_lo"] for one in (m, plain))) / 2
            key = f"{path.name[:-3]}: plain SAEs (plain) accuracy with all sites replaced"
            p = p_of([delta], [(delta, delta - half, delta + half)])
            found[key] = m["accuracy_online"], plain["accuracy_online"], p, False
    return found


def steered(run: Path, section: str, main: bool) -> dict[str, tuple[float, float, float | None, bool]]:
    files = sorted((run / "steering").glob(f"{section}-s?.json"))
    summaries = [json.loads(path.read_text()) for path in files]
    tests = [
        {(r["method"], r["labels"]): r for r in tables.read(path.with_suffix(".parquet")) if r["split"] == "test"}
        for path in files
    ]
    first = summaries[0]["chosen_on_val"][0]
    labels = "none" if first["labels"] == "none" else "predicted"
    key, prefix = (first["method"], labels), "" if main else f"{section} (SAE {summaries[0]['sae']}): "
    pairs: dict[str, list[tuple[float, ...]]] = {
        "the unsteered model": [tuple(rows[key][f"delta{end}"] for end in ("", "_lo", "_hi")) for rows in tests]
    }
    for summary in summaries:
        for line in summary["against_controls"]:
            of_latents = line["control"].startswith(("vs2", "class-latents"))
            if (line["method"], line["labels"]) == key and not of_latents:
                pairs.setdefault(line["control"], []).append(tuple(line[f"delta{e}"] for e in ("", "_lo", "_hi")))
    found = {}
    for control, images in pairs.items():
        plain = ("none", "none") if control == "the unsteered model" else (control, labels)
        values = [float(np.mean([(r.get(of) or r[of[0], "none"])["accuracy"] for r in tests])) for of in (key, plain)]
        p = p_of([delta for delta, _, _ in images], images)
        found[f"{prefix}{control} accuracy when steered"] = values[0], values[1], p, False
    return found


def heads_kept(folder: Path) -> dict[str, tuple[float, float, float | None, bool]]:
    usage: dict[str, list[float]] = {}
    for row in tables.read(folder / "overall.parquet"):
        if row["labels"] == "probe" or row["strategy"] == "none":
            usage.setdefault(row["strategy"], []).append(row["usage_last"])
    controls = ["random-latents", "random-sae", "logit-bias", "logit-bias-matched", "class-threshold", "class-static"]
    own, found = usage["class-latents"], {}
    for control in ("none", *controls):
        if control in usage:
            shown = "the unsteered policy" if control == "none" else control
            p = p_of([a - b for a, b in zip(own, usage[control] * (len(own) // len(usage[control])), strict=True)])
            key = f"{shown} share of the last block's heads kept"
            found[key] = float(np.mean(own)), float(np.mean(usage[control])), p, True
    for row in json.loads((folder / "metrics.json").read_text())["matched_usage"]:
        if row["labels"] == "probe" and row["control"] in controls:
            interval = row["delta"], row["delta_lo"], row["delta_hi"]
            p = p_of([row["delta"]], [interval]) if abs(row["usage"] - row["usage_control"]) <= 0.01 else None
            found[f"{row['control']} accuracy at equal usage"] = row["accuracy"], row["accuracy_control"], p, False
    return found


def expected_verdicts(found: Expected) -> dict[tuple[str, str], str]:
    """With Holm's correction by hand: the smallest p times their number, the next times one less, never falling."""
    in_order = sorted((p, key) for key, (_, _, p, _) in found.items() if p is not None)
    verdicts, largest = dict.fromkeys(found, "no verdict"), 0.0
    for place, (p, key) in enumerate(in_order):
        largest, (value, other, _, less) = max(largest, p * (len(in_order) - place)), found[key]
        verdicts[key] = "not distinguishable" if largest > 0.05 else "better" if (value < other) == less else "worse"
    return verdicts


def on_the_page(page: str) -> dict[tuple[str, str], tuple[str, str, str]]:
    """Of every row of the cards' tables the values and the verdict, and each card's own verdict under its title."""
    found = {}
    for verdict, card in re.findall(r'<article data-verdict="(.*?)">(.*?)</article>', page, re.DOTALL):
        title = re.sub(r"<.*?>", "", re.findall(r"<h3>(.*?)</h3>", card)[0])
        rows = re.findall(r"<tr><th[^>]*scope=\"row\">(.*?)</th>(.*?)</tr>", card)
        for control, cells in rows:
            measure, value, other, _, *_, said = re.findall(r"<td.*?>(.*?)</td>", cells)
            found[title, html.unescape(f"{control} {measure}")] = value, other, said
        first = re.findall(r"<td class=\"text\">([^<]*)</td></tr>", card)
        assert not first or first[0] == verdict, "the first row is the card's"
    return found


def check_page(page: str, run: Path) -> set[str]:
    """Compare every row with the files; the verdicts that came up."""
    expected = from_files(run)
    verdicts, shown = expected_verdicts(expected), on_the_page(page)
    assert {key: said for key, (_, _, said) in shown.items()} == verdicts
    for key, (value, other, _) in shown.items():
        for text, number in zip((value, other), expected[key][:2], strict=True):
            scale, digits = (100 if "%" in text else 1), len(text.rstrip(" %").partition(".")[2])
            assert float(text.rstrip(" %")) == pytest.approx(scale * number, abs=0.51 * 10**-digits)
    return set(verdicts.values())
