"""The whole pipeline with ``compute.device: cuda`` on the pretended device: every stage of the default run, shrunk."""

import runpy
import shlex
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT, TINY, make_folder, workspace
from pretended_cuda import Activity
from runs import TINY_RUN, commands

from sparsight.pipeline import stage

VIT = {"img_size": 16, "patch_size": 4, "in_chans": 3, "embed_dim": 24, "depth": 3, "num_heads": 6}
CLIP = {"vision.image_size": 16, "vision.patch_size": 4}
SAE = {"d_sae": 48, "k": 4, "seeds": [0], "epochs": 2, "batch_size": 16}
CHAIN = ["blocks.1.input", "blocks.2.input"]
PRUNED = TINY_RUN / "exports/vit/b1-h2-h5/model.safetensors"


def configuration(others: Path) -> dict[str, Any]:
    """The small run with fewer images, all sections of the default run, all evaluations, other images, and bfloat16."""
    small: dict[str, Any] = yaml.safe_load(TINY.read_text())
    clip = small["backbones"]["clip"]
    patches = {"site": "blocks.1.output", "tokens": "patches"}
    return {
        **small,
        "compute": {"device": "cuda", "threads": 1, "precision": "bf16"},
        "images": {"source": "coloured-shapes", "images_per_class": 50},
        "other_images": {"others": {"source": "folder", "path": str(others)}},
        "backbones": {
            "vit": {**small["backbones"]["vit"], "architecture": VIT, "batch_size": 16},
            "clip": {**clip, "architecture": clip["architecture"] | CLIP, "batch_size": 16},
        },
        "activations": {"sites": [*CHAIN, patches, "blocks.2.output", "embedding"], "shard_images": 16},
        "saes": {
            "topk": {**SAE, "site": "blocks.2.input", "seeds": [0, 1]},
            "switch": {**SAE, "site": "blocks.2.input", "experts": 2, "bf16": True},
            "resae": {**SAE, "sites": CHAIN},
            "plain": {**SAE, "sites": CHAIN},
            "patches": {**SAE, "site": "blocks.1.output", "epochs": 1, "batch_size": 256},
            "final": {**SAE, "site": "blocks.2.output"},
        },
        "spurious": {"x": {"sae": "topk", "group": "colour", "latents": [1], "strengths": [1.0], "draws": 1}},
        "attribution": {"topk": {"sae": "topk", "images": 8, "steps": 2}},
        "disentangle": {
            "x": {"sae": "topk", "attributes": ["label_name", "colour"], "features": [1, 4], "das_steps": 2},
        },
    }


@pytest.fixture
def erasure() -> None:
    """The import of concept_erasure before the device is pretended: its torch.jit takes no patched functions."""
    with warnings.catch_warnings(action="ignore"):
        import concept_erasure  # noqa: F401


@pytest.mark.slow
@pytest.mark.usefixtures("erasure")
def test_every_stage_of_the_default_run_ends(tmp_path: Path, cuda: Activity, monkeypatch: pytest.MonkeyPatch) -> None:
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(yaml.safe_dump(configuration(make_folder(tmp_path / "images", per_class=40))))
    folder = workspace(tmp_path / "run", overlay)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(stage, "prepare_torch", lambda compute: torch.device(compute.device))  # there is no card
    seen = {"provenance"}  # commands() leaves it out
    for command in commands(folder, "all", str(PRUNED)):
        _, *words = shlex.split(command)
        monkeypatch.setattr(sys, "argv", words)
        cuda.clear()
        runpy.run_path(words[0], run_name="__main__")
        name = Path(words[0]).stem
        seen.add(name)
        on_device = name not in {"images", "configuration", "activations", "stability", "summary"}
        assert bool(cuda.launches) == on_device, f"{name}: {cuda.launches}"
    assert seen == {path.stem for path in (ROOT / "workflow" / "scripts").glob("*.py")}
    assert (TINY_RUN / "report" / "index.html").exists()
    assert PRUNED.exists()
