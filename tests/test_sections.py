"""Sections of SAEs in the report: which are compared, and what is said over their seeds."""

import dataclasses
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from sparsight.common.intervals import mean_of_seeds
from sparsight.config import Sae
from sparsight.report.chapters import saes
from sparsight.report.comparisons import Comparison, comparisons


@settings(deadline=None)
@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=9))
def test_interval_over_seeds_is_students(values: list[float]) -> None:
    found = mean_of_seeds(values)
    if np.std(values) > 1e-9:
        low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
        np.testing.assert_allclose([found["mean"] - found["half"], found["mean"] + found["half"]], [low, high], 1e-6)
    assert mean_of_seeds(values[:1]) == {"n": 1, "mean": values[0]}


def test_what_is_compared() -> None:
    one = Sae(backbone="vit", site="blocks.1.input", d_sae=8, k=2)
    chain = Sae(backbone="vit", sites=("blocks.0.input", "blocks.1.input"), d_sae=8, k=2)
    sections = {
        "a": one,
        "b": dataclasses.replace(one, k=4),
        "c": dataclasses.replace(one, site="blocks.2.attn"),
        "d": dataclasses.replace(one, site="blocks.3.attn"),
        "elsewhere": dataclasses.replace(one, backbone="clip"),
        "patches": dataclasses.replace(one, tokens="patches"),
        "more patches": dataclasses.replace(one, tokens="patches", k=4),
        "full": chain,
        "zero": dataclasses.replace(chain, affine="zero", k=3),
        "other": dataclasses.replace(chain, sites=("blocks.0.input", "blocks.2.input")),
    }
    assert comparisons(sections) == [
        Comparison("tradeoff", "vit-blocks.1.input", ("a", "b")),
        Comparison("tradeoff", "vit-blocks.1.input-patches", ("patches", "more patches")),
        Comparison("depth", "a", ("a", "c", "d")),
        Comparison("chains", "full", ("full", "zero")),
    ]
    assert comparisons({"a": one, "full": chain}) == []


def written(folder: Path, about: Sae, values: dict[str, float]) -> None:
    """The files of an SAE that the chapter reads."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"training": dataclasses.asdict(about)}))
    (folder / "metrics.json").write_text(json.dumps({**values, "record": {}}))
    (folder / "training.jsonl").write_text("".join(json.dumps({"epoch": e, "fvu": 1 / e}) + "\n" for e in (1, 2)))


@pytest.fixture
def chapter(tmp_path: Path) -> dict[str, Any]:
    """Two kinds of SAE at three sites, three seeds each, and two chains."""
    about = Sae(backbone="vit", d_sae=8, k=2, site="blocks.0.attn")
    values = {"fvu": 0.5, "fvu_pca_k": 0.3, "l0": 2.0, "macs_encode": 80, "macs_decode": 20, "accuracy_spliced": 0.5}
    folders, chains = [], []
    for kind, place in [("topk", 0), ("topk", 1), ("topk", 2), ("relu", 1)]:
        for seed in range(3):
            folder = tmp_path / f"{kind}{place}-s{seed}"
            own = dataclasses.replace(about, kind=kind, site=f"blocks.{place}.attn")
            written(folder, own, values | {"fvu": 0.2 + 0.1 * place + 0.01 * seed})
            folders.append(folder)
    places = ("blocks.0.output", "blocks.1.output")
    for affine in ("full", "zero"):
        own = Sae(backbone="vit", d_sae=8, k=2, sites=places, affine=affine)
        folder = tmp_path / f"{affine}-s0"
        for site in places:
            written(folder / site, own, values | {"fvu_unchained": 0.4, "fvu_residual": 0.6})
        kls = {f"kl_{way}": 0.1 for way in ("forced", "unchained", "online")}
        (folder / "metrics.json").write_text(json.dumps({"fvu": 0.5, "redundancy": 0.3, **kls}))
        chains.append(folder)
    return saes.chapter(folders, chains, [])


def test_seeds_of_a_section_are_one_row(chapter: dict[str, Any]) -> None:
    rows = {row["name"]: row for row in chapter["sections"]}
    assert list(rows) == ["topk0", "topk1", "topk2", "relu1"]
    assert rows["topk1"]["metrics"]["fvu"] == pytest.approx(mean_of_seeds([0.30, 0.31, 0.32]))
    assert "record" not in rows["topk1"]["metrics"]
    full = next(row for row in chapter["chains"] if row["name"] == "full")
    assert full["sites"]["blocks.1.output"]["fvu_residual"] == {"n": 1, "mean": 0.6}


def test_every_comparison_is_drawn(chapter: dict[str, Any]) -> None:
    drawn = {"saes", "chain-full", "chain-zero", "tradeoff-vit-blocks.1.attn", "depth-topk0", "chains-full"}
    assert set(chapter["figures"]) == drawn
    for svg in chapter["figures"].values():
        assert ElementTree.fromstring(svg).tag.endswith("svg")
    figure = chapter["figures"]["tradeoff-vit-blocks.1.attn"]
    assert "topk, 8 latents" in figure and "relu, 8 latents" in figure
