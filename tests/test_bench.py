"""The card of an SAE: the strongest control of every measure, found and compared again from the files."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import TINY_RUN
from scipy import stats

from sparsight.bench.card import cards, compared
from sparsight.bench.sections import sections_of
from sparsight.common.errors import SparsightError

SITE = "blocks.2.input"
METRICS = {
    "l0": 8.0, "dead_test": 3, "dense_test": 1, "fvu": 0.1, "fvu_pca_k": 0.2, "fvu_random": 0.7, "fvu_kmeans": 0.4,
    "fvu_neurons": 0.8, "bits": 50.0, "bits_pca": 40.0, "kl_recovered": 0.9, "probing_sae_5": 0.9, "probing_pca_5": 0.8,
    "probing_random_5": 0.7, "probing_neurons_5": 0.6, "monosemanticity": 0.5, "monosemanticity_random": 0.6,
    "monosemanticity_kmeans": 0.9, "monosemanticity_neurons": 0.1,
}  # fmt: skip


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_sae(run: Path, name: str, control_of: str | None = None, backbone: str = "vit", **metrics: float) -> None:
    """The files of an SAE; ``metrics`` are added to or change METRICS."""
    about = {"kind": "topk", "d_sae": 64, "site": SITE, "tokens": "patches", "backbone": backbone}
    write(run / "saes" / name / "config.json", {**about, "training": {"control_of": control_of}})
    write(run / "saes" / name / "metrics.json", {**METRICS, **metrics})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A section of three seeds with a control that is the strongest in one measure, a section of one seed, a chain."""
    for seed, fvu in enumerate((0.10, 0.12, 0.11)):
        write_sae(tmp_path, f"sae-s{seed}", fvu=fvu, monosemanticity_judge=0.4, monosemanticity_judge_random=0.5)
        write_sae(tmp_path, f"sae-frozen-decoder-s{seed}", "sae", fvu=fvu + 0.01 * (seed + 1), probing_sae_5=0.3)
    write_sae(tmp_path, "alone-s0")
    write(tmp_path / "saes" / "chain-s0" / "metrics.json", {"fvu": 0.1})
    pairs = {"over_0.7": 0.5, "over_0.7_min": 0.45, "over_0.7_max": 0.6, "saes": 3, "over_0.7_random": 0.0}
    write(tmp_path / "saes" / "sae-stability.json", {"sites": {SITE: pairs}})
    write(tmp_path / "saes" / "sae-frozen-decoder-stability.json", {"sites": {SITE: {**pairs, "over_0.7": 0.02}}})
    where = {"ap_sae": 0.8, "ap_pca": 0.5, "ap_shuffled": 0.2, "n_classes": 4}
    write(tmp_path / "localisation" / "sae.json", {"saes": {f"sae-s{seed}": where for seed in range(3)}})
    caused = {"deletion_sae": 0.2, "deletion_random_order": 0.6, "deletion_pca": 0.1, "insertion_sae": 0.7}
    write(tmp_path / "attribution" / "causes.json", {"saes": {f"sae-s{seed}": caused for seed in range(3)}})
    groups = {"worst_sae": 0.5, "worst_none": 0.1, "worst_leace": 0.7, "worst_last_layer": 0.9}
    write(tmp_path / "spurious" / "colour.json", {"saes": {f"sae-s{seed}": groups for seed in range(3)}})
    return tmp_path


def test_each_measure_stands_beside_its_strongest_control(run: Path) -> None:
    sections, chains = sections_of(run)
    assert [section.name for section in sections] == ["alone", "sae"] and chains == ["chain"]
    assert list(sections[1].controls) == ["frozen decoder"] and not sections[0].controls
    found = {c.measure.name: c for c in compared(sections[1])}
    assert {name: c.control for name, c in found.items()} == {
        "unexplained variance": "frozen decoder",  # trained like the SAE, better than PCA
        "KL recovered in the model": "frozen decoder",
        "bits per activation at equal error": "principal components",
        "probe on five features a class": "principal components",
        "monosemanticity, own model": "k-means",
        "monosemanticity, other model": "random dictionary",
        "decoder rows found by another seed": "frozen decoder",
        "average precision on masks": "principal components",
        "area under deletion": "principal components",  # less is better
        "accuracy in the worst group": "LEACE",  # a last layer that is trained again is no control
    }
    assert "area under insertion" not in found, "nothing to compare it with"


def test_another_backbone_is_compared_only_where_its_numbers_mean_the_same(run: Path) -> None:
    best = {"fvu": 0.01, "monosemanticity": 1.0, "monosemanticity_judge": 0.9, "probing_sae_5": 0.95}
    for seed in range(3):
        write_sae(run, f"sae-random-weights-s{seed}", "sae", "vit-random", **best)
    found = {c.measure.name: c.control for c in compared(sections_of(run)[0][1])}
    assert found["probe on five features a class"] == found["monosemanticity, other model"] == "random weights"
    assert found["unexplained variance"] == "frozen decoder" and found["monosemanticity, own model"] == "k-means"


def test_differences_are_paired_by_seed_with_students_interval(run: Path) -> None:
    (fvu,) = (c for c in compared(sections_of(run)[0][1]) if c.measure.name == "unexplained variance")
    own = np.array([0.10, 0.12, 0.11])
    other = own + np.array([0.01, 0.02, 0.03])
    expected = stats.ttest_rel(own, other)
    assert fvu.difference is not None and fvu.difference.p == pytest.approx(expected.pvalue)
    interval = expected.confidence_interval(0.95)
    assert fvu.difference[:3] == pytest.approx((-0.02, interval.low, interval.high))
    assert (fvu.value, fvu.control_value) == pytest.approx((own.mean(), other.mean()))


def test_the_card_is_a_table_with_verdicts(run: Path) -> None:
    alone, sae, about_chains = cards(run)
    assert "1 seed, on patches of blocks.2.input of vit. Of the latents 8.0 are active at a time, 3 never" in alone
    assert alone.count("no verdict: too few seeds") == 4
    (line,) = (line for line in sae.splitlines() if "bits per" in line)
    assert [cell.strip() for cell in line.strip("|").split("|")] == [
        "bits per activation at equal error (lower is better)", "50.0", "principal components", "40.0", "1",
        "+10.0 (10.0 to 10.0)", "worse",
    ]  # fmt: skip
    assert about_chains.endswith("compares them: chain.")
    widths = {len(line) for line in sae.splitlines() if line.startswith("|")}
    assert len(widths) == 1, "it is also to be read as text"


def test_a_folder_without_saes_is_named(tmp_path: Path) -> None:
    with pytest.raises(SparsightError, match=r"no evaluated SAE here; give the folder of a finished run"):
        list(cards(tmp_path))
    command = [sys.executable, "-m", "sparsight.bench", str(tmp_path / "nowhere")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1


def test_cards_of_a_real_run_have_its_own_numbers(snakemake_run: Path) -> None:
    found = list(cards(snakemake_run / TINY_RUN))
    (card,) = (card for card in found if card.startswith("### topk of"))
    metrics = [json.loads(path.read_text()) for path in snakemake_run.glob(f"{TINY_RUN}/saes/topk-s*/metrics.json")]
    (line,) = (line for line in card.splitlines() if line.startswith("| unexplained variance"))
    assert f"{100 * np.mean([m['fvu'] for m in metrics]):.1f} %" in line
    lowest = min(np.mean([m[f"fvu_{key}"] for m in metrics]) for key in ("pca_k", "random", "kmeans", "neurons"))
    assert f"{100 * lowest:.1f} %" in line
