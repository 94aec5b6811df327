"""Two runs on one page."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import TINY_RUN

from sparsight import sae
from sparsight.common.errors import SparsightError
from sparsight.report import compare
from sparsight.sae.metrics.geometry import unit


def test_a_run_compared_with_itself_has_no_difference_and_cosines_of_one(run_folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sparsight.report", "compare", str(TINY_RUN), str(TINY_RUN)]
    out = tmp_path / "page" / "itself.html"
    done = subprocess.run([*command, "--out", str(out)], cwd=run_folder, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(out)
    page = out.read_text()
    assert "All settings are equal." in page
    differences = re.findall(r'<td class="difference">(.*?)</td>', page)
    assert len(differences) == len(json.loads((run_folder / TINY_RUN / "metrics.json").read_text()))
    assert set(differences) == {"0"}
    names = compare.saes(run_folder / TINY_RUN)
    assert {"topk-s0", "switch-s1", "resae-s0/blocks.2.input"} <= names.keys()
    for name in names:
        section = page.split(f"<h3>{name}</h3>")[1].split("<h3>")[0]
        cosines = re.findall(r"</a></td><td>([\d.]+)</td>", section)
        assert set(cosines) == {"1.000"} and len(cosines) == 48, name
        for pair in re.findall(rf"#latent={re.escape(name)}/(\d+)\">.*?#latent={re.escape(name)}/(\d+)\"", section):
            assert pair[0] == pair[1]


def test_settings_and_numbers_of_two_runs_stand_side_by_side() -> None:
    a = compare.flat({"run": "a", "saes": {"topk": {"k": 8, "sites": []}}, "steering": {}})
    b = compare.flat({"run": "b", "saes": {"topk": {"k": 16, "sites": []}, "extra": {"k": 1}}, "steering": {}})
    lines = {line.name: (line.a, line.b) for line in compare.compared(a, b)}
    assert lines == {
        "run": ("a", "b"), "saes.topk.k": (8, 16), "saes.topk.sites": ([], []), "steering": ({}, {}),
        "saes.extra.k": (None, 1),
    }  # fmt: skip
    lower, missing = compare.compared({"x.fvu": 0.5, "y": 1.0}, {"x.fvu": 0.25})
    assert lower.difference == -0.25 and missing.difference is None


def test_latents_are_matched_with_their_permuted_and_noisy_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = sae.create("topk", 16, 40, 4), sae.create("topk", 16, 40, 4)
    order, generator = np.random.default_rng(0).permutation(40), torch.Generator().manual_seed(0)
    with torch.no_grad():
        b.W_dec.copy_(a.W_dec[torch.from_numpy(order)] + 0.02 * torch.randn(40, 16, generator=generator))
    monkeypatch.setattr(compare, "_ROWS", 30)
    found = compare.match("x", a, b, {3: "cat"}, {})
    assert sum(found.bars) == 40 and (len(found.latents), found.hidden) == (30, 10)
    cosines = [pair["cosine"] for pair in found.latents]
    assert cosines == sorted(cosines, reverse=True)
    for pair in found.latents:
        assert order[pair["b"]] == pair["a"]
        expected = unit(a.W_dec)[pair["a"]] @ unit(b.W_dec)[pair["b"]]
        assert pair["cosine"] == pytest.approx(float(expected), abs=1e-6)
        assert pair["class_a"] == ("cat" if pair["a"] == 3 else "")


def test_a_folder_without_a_finished_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        SparsightError, match=r"nowhere: no finished run here \(No such file or directory: metrics.json\)"
    ):
        compare.write_comparison(tmp_path / "nowhere", tmp_path, tmp_path / "out.html")
