"""The activation store: plain zarr reads it, damage is named, extraction resumes to the same bytes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from conftest import make_backbone, make_folder
from hypothesis import given
from hypothesis import strategies as st

from sparsight import config
from sparsight.errors import SparsightError
from sparsight.extract import extract
from sparsight.images import Manifest, Split, write_manifest
from sparsight.store import ActivationStore, StoreWriter, shard_size
from sparsight.work import Work

SITES = ("blocks.1.input", "blocks.2.attn", "embedding")


def split_of(tmp_path: Path) -> Split:
    if not (tmp_path / "m.parquet").exists():
        folder = make_folder(tmp_path / "images", per_class=30)
        write_manifest(config.Images(source="folder", path=str(folder)), 0, {}, 2, tmp_path / "m.parquet")
    return Manifest(tmp_path / "m.parquet").split("train")


def make_store(tmp_path: Path, name: str = "a", **options: Any) -> Path:
    section = config.Activations(sites=SITES, **{"batch_size": 3, **options})
    split = split_of(tmp_path)
    with Work(tmp_path / "work" / name, "key") as work:
        extract(make_backbone(classes=2), split, section, work, "train", {}, threads=2)
        work.finish(tmp_path / name)
    return tmp_path / name / "train.zarr"


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@given(n=st.integers(1, 10**7), most=st.integers(1, 10**6))
def test_shards_are_powers_of_two_and_never_fewer_than_eight(n: int, most: int) -> None:
    size = shard_size(n, most)
    assert size & (size - 1) == 0 and size <= most
    assert -(-n // size) >= min(n, 8)


@pytest.mark.parametrize("tokens", ["cls", "patches", "all", "mean"])
def test_every_value_read_with_plain_zarr_is_the_model_s_own(tmp_path: Path, tokens: str) -> None:
    group = zarr.open_group(make_store(tmp_path, tokens=tokens, dtype="float32"), mode="r")
    backbone, split = make_backbone(classes=2), split_of(tmp_path)
    images = backbone.normalize(split.batch(slice(None), backbone.preprocess))
    for site, x in backbone.taps(images, SITES).items():
        pick = {"cls": lambda v: v[:, 0], "patches": lambda v: v[:, 1:], "all": lambda v: v,
                "mean": lambda v: v[:, 1:].mean(dim=1)}[tokens]  # fmt: skip
        expected = x if site == "embedding" else pick(x)
        np.testing.assert_allclose(group[site][:], expected.numpy(), atol=1e-5)


def test_layout_on_disk_follows_the_contract(tmp_path: Path) -> None:
    path = make_store(tmp_path)
    manifest = json.loads(path.with_suffix(".json").read_text())
    for site in SITES:
        array = zarr.open_group(path, mode="r")[site]
        assert array.metadata.zarr_format == 3 and array.dtype == np.float16
        assert array.shards is not None and array.shape[0] // array.shards[0] >= 8
        codecs = array.metadata.to_dict()["codecs"]
        assert [c["name"] for c in codecs] == ["sharding_indexed"]
        assert [c["name"] for c in codecs[0]["configuration"]["codecs"]] == ["bytes", "crc32c"]
        values = array[:].astype(np.float64)
        about = manifest["sites"][site]
        assert about["shape"] == list(array.shape) and about["dtype"] == "float16"
        np.testing.assert_allclose(about["mean"], values.mean(axis=0), atol=1e-12)
        np.testing.assert_allclose(about["rms"], np.sqrt(np.square(values).mean()))
    assert manifest["files"].keys() == contents(path).keys()


def test_all_zero_chunks_are_written(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path / "z.zarr", 16, {"embedding": (4,)}, "float16", 2)
    for shard in range(8):
        writer.write(shard, {"embedding": np.zeros((2, 4), np.float32)}, ["uri"] * 2)
    whole = 2 * 4 * 2 + 4 + 16 + 4  # values, their checksum, the index, its checksum
    assert all((tmp_path / "z.zarr" / name).stat().st_size == whole for s in range(8) for name in writer.files(s))


def test_rows_give_slices_and_numbers_of_any_order(tmp_path: Path) -> None:
    path = make_store(tmp_path, tokens="all")
    store = ActivationStore.open(path)
    whole = zarr.open_group(path, mode="r")["blocks.1.input"][:]
    n, T, D = whole.shape
    everything = store.rows("blocks.1.input")
    assert everything.shape == (n * T, D) and np.array_equal(everything[:], whole.reshape(-1, D))
    numbers = np.random.default_rng(0).integers(0, n * T, 50)
    assert np.array_equal(everything[numbers], whole.reshape(-1, D)[numbers])
    assert np.array_equal(store.rows("blocks.1.input", tokens="cls")[5:9], whole[5:9, 0])
    assert np.array_equal(store.rows("blocks.1.input", tokens="patches")[:], whole[:, 1:].reshape(-1, D))
    assert np.array_equal(np.asarray(store.rows("embedding")), zarr.open_group(path, mode="r")["embedding"][:])
    assert everything[3:3].shape == (0, D)


def test_what_is_not_stored_is_refused(tmp_path: Path) -> None:
    store = ActivationStore.open(make_store(tmp_path))
    with pytest.raises(SparsightError, match=r"no site 'blocks.0.input'; stored: blocks.1.input, blocks.2.attn"):
        store.rows("blocks.0.input")
    with pytest.raises(SparsightError, match="holds tokens 'cls', not 'patches'"):
        store.rows("blocks.1.input", tokens="patches")
    with pytest.raises(SparsightError, match="no store manifest"):
        ActivationStore.open(tmp_path / "nothing.zarr")


def shard_file(path: Path) -> Path:
    return path / "blocks.1.input" / "c" / "3" / "0"


def test_truncated_and_missing_shards_stop_the_reader_by_name(tmp_path: Path) -> None:
    path = make_store(tmp_path)
    data = shard_file(path).read_bytes()
    for damaged in (data[:-5], b""):
        shard_file(path).write_bytes(damaged)
        with pytest.raises(SparsightError, match=r"blocks.1.input/c/3/0: \d+ bytes instead of"):
            ActivationStore.open(path)
    shard_file(path).unlink()
    with pytest.raises(SparsightError, match=r"blocks.1.input/c/3/0: missing from the store"):
        ActivationStore.open(path)


def test_flipped_byte_is_found_on_reading_and_by_verify(tmp_path: Path) -> None:
    path = make_store(tmp_path)
    assert ActivationStore.open(path).verify() == []
    data = bytearray(shard_file(path).read_bytes())
    data[7] ^= 1
    shard_file(path).write_bytes(bytes(data))
    store = ActivationStore.open(path)
    assert store.verify() == ["blocks.1.input/c/3/0: content differs from the manifest"]
    with pytest.raises(SparsightError, match=r"train.zarr: damaged: blocks.1.input/c/3/0"):
        store.rows("blocks.1.input")[:]
    (path / "extra").touch()
    assert "extra: not in the manifest" in store.verify()


def test_not_finite_and_overflowing_activations_are_refused_by_site_and_image(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path / "z.zarr", 4, {"embedding": (4,)}, "float16", 2)
    x = np.zeros((2, 4), np.float32)
    for value, message in ((np.nan, "NaN or infinite activation"), (1e6, "float16 overflow")):
        x[1, 2] = value
        with pytest.raises(SparsightError, match=f"{message} at site 'embedding', image b.png"):
            writer.write(0, {"embedding": x}, ["a.png", "b.png"])
    assert not (tmp_path / "z.zarr" / "embedding" / "c").exists()


def test_extraction_stopped_at_any_shard_continues_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = contents(make_store(tmp_path, "a").parent)
    write = StoreWriter.write

    class Killed(BaseException):
        pass

    calls = 0

    def killing(self: StoreWriter, shard: int, *rest: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls % 3 == 0:
            (self.path / "blocks.1.input" / "half-written.partial").write_bytes(b"x")
            raise Killed
        return write(self, shard, *rest)

    monkeypatch.setattr(StoreWriter, "write", killing)
    killed = 0
    while not (tmp_path / "b").exists():
        try:
            make_store(tmp_path, "b")
        except Killed:
            killed += 1
    n_shards = len(list((tmp_path / "a" / "train.zarr" / "embedding" / "c").iterdir()))
    assert calls == n_shards + killed, "finished shards were kept"
    assert killed > 2 and contents(tmp_path / "b") == undisturbed


def test_shard_changed_while_stopped_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    undisturbed = contents(make_store(tmp_path, "a").parent)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StoreWriter, "write_manifest", stop)
        make_store(tmp_path, "b")
    shard_file(tmp_path / "work" / "b" / "out" / "train.zarr").write_bytes(b"torn")
    make_store(tmp_path, "b")
    assert contents(tmp_path / "b") == undisturbed


def test_too_little_disk_space_is_found_before_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10})())
    with pytest.raises(SparsightError, match=r"need 0.0 GB, .* has 0.0 GB free"):
        make_store(tmp_path)
