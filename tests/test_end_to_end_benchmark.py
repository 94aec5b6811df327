"""What benchmarks/end_to_end.py rests on: a valid overlay, held-out images that are unseen, true scores."""

import dataclasses
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, script
from PIL import Image
from safetensors.torch import load_file, save_file
from snakemake.utils import update_config

from sparsight import sae
from sparsight.pipeline.run import load_run

D_IN = 384


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return script("benchmarks/end_to_end.py")


@pytest.fixture
def task(bench: ModuleType, tmp_path: Path) -> Any:
    for name in ("a", "b"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(10):
            Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / "pictures" / name / f"{i}.png")
    bench.link_images(tmp_path / "pictures", 20, tmp_path / "images", seed=0)
    weights = tmp_path / "vit.safetensors"
    save_file({"x": torch.zeros(1)}, weights)
    return bench.Task(
        images=str(tmp_path / "images" / "train"), weights=str(weights), out=str(tmp_path), size=98, block=8, d_sae=64,
        k=4, lr=1e-3, batch=1024, model_batch=64, workers=0,
    )  # fmt: skip


def test_images_held_out_are_not_trained_on(task: Any) -> None:
    root = Path(task.images).parent
    train, test = ({p.resolve() for p in root.glob(f"{split}/*/*")} for split in ("train", "test"))
    assert (len(train), len(test)) == (18, 2) and not train & test
    assert len({path.parent.name for path in train | test}) > 1, "drawn from several classes"
    assert [path.name for path in (root / "train").iterdir()] == ["images"], "which need not all be in train"


def test_our_overlay_has_one_site_and_one_sae(bench: ModuleType, task: Any) -> None:
    config = yaml.safe_load((ROOT / "params.yaml").read_text())
    update_config(config, yaml.safe_load(bench.overlay(task, "bf16")))
    run = load_run(config)
    assert list(run.backbones) == ["vit"] and list(run.saes) == ["topk"]
    assert not (run.policies or run.steering or run.pruning or run.attribution)


def test_fvu_is_that_of_sparsight_and_of_its_definition(bench: ModuleType, task: Any) -> None:
    ours = sae.create("topk", D_IN, task.d_sae, task.k)
    ours.save(Path(task.out) / bench.scores.OURS)
    x = torch.randn(300, D_IN, generator=torch.Generator().manual_seed(0))
    found = bench.scores.score("sparsight", Path(task.out), task, x)  # asserts that sparsight finds the same
    x_hat = ours.decode(ours.encode(x)).detach().numpy()
    wanted = np.square(x.numpy() - x_hat).sum() / np.square(x.numpy() - x.numpy().mean(0)).sum()
    assert found["fvu"] == pytest.approx(wanted, rel=1e-4) and found["l0"] == task.k


def test_scaling_of_inputs_gives_the_same_sae_as_weights_that_hold_it(bench: ModuleType, task: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    ours = sae.create("topk", D_IN, task.d_sae, task.k)
    ours.save(task.out)
    weights = load_file(Path(task.out) / "sae.safetensors")
    weights["b_enc"] = torch.randn(task.d_sae, generator=generator)
    mean, x = torch.randn(D_IN, generator=generator), torch.randn(50, D_IN, generator=generator)
    scaled = bench.scores.Plain(weights, None, mean=mean, scale=3.0)
    held = {**weights, "b_enc": 3 * weights["b_enc"], "b_dec": mean + 3 * weights["b_dec"]}
    torch.testing.assert_close(scaled(x)[1], bench.scores.Plain(held, None)(x)[1], rtol=1e-4, atol=1e-4)


def test_table_has_a_row_for_each_contestant_also_for_those_that_failed(bench: ModuleType, task: Any) -> None:
    turn = bench.Turn(2.0, 3.0, 100.0, 10.0, 64, 4.0, 0.5)
    slower = dataclasses.replace(turn, wall=4.0)
    turns = {"sparsight": [turn], "saev": [slower, slower], "vit-prisma": [bench.Turn(1, 1, 1, 1)], "sae-lens": []}
    rows = bench.table(turns, {"sae-lens": "not installed"}, task).splitlines()[2:]
    assert "| 2.0 / 2.0 | 0.50 |" in rows[0] and "no SAE" in rows[2] and "not installed" in rows[3]
    assert len({row.count("|") for row in rows}) == 1


def test_lines_of_users_are_counted_without_docstrings(bench: ModuleType) -> None:
    assert all(bench.user_lines(name) > 10 for name in bench.PEERS)
    assert (
        bench.user_lines("timm and PyTorch")
        < len((ROOT / "benchmarks/end_to_end_contestants.py").read_text().splitlines()) / 2
    )
