"""The page of the papers' numbers beside ours."""

import copy
import hashlib
import itertools
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import ROOT, script
from scipy import stats
from snakemake.utils import update_config

from sparsight.common.errors import SparsightError

PAPERS: Any = yaml.safe_load((ROOT / "experiments" / "papers.yaml").read_text())


@pytest.fixture(scope="module")
def papers() -> ModuleType:
    return script("docs/papers.py")


def test_page_is_up_to_date(papers: ModuleType) -> None:
    measured = json.loads((ROOT / "experiments" / "measured.json").read_text())
    assert (ROOT / "docs" / "papers.md").read_text() == papers.page(PAPERS, measured), "run python docs/papers.py"
    for about in (*PAPERS["systems"], *PAPERS["ours"]):
        for figure in (figure for figure in papers.figures(about) if figure.measured(measured)):
            assert (ROOT / "docs" / f"{figure.name}.svg").read_text() == papers.draw(figure, measured)


def test_every_number_is_of_a_section_that_its_experiment_has() -> None:
    sections = {"backbone": "backbones", "steering": "steering", "pruning": "policies", "disentangling": "disentangle"}
    entries = script("docs/entries.py").every_entry(PAPERS)
    for experiment, of_experiment in itertools.groupby(entries, lambda entry: entry.experiment):
        config = yaml.safe_load((ROOT / "params.yaml").read_text())
        update_config(config, yaml.safe_load((ROOT / "experiments" / f"{experiment}.yaml").read_text()))
        for entry in of_experiment:
            for key in entry.keys:
                stage, name, *rest = key.split(".")
                if stage.endswith("-stability"):
                    stage, name = "sae", stage.removesuffix("-stability")
                assert config[sections.get(stage, "saes")][name.removesuffix("-s*")] is not None, entry
                assert stage != "steering" or len(rest) == 3 or rest[0] in {"gate-0", *config["other_images"]}, entry


SOME: Any = {
    "systems": [
        {
            "system": "S",
            "paper": "P",
            "tables": [
                {
                    "title": "T",
                    "unit": "%",
                    "columns": [
                        {"name": "A", "experiment": "run", "images": "birds"},
                        {"name": "B", "experiment": "later", "images": "cats"},
                    ],
                    "rows": [{"what": "x", "metric": "steering.x-s*.<images>.accuracy", "paper": [60, 61.5]}],
                }
            ],
        }
    ],
    "ours": [{"experiment": "run", "note": "N.", "rows": [{"what": "y", "metric": "sae.y-s*.fvu", "unit": "share"}]}],
}


def results(folder: Path, metrics: dict[str, float]) -> Path:
    for name, n in (("images", 4), ("images/birds", 3)):
        (folder / name).mkdir(parents=True)
        pq.write_table(pa.table({"split": ["train"] * 5 + ["test"] * n}), folder / name / "manifest.parquet")
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "provenance.json").write_text(json.dumps({"commit": "abc"}))
    return folder


METRICS = {
    "steering.x-s0.birds.accuracy": 0.58,
    "steering.x-s1.birds.accuracy": 0.60,
    "steering.x-s0.cats.accuracy": 0.1,
    "sae.y-s2.fvu": 0.25,
    "sae.y-s2.fvu_pca_k": 0.3,
}


def test_a_recorded_run_stands_beside_the_paper_as_the_mean_over_its_seeds(papers: ModuleType, tmp_path: Path) -> None:
    run = papers.record("run", results(tmp_path / "run", METRICS), SOME)
    assert run["metrics"].keys() == {"steering.x-s0.birds.accuracy", "steering.x-s1.birds.accuracy", "sae.y-s2.fvu"}
    page = papers.page(SOME, {"run": run})
    assert "| A | x | % | 60.00 | 59.00 (58.00 to 60.00) | -1.00 |" in page
    assert "| B | x |" not in page and "* `later`: S (P): T" in page
    assert "| y | share | 0.2500 |" in page
    digest = hashlib.sha256((tmp_path / "run/images/manifest.parquet").read_bytes()).hexdigest()
    assert f"| run | abc | 4, birds 3 | {digest[:16]} |" in page


