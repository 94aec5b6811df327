"""Extraction: the values are the model's own, and neither parts, workers nor interruptions change a byte."""

import resource
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import zarr
from conftest import make_backbone, make_folder

from sparsight import backbones, config
from sparsight.activations.extract import extract
from sparsight.activations.store import ActivationStore, verify
from sparsight.activations.writer import StoreWriter, finish_store
from sparsight.common.errors import SparsightError
from sparsight.common.work import Work
from sparsight.config import Compute
from sparsight.config.activations import StoredSite
from sparsight.images.manifest import Manifest, write_manifest
from sparsight.images.split import Split

SITES = ("blocks.1.input", "blocks.2.attn", "embedding")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    images = config.Images(source="folder", path=str(make_folder(folder / "images", per_class=36)))
    write_manifest(images, 0, {}, 2, folder / "m.parquet")
    return folder / "m.parquet"


@pytest.fixture(scope="module")
def split(manifest: Path) -> Split:
    return Manifest(manifest).split("train")


def run_part(split: Split, folder: Path, part: int = 0, compute: Compute | None = None, **options: Any) -> None:
    """What the extract stage does for one part."""
    section = config.Activations(**{"sites": SITES, "batch_size": 3, "shard_images": 2, **options})
    with Work(folder / "work" / str(part), "key") as work:
        store = folder / "train.zarr"
        extract(
            make_backbone(classes=2), split, section, compute or Compute(), work, store, part, {"split": "train"}
        )  # fmt: skip
        work.finish(folder)


def finish(folder: Path) -> Path:
    """What the activations stage does."""
    parts = sorted(folder.glob("train.part-*.json"))
    finish_store(folder / "train.zarr", parts, folder / "train.json")
    for part in parts:
        part.unlink()
    return folder / "train.zarr"


