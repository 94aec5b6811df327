"""The activation store: readers that are not ours read it, ours reads theirs, and any damage is named."""

import json
import multiprocessing
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from conftest import ROOT, write_store
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.codecs import Crc32cCodec

from sparsight.activations.array import Array
from sparsight.activations.store import ActivationStore, Rows, verify
from sparsight.activations.writer import Plan, StoreWriter, shard_size
from sparsight.common.errors import SparsightError

SHAPES = {"blocks.1.input": (5, 8), "embedding": (8,)}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("store"), 50, SHAPES, tokens="all")


@pytest.fixture
def path(original: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    shutil.copytree(original.parent, tmp_path / "copy")
    return tmp_path / "copy" / "train.zarr"


def files(path: Path) -> list[str]:
    return sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())


@given(n=st.integers(1, 10**7), most=st.integers(1, 10**6))
def test_shards_are_powers_of_two_and_never_fewer_than_eight(n: int, most: int) -> None:
    size = shard_size(n, most)
    assert size & (size - 1) == 0 and size <= most
    assert -(-n // size) >= min(n, 8)


def test_layout_on_disk_follows_the_contract(path: Path) -> None:
    manifest = json.loads(path.with_suffix(".json").read_text())
    assert manifest["files"].keys() == manifest["sizes"].keys() == set(files(path))
    for site in SHAPES:
        array = zarr.open_group(path, mode="r")[site]
        assert array.metadata.zarr_format == 3 and array.dtype == np.float16
        assert array.shards is not None and array.shape[0] // array.shards[0] >= 8
        codecs = array.metadata.to_dict()["codecs"]
        assert [c["name"] for c in codecs] == ["sharding_indexed"]
        assert [c["name"] for c in codecs[0]["configuration"]["codecs"]] == ["bytes", "crc32c"]
        values = array[:].astype(np.float64).reshape(-1, 8)
        about = manifest["sites"][site]
        assert about["shape"] == list(array.shape) and about["dtype"] == "float16"
        np.testing.assert_allclose(about["mean"], values.mean(axis=0), atol=1e-12)
        np.testing.assert_allclose(about["rms"], np.sqrt(np.square(values).mean()))


@pytest.mark.parametrize(("n", "shard", "chunk"), [(16, 4, 2), (17, 8, 4), (5, 4, 4), (1, 1, 1)])
def test_shards_are_what_zarr_itself_would_read_and_write(tmp_path: Path, n: int, shard: int, chunk: int) -> None:
    tokens = {"embedding": "embedding", "blocks.0.mlp": "patches"}
    plan = Plan(n, {"embedding": (3,), "blocks.0.mlp": (2, 3)}, "float32", shard, tokens)
    for layout in plan.layouts.values():
        object.__setattr__(layout, "chunk_images", chunk)
    values = {site: np.random.default_rng(n).random(lay.shape, np.float32) for site, lay in plan.layouts.items()}
    values["embedding"][: n // 2] = 0  # zarr leaves such chunks out unless told otherwise
    ours, theirs = tmp_path / "ours.zarr", zarr.create_group(tmp_path / "theirs.zarr", zarr_format=3)
    writer = StoreWriter(ours, plan, tmp_path)
    for number, images in enumerate(plan.shards):
        writer.write(number, {site: x[images] for site, x in values.items()}, [])
    for site, layout in plan.layouts.items():
        (ours / site / "zarr.json").write_text(json.dumps(layout.metadata()))
        theirs.create_array(
            site, data=values[site], chunks=layout.chunk_shape, shards=(shard, *layout.shape[1:]),
            compressors=[Crc32cCodec()], fill_value=0, config={"write_empty_chunks": True},
        )  # fmt: skip
        assert np.array_equal(zarr.open_array(ours / site, mode="r")[:], values[site])
        metadata = json.loads((tmp_path / "theirs.zarr" / site / "zarr.json").read_text())
        assert {key: metadata[key] for key in layout.metadata()} == layout.metadata()
        whole = plan.files(0)[site]
        if n >= shard:
            assert (ours / whole).read_bytes() == (tmp_path / "theirs.zarr" / whole).read_bytes()


def test_store_that_the_documented_script_writes_is_read(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "store-format.md").read_text()
    script = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[-1]
    assert "import sparsight" not in script and len(script.splitlines()) <= 32
    names: dict[str, Any] = {}
    exec(script, names)
    x = np.random.default_rng(0).standard_normal((100, 6)).astype(np.float16)
    names["write_store"](tmp_path, "val", {"embedding": x, "blocks.0.input": x + 1}, 8, 4)
    assert verify(tmp_path / "val.zarr") == []
    store = ActivationStore.open(tmp_path / "val.zarr")
    assert np.array_equal(store.rows("embedding")[:], x) and np.array_equal(
        store.rows("blocks.0.input")[3:50], x[3:50] + 1
    )


@pytest.mark.parametrize(
    "compressors", [[zarr.codecs.ZstdCodec(), zarr.codecs.Crc32cCodec()], [zarr.codecs.Crc32cCodec()]]
)
def test_stores_of_any_codecs_are_read_with_equal_values(
    original: Path, tmp_path: Path, compressors: list[Any]
) -> None:
    x = zarr.open_group(original, mode="r")["blocks.1.input"]
    folder = tmp_path / "x.zarr"
    zarr.create_array(
        folder, data=x[:], chunks=x.chunks, shards=x.shards, compressors=compressors, fill_value=0,
        config={"write_empty_chunks": True},
    )  # fmt: skip
    array = Array(folder)
    ours = ActivationStore.open(original).rows("blocks.1.input")
    theirs = Rows(array, slice(None))
    numbers = np.random.default_rng(0).integers(0, len(ours), 40)
    for key in (slice(None), slice(3, 77), slice(9, 9), numbers):
        assert np.array_equal(theirs[key], ours[key])
    if len(compressors) == 2:
        shard = next((folder / "c").rglob("0/0/0"))
        data = bytearray(shard.read_bytes())
        data[20] ^= 4
        shard.write_bytes(bytes(data))
        with pytest.raises(SparsightError, match=r"c/\d/0/0: damaged \(chunk 0 does not match its checksum\)"):
            Array(folder).read(0, 50)


@settings(deadline=None)
@given(data=st.data())
def test_rows_index_like_the_array_they_stand_for(original: Path, data: st.DataObject) -> None:
    store = ActivationStore.open(original)
    whole = zarr.open_group(original, mode="r")["blocks.1.input"][:]
    tokens, expected = data.draw(
        st.sampled_from([(None, whole.reshape(-1, 8)), ("cls", whole[:, 0]), ("patches", whole[:, 2:].reshape(-1, 8))])
    )
    rows = store.rows("blocks.1.input", tokens)
    assert rows.shape == expected.shape and rows.dtype == np.float16
    n = len(expected)
    key = data.draw(
        st.one_of(
            st.slices(n),
            st.integers(-n, n - 1),
            st.lists(st.integers(-n, n - 1), max_size=30).map(lambda numbers: np.array(numbers, dtype=np.int64)),
            st.lists(st.booleans(), min_size=n, max_size=n).map(np.array),
        )
    )
    assert np.array_equal(rows[key], expected[key])


def test_rows_that_do_not_exist_are_refused(original: Path) -> None:
    rows = ActivationStore.open(original).rows("embedding")
    for key in (50, [3, 50], np.array([-51])):
        with pytest.raises(IndexError, match="there are 50 rows"):
            rows[key]


@pytest.mark.parametrize(
    "key",
    [np.ones(3, bool), np.ones(0, bool), np.ones((2, 2), bool), [True], np.array([0.0, 1.0]), np.array([[0, 1]])],
    ids=str,
)
def test_a_mask_of_another_length_and_what_is_no_row_number_are_refused(original: Path, key: Any) -> None:
    rows = ActivationStore.open(original).rows(ActivationStore.open(original).sites[0])
    with pytest.raises(IndexError, match=r"a mask of shape|give one dimension of integers"):
        rows[key]
    assert len(rows[[]]) == 0 and np.array_equal(rows[np.ones(len(rows), bool)], rows[:])


@pytest.mark.parametrize("dtype", ["float64", "int32", "int8"])
@pytest.mark.parametrize("shards", [(4, 6), None])
def test_arrays_of_other_values_than_half_and_single_precision_are_refused(
    dtype: str, shards: tuple[int, int] | None, tmp_path: Path
) -> None:
    array = zarr.create_array(
        tmp_path / "a", shape=(8, 6), chunks=(2, 6), shards=shards, dtype=dtype, compressors=None, fill_value=0
    )
    array[:] = np.arange(48).reshape(8, 6)
    with pytest.raises(SparsightError, match=f"a: holds {dtype}, a store holds float16 or float32; write it again as"):
        Array(tmp_path / "a")


def test_image_and_token_pairs_are_found(original: Path) -> None:
    store = ActivationStore.open(original)
    whole = zarr.open_group(original, mode="r")["blocks.1.input"][:]
    images, tokens = np.array([49, 3, 3, 20]), np.array([4, 0, 1, 2])
    assert np.array_equal(store.at("blocks.1.input", images, tokens), whole[images, tokens])
    with pytest.raises(SparsightError, match=r"'blocks.1.input' holds tokens 0 to 4 of an image"):
        store.at("blocks.1.input", [0], [5])


def test_what_is_not_stored_is_refused(tmp_path: Path) -> None:
    store = ActivationStore.open(write_store(tmp_path, 10, {"blocks.1.input": (4,)}))
    with pytest.raises(SparsightError, match=r"no site 'blocks.0.input'; stored: blocks.1.input"):
        store.rows("blocks.0.input")
    with pytest.raises(SparsightError, match="holds tokens 'cls', not 'patches'"):
        store.rows("blocks.1.input", tokens="patches")
    with pytest.raises(SparsightError, match="no store manifest"):
        ActivationStore.open(tmp_path / "nothing.zarr")


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork")
def test_workers_read_a_store_that_is_open_and_in_use(original: Path, method: str) -> None:
    images, tokens = np.divmod(np.arange(250), 5)
    store = ActivationStore.open(original)
    whole = store.at("blocks.1.input", images, tokens)
    with multiprocessing.get_context(method).Pool(2) as pool:
        results = [pool.apply_async(store.at, ("blocks.1.input", images, tokens)) for _ in range(4)]
        assert all(np.array_equal(result.get(), whole) for result in results)


def flip(file: Path, position: int, bit: int = 0) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 1 << bit
    file.write_bytes(bytes(data))


def test_any_flipped_byte_in_any_file_is_named_by_verify(path: Path) -> None:
    generator = np.random.default_rng(0)
    assert verify(path) == []
    for name in files(path):
        size = (path / name).stat().st_size
        for position in {0, size - 1, *generator.integers(0, size, 3).tolist()}:
            flip(path / name, position, bit := int(generator.integers(8)))
            assert verify(path) == [f"{name}: content differs from the manifest"]
            flip(path / name, position, bit)
    assert verify(path) == []


def test_any_flipped_byte_of_the_manifest_is_noticed(path: Path) -> None:
    manifest = path.with_suffix(".json")
    generator = np.random.default_rng(0)
    for position in generator.choice(manifest.stat().st_size, 300, replace=False).tolist():
        flip(manifest, position, bit := int(generator.integers(8)))
        try:
            problems = verify(path)
        except SparsightError as error:
            problems = [str(error)]
        assert problems and "train.json" in problems[0], position
        flip(manifest, position, bit)
    assert verify(path) == []


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-5])