def test_findings_come_first_and_what_nobody_has_run_last(papers: ModuleType, tmp_path: Path) -> None:
    some = copy.deepcopy(SOME)
    system = some["systems"][0]
    later = {**system["tables"][0], "title": "Later", "columns": system["tables"][0]["columns"][1:]}
    later["rows"] = [{"what": "x", "metric": "steering.x-s*.<images>.accuracy", "paper": [61.5]}]
    system |= {"finding": "It holds.", "tables": [later, *system["tables"]]}
    page = papers.page(some, {"run": papers.record("run", results(tmp_path / "run", METRICS), some)})
    order = ["**S (P).** It holds.", "\n### run\n", "\n## S (P)\n", "\n### T\n", "\n## Runs\n"]
    order += ["\n## Experiments that nobody has run\n", "\n* `later`: S (P): Later, T\n"]
    places = [page.index(text) for text in order]
    assert places == sorted(places) and "### Later" not in page
    every = copy.deepcopy(SOME)
    del every["systems"][0]["tables"][0]["columns"][1]
    every["systems"][0]["tables"][0]["rows"][0]["paper"] = [60]
    run = {"run": papers.record("run", results(tmp_path / "again", METRICS), every)}
    assert "nobody" not in papers.page(every, run).split("## Findings")[1], "every table has a measured number"


def test_a_figure_is_drawn_once_all_of_its_numbers_are_recorded(papers: ModuleType, tmp_path: Path) -> None:
    some = copy.deepcopy(SOME)
    columns = [
        {"x": 1000, "experiment": "run", "sae": "y", "control": "sae.y-s*.fvu_pca_k"},
        {"x": 4_000_000, "experiment": "run", "sae": "z", "control": ""},
    ]
    line = {"what": "one", "metric": "sae.<sae>-s*.fvu", "over": "<control>"}
    figure = {"name": "f", "title": "A figure", "x": "tokens", "y": "change", "unit": "%"}
    some["systems"][0]["figures"] = [{**figure, "columns": columns, "lines": [line]}]
    assert "](f.svg)" not in papers.page(some, {})
    metrics = {**METRICS, "sae.z-s0.fvu": 0.1, "sae.z-s1.fvu": 0.3}
    measured = {"run": papers.record("run", results(tmp_path / "run", metrics), some)}
    assert "sae.z-s1.fvu" in measured["run"]["metrics"] and "![A figure](f.svg)" in papers.page(some, measured)
    (drawn,) = papers.figures(some["systems"][0])
    text = papers.draw(drawn, measured)
    assert "<desc>one: -16.67 at 1000, 20 at 4e+06.</desc>" in text and ">4 M<" in text and ">1,000<" in text


def test_the_answer_on_steered_heads_stands_with_its_intervals(papers: ModuleType, tmp_path: Path) -> None:
    folder = results(tmp_path / "run", METRICS)
    numbers = {"delta": -0.012, "delta_lo": -0.02, "delta_hi": -0.004, "loss_bound": 0.018}
    metrics = {
        "policy": {"usage_last": 0.7},
        "against_none": [
            {"strategy": "class-latents", "labels": "probe", "usage_last": 0.35, **numbers},
            {"strategy": "uniform", "labels": "none", "usage_last": 0.5, **numbers},
        ],
        "selected_classes": [
            {"strategy": "class-static", "labels": "oracle", "classes_selected": 3, "usage_last": 0.4, **numbers}
        ],
        "matched_usage": [
            {"control": "logit-bias", "labels": "probe", "usage": 0.35, "usage_control": 0.36, **numbers}
        ],
    }
    (folder / "pruning" / "heads").mkdir(parents=True)
    (folder / "pruning" / "heads" / "metrics.json").write_text(json.dumps(metrics))
    some = copy.deepcopy(SOME)
    some["ours"][0]["answer"] = "It does not."
    page = papers.page(some, {"run": papers.record("run", folder, some)})
    assert "It does not." in page and "uniform" not in page
    assert "| probe | 0.350 | 0.700 | -1.20 (-2.00 to -0.40) | 1.80 |" in page
    assert "| class-static | oracle | 3 | 0.400 | -1.20 (-2.00 to -0.40) | 1.80 |" in page
    assert "| logit-bias | probe | 0.350 | 0.360 | -1.20 (-2.00 to -0.40) |" in page


