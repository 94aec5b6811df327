"""Training the SAEs of a section: one reading of the store, and each as if it were alone."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_store

from sparsight import config, sae
from sparsight.errors import SparsightError
from sparsight.sae.fit import fit
from sparsight.store import ActivationStore
from sparsight.work import Work

SITE, N, D = "blocks.0.input", 4096, 32


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("store"), N, {SITE: (D,)}, shard_images=256)


def train(store: Path, folder: Path, **options: Any) -> Path:
    values = {"backbone": "vit", "site": SITE, "d_sae": 64, "k": 4, "epochs": 2, "batch_size": 128, "lr": 1e-3}
    section = config.Sae(**{**values, **options})
    with Work(folder / "work", "key") as work:
        fit(section, ActivationStore.open(store), "grid", 0, work, torch.device("cpu"), {})
        work.finish(folder / "saes")
    return folder / "saes"


@pytest.mark.parametrize("kind", ["topk", "switch"])
def test_an_sae_of_a_grid_has_the_bytes_that_it_has_alone(store: Path, tmp_path: Path, kind: str) -> None:
    grid = train(store, tmp_path / "grid", kind=kind, seeds=(0, 1, 2))
    assert sorted(path.name for path in grid.iterdir()) == ["grid-s0", "grid-s1", "grid-s2"]
    alone = train(store, tmp_path / "alone", kind=kind, seeds=(1,))
    for name in ("sae.safetensors", "training.jsonl"):
        assert (grid / "grid-s1" / name).read_bytes() == (alone / "grid-s1" / name).read_bytes()
        assert (grid / "grid-s0" / name).read_bytes() != (grid / "grid-s1" / name).read_bytes()
    lines = [json.loads(line) for line in (alone / "grid-s1" / "training.jsonl").read_text().splitlines()]
    assert set(lines[0]) == {"step", "epoch", "fvu", "aux", "l0", "dead"} and lines[-1]["step"] == 2 * N // 128
    assert lines[-1]["fvu"] < lines[0]["fvu"]
    assert sae.load(grid / "grid-s2").about["name"] == "grid-s2"


def test_a_grid_of_eight_reads_the_store_once(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, preadv = [0], os.preadv

    def counted(*arguments: Any) -> int:
        count = preadv(*arguments)
        read[0] += count
        return count

    monkeypatch.setattr(os, "preadv", counted)
    used = {}
    for seeds in ((0,), tuple(range(8))):
        read[0] = 0
        train(store, tmp_path / str(len(seeds)), seeds=seeds, epochs=3)
        used[len(seeds)] = read[0]
    assert used[1] >= N * D * 2
    assert used[8] == used[1] <= 1.1 * N * D * 2, "and three epochs read what fits into memory once"


def test_memory_that_holds_a_part_of_the_store_trains_on_all_of_it(tmp_path: Path) -> None:
    shapes = {SITE: (32, 64)}  # 4 KB an image
    path = write_store(tmp_path / "store", 2048, shapes, tokens="all", shard_images=128)
    folder = train(path, tmp_path / "out", memory_mb=4, epochs=1, batch_size=4096, site=SITE)
    lines = [json.loads(line) for line in (folder / "grid-s0" / "training.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 2048 * 32 // 4096


def test_a_flipped_byte_in_any_shard_stops_training_and_is_named(tmp_path: Path) -> None:
    path = write_store(tmp_path / "store", 64, {SITE: (D,)}, shard_images=8)
    for shard in range(8):
        file = path / SITE / "c" / str(shard) / "0"
        whole = file.read_bytes()
        file.write_bytes(whole[:100] + bytes([whole[100] ^ 16]) + whole[101:])
        with pytest.raises(SparsightError, match=rf"{SITE}/c/{shard}/0: damaged \(chunk 0 does not match its checksum"):
            train(path, tmp_path / str(shard))
        file.write_bytes(whole)


def test_a_loss_that_diverges_is_told_with_sae_step_and_checkpoint(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = r"^step 2 of 64: SAE 'grid-s0' \(topk\): loss .*, gradient norm .*; lower lr, .*; "
    with pytest.raises(SparsightError, match=f"{failed}no checkpoint was written before$"):
        train(store, tmp_path / "a", lr=1e30)
    monkeypatch.setattr("sparsight.training._Checkpoint.due", True)
    with pytest.raises(SparsightError, match=rf"{failed}the last good checkpoint is .*\.safetensors, after step 1$"):
        train(store, tmp_path / "b", lr=1e30)


def test_progress_shows_rows_and_the_mean_over_the_saes(
    store: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = train(store, tmp_path, seeds=(0, 1, 2))
    *_, line = capfd.readouterr().err.splitlines()
    match = re.fullmatch(rf"{2 * N}/{2 * N} rows, [0-9.]+ rows/s, 0 s left, fvu (\S+), aux 0, l0 4, dead 0", line)
    assert match is not None, line
    lasts = [json.loads((path / "training.jsonl").read_text().splitlines()[-1])["fvu"] for path in folder.iterdir()]
    assert len(set(lasts)) == 3 and float(match[1]) == pytest.approx(sum(lasts) / 3, rel=1e-3)


def test_an_empty_store_is_refused(tmp_path: Path) -> None:
    path = write_store(tmp_path, 16, {SITE: (4,)})
    array = path / SITE / "zarr.json"
    size = array.stat().st_size
    array.write_text(json.dumps(json.loads(array.read_text()) | {"shape": [0, 4]}).ljust(size))
    with pytest.raises(SparsightError, match=rf"train.zarr: site '{SITE}' holds no activations; extract a split"):
        train(path, tmp_path / "out")


def test_a_constant_site_is_refused(tmp_path: Path) -> None:
    path = write_store(tmp_path, 16, {SITE: (4,)}, dtype="float32")
    manifest = json.loads(path.with_suffix(".json").read_text())
    del manifest["checksum"]
    manifest["sites"][SITE] |= {"mean": [1.0] * 4, "rms": 1.0}
    path.with_suffix(".json").write_text(json.dumps(manifest))
    with pytest.raises(SparsightError, match="is constant or not finite; there is nothing to learn"):
        train(path, tmp_path / "out")