def empty(file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, empty, Path.unlink])
def test_truncated_empty_and_missing_files_are_named_on_opening_and_by_verify(
    path: Path, damage: Callable[[Path], None]
) -> None:
    for name in ("zarr.json", "embedding/zarr.json", "blocks.1.input/c/3/0/0"):
        whole = (path / name).read_bytes()
        damage(path / name)
        with pytest.raises(SparsightError, match=rf"{name}: (\d+ bytes instead of|missing from the store)"):
            ActivationStore.open(path)
        assert len(problems := verify(path)) == 1 and problems[0].startswith(f"{name}: ")
        (path / name).write_bytes(whole)
    (path / "extra").touch()
    assert verify(path) == ["extra: not in the manifest"]


def test_manifest_and_shards_of_another_store_are_named(path: Path, tmp_path: Path) -> None:
    other = write_store(tmp_path / "other", 50, SHAPES, tokens="all", seed=1)
    name = "blocks.1.input/c/2/0/0"
    shutil.copy(other / name, path / name)
    ActivationStore.open(path)
    assert verify(path) == [f"{name}: content differs from the manifest"]
    shutil.copy(other.with_suffix(".json"), path.with_suffix(".json"))
    assert set(files(path)) - {name, "zarr.json", *(f"{site}/zarr.json" for site in SHAPES)} == {
        problem.removesuffix(": content differs from the manifest") for problem in verify(path)
    }


