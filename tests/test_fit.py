"""Training the SAEs of a section: one reading of the store, and each as if it were alone."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from conftest import write_store
from safetensors.numpy import load_file

from sparsight import config, sae
from sparsight.activations.array import Array
from sparsight.activations.store import ActivationStore, Rows
from sparsight.common.errors import SparsightError
from sparsight.common.seeds import derive_seed
from sparsight.common.work import Work
from sparsight.sae import Trainer
from sparsight.sae.fit import fit
from sparsight.sae.moments import by_group, fit_moments
from sparsight.sae.resae import ReSAE, affine, fit_maps, load_chain
from sparsight.training.batches import StoreBatches

SITE, N, D = "blocks.0.input", 4096, 32


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("store"), N, {SITE: (D,)}, shard_images=256)


def train(store: Path, folder: Path, **options: Any) -> Path:
    values = {"backbone": "vit", "site": SITE, "d_sae": 64, "k": 4, "epochs": 2, "batch_size": 128, "lr": 1e-3}
    section = config.Sae(**{**values, **options})
    with Work(folder / "work", "key") as work:
        opened = ActivationStore.open(store)
        labels = np.arange(len(opened.rows(opened.sites[0]))) % 3 if section.prototype_weight else None
        fit(section, opened, labels, "grid", 0, work, torch.device("cpu"), {})
        work.finish(folder / "saes")
    return folder / "saes"


@pytest.mark.parametrize("kind", ["relu", "gated", "jumprelu"])
@pytest.mark.parametrize("options", [{"aux_k": 8}, {"aux_coefficient": 0.5}])
def test_settings_of_auxk_are_refused_for_kinds_without_it(
    store: Path, tmp_path: Path, kind: str, options: dict[str, Any]
) -> None:
    (name,) = options
    with pytest.raises(SparsightError, match=f"{name}: would be ignored, because only a kind with the AuxK loss"):
        train(store, tmp_path, kind=kind, **options)


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


@pytest.mark.parametrize("kind", ["topk", "archetypal"])
def test_training_reads_the_first_images_and_no_other(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    options = {"kind": kind} | ({"candidates": 32} if kind == "archetypal" else {})
    read, images = [0], Rows.images

    def spied(self: Rows, first: int, last: int, out: np.ndarray | None = None) -> np.ndarray:
        read.append(last)
        return images(self, first, last, out)

    monkeypatch.setattr(Rows, "images", spied)
    some = train(store, tmp_path / "some", seeds=(0,), train_images=640, **options) / "grid-s0"
    assert max(read) == 640
    last = json.loads((some / "training.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 2 * 640 // 128
    every = train(store, tmp_path / "every", seeds=(0,), train_images=N, **options) / "grid-s0"
    alone = train(store, tmp_path / "alone", seeds=(0,), **options) / "grid-s0"
    assert (every / "sae.safetensors").read_bytes() == (alone / "sae.safetensors").read_bytes()
    with pytest.raises(
        SparsightError, match=rf"^train_images: {N + 1:,} are more than the {N:,} images of .*; lower it$"
    ):
        train(store, tmp_path / "more", train_images=N + 1, **options)


def test_a_grid_of_eight_reads_the_store_once(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, chunks = [0], Array._chunks

    def counted(self: Array, start: int, end: int) -> np.ndarray:
        x = chunks(self, start, end)
        read[0] += x.nbytes
        return x

    monkeypatch.setattr(Array, "_chunks", counted)
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
    monkeypatch.setattr("sparsight.training.loop.Checkpoint.due", True)
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


@pytest.mark.parametrize("rms", [1.0, 1.0 + 1e-15, 1.0 - 1e-15])  # rounded either way
def test_a_constant_site_is_refused(rms: float, tmp_path: Path) -> None:
    path = write_store(tmp_path, 16, {SITE: (4,)}, dtype="float32")
    manifest = json.loads(path.with_suffix(".json").read_text())
    del manifest["checksum"]
    manifest["sites"][SITE] |= {"mean": [1.0] * 4, "rms": rms}
    path.with_suffix(".json").write_text(json.dumps(manifest))
    with pytest.raises(SparsightError, match="is constant or not finite; there is nothing to learn"):
        train(path, tmp_path / "out")


SITES = ("blocks.0.input", "blocks.1.input", "blocks.2.input")


@pytest.fixture(scope="module")
def tokens_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A class token, a register and six patches at three sites."""
    shapes = dict.fromkeys(SITES, (8, D))
    return write_store(tmp_path_factory.mktemp("tokens"), 256, shapes, tokens="all", shard_images=64)