def make_store(split: Split, folder: Path, compute: Compute | None = None, **options: Any) -> Path:
    for part in range(options.get("parts", 1)):
        run_part(split, folder, part, compute, **options)
    return finish(folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def reference(split: Split, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return contents(make_store(split, tmp_path_factory.mktemp("reference")).parent)


@pytest.mark.parametrize("tokens", ["cls", "patches", "all", "mean"])
def test_every_value_read_with_plain_zarr_is_the_model_s_own(split: Split, tmp_path: Path, tokens: str) -> None:
    group = zarr.open_group(make_store(split, tmp_path, tokens=tokens, dtype="float32"), mode="r")
    backbone = make_backbone(classes=2)
    images = backbone.normalize(split.batch(slice(None), backbone.preprocess))
    for site, x in backbone.taps(images, SITES).items():
        pick = {"cls": lambda v: v[:, 0], "patches": lambda v: v[:, 1:], "all": lambda v: v,
                "mean": lambda v: v[:, 1:].mean(dim=1)}[tokens]  # fmt: skip
        expected = x if site == "embedding" else pick(x)
        np.testing.assert_allclose(group[site][:], expected.numpy(), atol=1e-5)


def test_an_embedding_of_another_width_than_the_residual_stream_is_stored(split: Split, tmp_path: Path) -> None:
    sizes = {"vision.image_size": 16, "vision.patch_size": 8, "vision.width": 24, "vision.head_width": 8}
    small = {"vision.layers": 2, "vision.attn_pooler_heads": 2, "text.width": 16, "text.heads": 2, "text.layers": 1}
    backbone = backbones.load("open_clip/coca_ViT-B-32", None, embed_dim=16, **sizes, **small)
    section = config.Activations(sites=(StoredSite("blocks.1.input"), StoredSite("embedding")), batch_size=8)
    with Work(tmp_path / "work", "key") as work:
        extract(backbone, split, section, Compute(), work, tmp_path / "train.zarr", 0, {})
        work.finish(tmp_path)
    group = zarr.open_group(finish(tmp_path), mode="r")
    assert group["blocks.1.input"].shape == (len(split), 24) and group["embedding"].shape == (len(split), 16)


@pytest.mark.parametrize(("parts", "workers"), [(1, 1), (1, 2), (3, 0), (3, 1), (3, 2), (8, 0), (8, 1), (8, 2)])
def test_parts_and_workers_change_no_byte(
    split: Split, reference: dict[str, bytes], tmp_path: Path, parts: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if workers:
        monkeypatch.setattr(Split, "_picture", None)  # this process decodes nothing
    assert sum(name.startswith("train.zarr/embedding/c/") for name in reference) >= 24
    store = make_store(split, tmp_path, Compute(workers=workers), parts=parts)
    assert contents(store.parent) == reference


def test_bf16_is_close_to_fp32_and_not_equal(split: Split, tmp_path: Path) -> None:
    full = ActivationStore.open(make_store(split, tmp_path / "a"))
    half = ActivationStore.open(make_store(split, tmp_path / "b", Compute(precision="bf16")))
    for site in SITES:
        a, b = full.rows(site)[:].astype(np.float32), half.rows(site)[:].astype(np.float32)
        assert 0 < np.abs(a - b).max() < 0.1 * np.abs(a).max()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("supported", [True, False])
def test_bf16_on_a_processor_without_it_is_said_to_be_slow(
    split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], supported: bool,
    precision: Literal["fp32", "bf16"],
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    make_store(split, tmp_path, Compute(precision=precision))
    said = "compute.precision: bf16: this processor has no instructions for bf16" in capsys.readouterr().err
    assert said == (precision == "bf16" and not supported)


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import conftest, test_extract
from sparsight.activations.writer import StoreWriter
from sparsight.images.manifest import Manifest
from sparsight.pipeline.stage import prepare_torch

# Nothing has run in parallel in this process yet, so that its forks are sound.
folder, write = Path(sys.argv[1]), StoreWriter.write
split = Manifest(Path(sys.argv[3])).split("train")

def counted(self, shard, *rest):
    with open(folder / "log", "a") as log:
        log.write(f"{shard} ")
    time.sleep(0.03)  # so that twenty kills find twenty moments
    return write(self, shard, *rest)

StoreWriter.write = counted
generator, kills = random.Random(0), 0
while True:
    child = os.fork()
    if child == 0:
        prepare_torch(test_extract.Compute())
        test_extract.run_part(split, folder)
        os._exit(0)
    if kills < 20:
        before = len(list((folder / "work" / "0" / "state").glob("shard-*.json")))
        deadline = before + generator.randrange(0, 2)
        while len(list((folder / "work" / "0" / "state").glob("shard-*.json"))) < deadline:
            time.sleep(0.002)
        time.sleep(generator.uniform(0, 0.04))
        os.kill(child, signal.SIGKILL)
        kills += 1
    _, status = os.waitpid(child, 0)
    if status == 0:
        break
print(kills)
"""


@pytest.mark.slow
def test_extraction_killed_at_twenty_random_moments_gives_the_same_bytes(
    manifest: Path, reference: dict[str, bytes], tmp_path: Path
) -> None:
    (tmp_path / "kill.py").write_text(KILLED)
    out = tmp_path / "out"
    out.mkdir()
    command = [sys.executable, str(tmp_path / "kill.py"), str(out), str(Path(__file__).parent), str(manifest)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    kills = int(done.stdout)
    written = (out / "log").read_text().split()
    (out / "log").unlink()
    (out / "work").rmdir()
    finish(out)
    n_shards = sum(name.startswith("train.zarr/embedding/c/") for name in reference)
    assert kills == 20 and len(written) <= n_shards + kills, "at most one shard is made again"
    assert contents(out) == reference


READING = """
import sys, time
from pathlib import Path
from sparsight.images.manifest import Manifest
from sparsight.images.preprocess import Preprocess
from sparsight.images.workers import stream

split, preprocess = Manifest(Path(sys.argv[1])).split("train"), Preprocess((16, 16), 3, (0,) * 3, (1,) * 3)
for _ in stream(split, [slice(0, 2)] * 100, preprocess, threads=1, workers=2):
    print("read", flush=True)
    time.sleep(60)
"""


def test_workers_end_with_a_stage_that_is_terminated(manifest: Path) -> None:
    command = [sys.executable, "-c", READING, str(manifest)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "read\n"
        process.terminate()
        process.communicate(timeout=60)  # the pipe ends with the last process that holds it


def test_a_full_disk_is_named_and_the_store_resumes(
    split: Split, reference: dict[str, bytes], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    written = 0
    write = StoreWriter.write

    def limited(self: StoreWriter, shard: int, *rest: Any) -> dict[str, Any]:
        nonlocal written
        written += 1
        if written == 5:  # as on a disk that fills up in the middle of a file
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
        try:
            return write(self, shard, *rest)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StoreWriter, "write", limited)
        with pytest.raises(SparsightError, match=r"c/4(/0)?: cannot be written \(File too large\); make room and give"):
            run_part(split, tmp_path)
        assert not list(tmp_path.rglob("*-c-4*")), "nothing half-written is left"
        run_part(split, tmp_path)
    n_shards = sum(name.startswith("train.zarr/embedding/c/") for name in reference)
    assert written == n_shards + 1, "finished shards were kept"
    finish(tmp_path)
    (tmp_path / "work").rmdir()
    assert contents(tmp_path) == reference


def test_a_shard_changed_while_stopped_is_made_again(
    split: Split, reference: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Work, "finish", stop)
        run_part(split, tmp_path)
    (tmp_path / "train.zarr" / "blocks.1.input" / "c" / "3" / "0").write_bytes(b"torn")
    run_part(split, tmp_path)
    finish(tmp_path)
    (tmp_path / "work").rmdir()
    assert contents(tmp_path) == reference


def test_a_store_that_is_being_replaced_has_no_manifest(split: Split, tmp_path: Path) -> None:
    make_store(split, tmp_path)
    run_part(split, tmp_path, parts=2, dtype="float32")
    with pytest.raises(SparsightError, match="no store manifest"):
        ActivationStore.open(tmp_path / "train.zarr")
    with pytest.raises(SparsightError, match="the parts hold 12 of 25 shards"):
        finish(tmp_path)
    run_part(split, tmp_path, 1, parts=2, dtype="float32")
    assert verify(finish(tmp_path)) == []


def test_gathering_stops_at_a_shard_that_is_not_what_its_part_wrote(split: Split, tmp_path: Path) -> None:
    run_part(split, tmp_path)
    (tmp_path / "train.zarr" / "embedding" / "c" / "7" / "0").unlink()
    with pytest.raises(SparsightError, match=r"embedding/c/7/0: missing; delete train.part-0.json and give the same"):
        finish(tmp_path)
    run_part(split, tmp_path, 1, parts=2, dtype="float32")
    with pytest.raises(SparsightError, match=r"train.part-1.json: belongs to another store than .*train.part-0.json"):
        finish(tmp_path)


def test_too_little_disk_space_is_found_before_work(
    split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10})())
    with pytest.raises(SparsightError, match=r"train.zarr: needs 0.0 GB, there are 0.0 GB free; make room"):
        make_store(split, tmp_path)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_went_bad_stops_extraction_by_name(tmp_path: Path, workers: int) -> None:
    folder = make_folder(tmp_path / "images")
    section = config.Images(source="folder", path=str(folder))
    write_manifest(section, 0, {}, 2, tmp_path / "m.parquet")
    split = Manifest(tmp_path / "m.parquet").split("train")
    Path(split.uris(slice(8))[7]).write_bytes(b"not an image")
    with pytest.raises(SparsightError, match=r"^image .*\.png: changed since the manifest was made; run the images"):
        make_store(split, tmp_path / "out", Compute(workers=workers))