@pytest.mark.parametrize("shard", range(9))
def test_reading_stops_at_a_flipped_byte_and_names_the_shard(path: Path, shard: int) -> None:
    name = f"blocks.1.input/c/{shard}/0/0"
    size = (path / name).stat().st_size
    for position in (0, size // 2, size - 10):  # a value, a value, the index
        flip(path / name, position)
        rows = ActivationStore.open(path).rows("blocks.1.input")
        with pytest.raises(SparsightError, match=rf"{name}: damaged \(.* its checksum\); delete the store's manifest"):
            rows[:]
        flip(path / name, position)
    assert len(ActivationStore.open(path).rows("blocks.1.input")[:]) == 250


def test_shards_and_chunks_that_vanish_are_never_read_as_zeros(path: Path) -> None:
    rows = ActivationStore.open(path).rows("embedding")
    (path / "embedding" / "c" / "4" / "0").unlink()
    assert len(rows[:16]) == 16
    with pytest.raises(SparsightError, match=r"embedding/c/4/0: damaged \(chunk 0 is missing\); delete the store's"):
        rows[:]
    folder, whole = path / "sparse.zarr", np.ones((12, 3), np.float32)
    whole[2:4] = 0  # zarr-python leaves such chunks out unless told otherwise
    zarr.create_array(folder, data=whole, chunks=(2, 3), shards=(4, 3), compressors=[Crc32cCodec()], fill_value=0)
    assert np.array_equal(zarr.open_array(folder, mode="r")[:], whole)
    with pytest.raises(SparsightError, match=r"sparse.zarr/c/0/0: damaged \(chunk 1 is missing\)"):
        Array(folder).read(0, 12)


def test_values_that_are_not_finite_are_refused_by_site_and_image(tmp_path: Path) -> None:
    where, nan = "at site 'embedding', image b.png", "NaN or infinite activation"
    for dtype, value, message in (
        ("float16", np.nan, f"{nan} {where}; check the weights"),
        ("float32", np.inf, f"{nan} {where}; check the weights"),
        ("float16", 1e6, f"float16 overflow {where}: more than 65504; set activations.dtype: float32"),
    ):
        plan = Plan(4, {"embedding": (4,)}, dtype, 2, {"embedding": "embedding"})
        writer = StoreWriter(tmp_path / "z.zarr", plan, tmp_path)
        x = np.zeros((2, 4), np.float32)
        x[1, 2] = value
        with np.errstate(over="ignore"), pytest.raises(SparsightError, match=message):
            writer.write(0, {"embedding": x.astype(dtype)}, ["a.png", "b.png"])
    assert not (tmp_path / "z.zarr" / "embedding").exists()