def test_a_chain_trains_every_site_on_what_the_maps_leave(tokens_store: Path, tmp_path: Path) -> None:
    """Against batches that residuals are cut from by hand, and the trainer alone."""
    options: dict[str, Any] = {"site": None, "sites": SITES, "epochs": 1}
    folder = train(tokens_store, tmp_path / "both", seeds=(0, 1), **options)
    assert sorted(path.name for path in (folder / "grid-s0").iterdir()) == ["affine.safetensors", *SITES]
    chain = load_chain(folder / "grid-s1")
    assert set(chain.maps) == {"cls", "registers", "patches"} and chain.sites == list(SITES)
    x = {site: torch.from_numpy(zarr.open_group(tokens_store)[site][:]).float() for site in SITES}
    groups = {"cls": slice(0, 1), "registers": slice(1, 2), "patches": slice(2, 8)}
    seen = {site: torch.empty(256, 8, D) for site in SITES}
    for group, at in groups.items():
        rows = {site: x[site][:, at].reshape(-1, D) for site in SITES}
        A, _ = affine(fit_moments([{group: rows}], SITES)[group], SITES[0], SITES[1])
        torch.testing.assert_close(A, chain.maps[group][0][0])
        for site, value in chain.residuals(rows, group).items():
            seen[site][:, at] = value.reshape(256, -1, D)
    rows_of_one = {SITES[0]: ActivationStore.open(tokens_store).rows(SITES[0])}
    order = StoreBatches(rows_of_one, 128, derive_seed(0, "sae", "grid"), 2**30)
    for site in SITES:
        seen_there = seen[site].reshape(-1, D)
        mean, scale = seen_there.mean(dim=0), float((seen_there - seen_there.mean(dim=0)).square().mean().sqrt())
        one = sae.create("topk", D, 64, 4, derive_seed(0, "sae", f"grid-s1/{site}", "init"), aux_k=64)
        one.start(D)
        one.set_center(mean / scale)
        trainer = Trainer([one], 1e-3, 20_000)
        for step, batch in enumerate(order.epoch(0)):
            trainer.schedule(min(1.0, (1 - step / order.per_epoch) / 0.2))
            trainer.step(seen_there[torch.from_numpy(batch.rows)] / scale)
        one.fold_scale(scale)
        torch.testing.assert_close(chain.saes[site].W_dec, one.W_dec, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(chain.saes[site].b_dec, one.b_dec, rtol=1e-3, atol=1e-3)
    alone = train(tokens_store, tmp_path / "alone", seeds=(1,), **options)
    for file in ("affine.safetensors", *(f"{s}/{f}" for s in SITES for f in ("sae.safetensors", "training.jsonl"))):
        assert (alone / "grid-s1" / file).read_bytes() == (folder / "grid-s1" / file).read_bytes()
    about = json.loads((alone / "grid-s1" / SITES[1] / "config.json").read_text())
    assert (about["name"], about["site"], about["position"]) == ("grid-s1", SITES[1], 1)


@pytest.mark.parametrize("factor", [2, 0.3, -1.7, 1e3])  # what rounding leaves may be above or below 0
def test_a_map_that_leaves_nothing_is_refused(factor: float, tmp_path: Path) -> None:
    path = write_store(tmp_path / "store", 64, dict.fromkeys(SITES[:2], (D,)), dtype="float32")
    group = zarr.open_group(path, mode="r+")
    group[SITES[1]][:] = factor * np.asarray(group[SITES[0]][:]) + 1
    store = ActivationStore.open(path)
    moments = fit_moments(by_group(store, SITES[:2], torch.device("cpu")), SITES[:2])
    chain = ReSAE(list(SITES[:2]), {}, fit_maps(SITES[:2], moments, ridge=0.0))
    with pytest.raises(SparsightError, match=r"nothing is left to learn at site 'blocks\.1\.input'"):
        chain.statistics(moments)


def test_the_pass_term_draws_codes_of_a_class_together(tmp_path: Path) -> None:
    """Three classes around centres of their own; the labels reach the trainer image by image."""
    path = write_store(tmp_path / "store", 1500, {SITE: (D,)}, dtype="float32")
    group = zarr.open_group(path, mode="r+")
    centres = np.random.default_rng(1).standard_normal((3, D)).astype(np.float32)
    x = group[SITE][:] + 2 * centres[np.arange(1500) % 3]
    group[SITE][:] = x

    def spread(weight: float) -> float:
        """Of codes around the mean of their class, as a share of the codes' whole variance."""
        one = sae.load(train(path, tmp_path / str(weight), seeds=(0,), epochs=20, prototype_weight=weight) / "grid-s0")
        z = one.encode(x).dense().detach().numpy()
        within = sum(np.square(z[c::3] - z[c::3].mean(axis=0)).sum() for c in range(3))
        return float(within / np.square(z - z.mean(axis=0)).sum())

    assert spread(0.8) < 0.8 * spread(0.0)


@pytest.mark.parametrize("supported", [True, False])
def test_bf16_training_on_a_processor_without_it_is_said_to_be_slow(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], supported: bool
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    train(store, tmp_path, seeds=(0,), bf16=True)
    said = "bf16: true: this processor has no instructions for bf16" in capsys.readouterr().err
    assert said == (not supported)


def test_bf16_training_gives_the_same_bytes_twice_and_learns_as_fp32_does(store: Path, tmp_path: Path) -> None:
    one, two, full = (train(store, tmp_path / n, seeds=(0,), bf16=n != "full") for n in ("one", "two", "full"))
    assert (one / "grid-s0/sae.safetensors").read_bytes() == (two / "grid-s0/sae.safetensors").read_bytes()
    assert (one / "grid-s0/sae.safetensors").read_bytes() != (full / "grid-s0/sae.safetensors").read_bytes()
    fvu = [json.loads((f / "grid-s0/training.jsonl").read_text().splitlines()[-1])["fvu"] for f in (one, full)]
    assert fvu[0] == pytest.approx(fvu[1], rel=0.05)
    weights = load_file(one / "grid-s0/sae.safetensors")
    assert {str(w.dtype) for w in weights.values()} == {"float32"}
