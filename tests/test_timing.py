"""Milliseconds against heads kept: how long the measurement itself may take."""

import json
import time
from pathlib import Path

import pytest
from torch import Tensor

from sparsight.backbones.backbone import Backbone
from sparsight.pruning import timing


@pytest.mark.parametrize(("milliseconds", "batch", "rounds"), [(0.01, 64, 7), (20.0, 32, 6), (500.0, 8, 3)])
def test_a_large_model_is_timed_with_fewer_images_and_rounds(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, milliseconds: float, batch: int, rounds: int
) -> None:
    clock = [0.0]

    def forward(self: Backbone, images: Tensor, **_: object) -> None:
        clock[0] += len(images) * milliseconds / 1000

    monkeypatch.setattr(Backbone, "forward", forward)
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    timing.measure({"large": backbone}, 0, tmp_path / "timings.json")
    heads = json.loads((tmp_path / "timings.json").read_text())["heads"]["large"]
    assert [row["kept"] for row in heads] == list(range(backbone.n_heads + 1))
    assert {(row["batch_size"], row["rounds"]) for row in heads} == {(batch, rounds)}
    assert all(row[key] == pytest.approx(milliseconds) for row in heads for key in row if "_ms_" in key)
