"""The one line that ends Snakemake's output."""

import json
from pathlib import Path

import pytest

from sparsight.report.headline import headline

SAE = {"sae.topk-s0.fvu": 0.052, "sae.topk-s0.l0": 8.2, "sae.topk-s0.fvu_pca_k": 0.3}
CHAIN = {"chain.resae-s0.fvu": 0.1, "chain.resae-s0.fvu_affine": 0.4}


@pytest.mark.parametrize(
    ("metrics", "line"),
    [
        (
            {**CHAIN, **SAE},
            "SAE topk-s0 leaves 5.2 % of the variance unexplained with 8 active latents, as many principal components "
            "leave 30.0 %",
        ),
        (CHAIN, "chain resae-s0 leaves 10.0 % of the variance unexplained, its affine maps alone leave 40.0 %"),
        ({"backbone.vit.accuracy": 0.9}, "backbone vit is right on 90.0 % of the test images"),
        ({"images.duplicates": 0}, "the run has neither SAEs nor labels"),
    ],
)
def test_a_run_ends_with_what_its_first_sae_explains(metrics: dict[str, float], line: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    assert headline(tmp_path / "metrics.json") == line


def test_the_sae_that_the_run_is_about_is_named_if_it_is_there(tmp_path: Path) -> None:
    other = {f"sae.a-s0.{key.rpartition('.')[2]}": value for key, value in SAE.items()}
    (tmp_path / "metrics.json").write_text(json.dumps({**other, **SAE}))
    assert headline(tmp_path / "metrics.json", "topk-s0").startswith("SAE topk-s0 leaves")
    assert headline(tmp_path / "metrics.json", "none").startswith("SAE a-s0 leaves")