def test_beside_no_paper_every_column_of_a_table_is_one_of_the_page_s(papers: ModuleType, tmp_path: Path) -> None:
    some = copy.deepcopy(SOME)
    table = some["systems"][0]["tables"][0]
    table["columns"] = [{"name": name, "experiment": "run", "sae": name} for name in ("y", "z")]
    table["columns"].append({"name": "Z", "experiment": "later", "sae": "z"})
    fvu = {"what": "FVU", "metric": "sae.<sae>-s*.fvu"}
    table["rows"] = [fvu, {"what": "FVU", "unit": "share", "metric": "sae.<sae>-s*.fvu"}]
    folder = results(tmp_path / "run", {"sae.y-s2.fvu": 0.25, "sae.z-s2.fvu": 0.5})
    page = papers.page(some, {"run": papers.record("run", folder, some)})
    assert "| what | unit | y | z |\n|---|---|---|---|\n" in page, "a column for each that is recorded"
    assert "| FVU | % | 25.00 | 50.00 |\n| FVU | share | 0.2500 | 0.5000 |\n" in page


def test_changes_against_a_control_are_taken_seed_by_seed(papers: ModuleType, tmp_path: Path) -> None:
    folder = results(
        tmp_path / "run", {"sae.y-s0.fvu": 0.1, "sae.y-s1.fvu": 0.3, "sae.z-s0.fvu": 0.2, "sae.z-s1.fvu": 0.4}
    )
    some = copy.deepcopy(SOME)
    table = some["systems"][0]["tables"][0]
    table["columns"] = [{"name": "A", "experiment": "run", "section": "y"}]
    row = {"metric": "sae.<section>-s*.fvu"}
    table["rows"] = [
        {"what": "relative", "over": "sae.z-s*.fvu", "paper": [-40], **row},
        {"what": "plain", "minus": "sae.z-s*.fvu", "unit": "points", **row},
    ]
    page = papers.page(some, {"run": papers.record("run", folder, some)})
    half = stats.t.ppf(0.975, 1) * np.std([-50, -25], ddof=1) / np.sqrt(2)
    assert f"| A | relative | % | -40.00 | -37.50 ({-37.5 - half:.2f} to {-37.5 + half:.2f}) | +2.50 |" in page
    assert "| A | plain | points |  | -10.00 (-10.00 to -10.00) |  |" in page
    table["answer"] = "It halves."
    assert "|\n\nIt halves.\n" in papers.page(some, {"run": papers.record("run", folder, some)})
    recorded = papers.record("run", folder, some)
    table["rows"].append({"what": "later", "metric": "sae.x-s*.fvu"})
    with pytest.raises(SparsightError, match=r"run: measured.json has no sae.x-s\*.fvu; record the run again"):
        papers.page(some, {"run": recorded})


def test_what_cannot_be_recorded_is_said_in_one_line(papers: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SparsightError, match=r"other: experiments/papers.yaml does not name this experiment; add it"):
        papers.record("other", tmp_path, SOME)
    with pytest.raises(SparsightError, match=r"metrics.json: No such file or directory; let the run finish first"):
        papers.record("run", tmp_path, SOME)
    with pytest.raises(SparsightError, match=r"metrics.json: has no steering.x-s\*.birds.accuracy; mend"):
        papers.record("run", results(tmp_path / "run", {"sae.y-s2.fvu": 0.1}), SOME)
