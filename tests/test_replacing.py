"""A finished store under another configuration: it is made again, with the bytes of one from scratch."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import zarr
from conftest import make_backbone, make_manifest
from test_extract import contents, finish

from sparsight import config
from sparsight.activations.extract import extract
from sparsight.activations.store import ActivationStore, verify
from sparsight.activations.writer import StoreWriter
from sparsight.common.digests import digest
from sparsight.common.errors import SparsightError
from sparsight.common.work import Work
from sparsight.config import schema
from sparsight.images.manifest import Manifest
from sparsight.images.split import Split

FEW, MORE = ["blocks.1.input", "embedding"], ["blocks.0.output", "blocks.1.input", "blocks.2.attn", "embedding"]
# Every line changes a finished store of the line above it.
CHANGES: list[dict[str, Any]] = [
    {"sites": FEW, "tokens": "cls"},
    {"sites": FEW, "tokens": "all"},
    {"sites": FEW, "tokens": "patches"},
    {"sites": FEW, "tokens": "cls"},
    {"sites": FEW, "tokens": "cls", "dtype": "float32"},
    {"sites": MORE, "tokens": "cls", "dtype": "float32"},
    {"sites": ["blocks.1.input=all", *FEW[1:]], "dtype": "float32"},
    {"sites": FEW, "tokens": "all", "dtype": "float32", "shard_images": 1},
    {"sites": FEW, "tokens": "all", "dtype": "float32", "shard_images": 4},
    {"sites": FEW, "tokens": "all", "dtype": "float32", "embed_dim": 24},
    {"sites": FEW, "tokens": "all", "dtype": "float32", "embed_dim": 24, "precision": "bf16"},
]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_manifest(tmp_path_factory.mktemp("pictures"), per_class=24)


def run_part(split: Split, folder: Path, part: int = 0, parts: int = 1, **options: Any) -> None:
    """What the extract stage does for one part under a configuration."""
    settings = {"batch_size": 3, "shard_images": 2, "parts": parts, **options}
    width, precision = settings.pop("embed_dim", 48), settings.pop("precision", "fp32")
    section = schema.parse(config.Activations, settings, "activations")
    with Work(folder / "work" / str(part), digest([options])) as work:
        compute, store = config.Compute(precision=precision), folder / "train.zarr"
        extract(make_backbone(classes=2, embed_dim=width), split, section, compute, work, store, part, {})
        work.finish(folder)


def made(split: Split, folder: Path, **options: Any) -> dict[str, bytes]:
    """The files of a store after extraction into ``folder``."""
    run_part(split, folder, **options)
    finish(folder)
    return {name: data for name, data in contents(folder).items() if name.startswith("train.")}


def check_unreadable(store: Path) -> None:
    """Neither our reader nor zarr-python takes the store for finished."""
    with pytest.raises(SparsightError, match="no store manifest"):
        ActivationStore.open(store)
    for folder in (store, *store.glob("*")):
        with pytest.raises(FileNotFoundError):
            zarr.open(folder, mode="r")


def test_every_change_of_a_finished_store_gives_the_bytes_of_one_from_scratch(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split, write, writes = manifest.split("train"), StoreWriter.write, []

    def checked(self: StoreWriter, shard: int, *rest: Any) -> dict[str, Any]:
        check_unreadable(self.path)
        writes.append(shard)
        return write(self, shard, *rest)

    for number, options in enumerate(CHANGES):
        scratch = made(split, tmp_path / f"scratch-{number}", **options)
        with monkeypatch.context() as patch:
            patch.setattr(StoreWriter, "write", checked)
            assert made(split, tmp_path / "changed", **options) == scratch, options
        assert len(writes) >= 8 and verify(tmp_path / "changed" / "train.zarr") == []
        assert {path.name for path in (tmp_path / "changed" / "train.zarr").iterdir()} == {
            "zarr.json", *ActivationStore.open(tmp_path / "changed" / "train.zarr").sites,
        }  # fmt: skip
        writes.clear()


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_parts_may_begin_in_any_order(manifest: Manifest, tmp_path: Path, order: tuple[int, ...]) -> None:
    split = manifest.split("train")
    made(split, tmp_path, **CHANGES[5])
    for part in order:
        run_part(split, tmp_path, part, parts=3, **CHANGES[1])
        check_unreadable(tmp_path / "train.zarr")
    finish(tmp_path)
    found = {name: data for name, data in contents(tmp_path).items() if name.startswith("train.")}
    assert found == made(split, tmp_path / "scratch", **CHANGES[1])


def test_the_space_of_the_store_that_is_replaced_counts_as_free(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = manifest.split("train")
    made(split, tmp_path, **CHANGES[1])

    def usage(path: Path) -> Any:
        used = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        return type("Usage", (), {"free": 100_000 - used})()

    monkeypatch.setattr("shutil.disk_usage", usage)
    assert usage(tmp_path / "train.zarr").free < 50_000
    made(split, tmp_path, **CHANGES[2])


def test_only_a_full_disk_is_a_reason_to_make_room(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(manifest.split("train"), tmp_path, **CHANGES[0])
    monkeypatch.setattr(StoreWriter, "make_way", lambda *_, **__: None)  # so that old files stand in the way
    with pytest.raises(SparsightError) as caught:
        run_part(manifest.split("train"), tmp_path, **CHANGES[1])
    assert re.search(
        r"c/\d+/0/0: cannot be written \((File exists|Not a directory)\); free the name", str(caught.value)
    )


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import test_replacing as t
from sparsight.activations import writer
from sparsight.activations.writer import StoreWriter
from sparsight.images.manifest import Manifest
from sparsight.pipeline.stage import prepare_torch

# Nothing has run in parallel in this process yet, so that its forks are sound.
folder, kills = Path(sys.argv[1]), 0
split = Manifest(Path(sys.argv[3])).split("train")

def child(work, name=None, calls=0):
    '''Run work in a fork, which dies at a call of the writer: of ``remove`` (old files) or ``write`` (new ones).'''
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    where, left = (writer if name == "remove" else StoreWriter), [calls]
    if name:
        function = getattr(where, name)
        def counted(*arguments):
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return function(*arguments)
        setattr(where, name, counted)
    prepare_torch(t.config.Compute())
    work()
    os._exit(0)

for number, options in enumerate(t.CHANGES):
    assert child(lambda: t.made(split, folder / f"scratch-{number}", **options)) == 0
    if number:
        for name, calls in (("remove", 0), ("remove", 5), ("write", 0), ("write", 3), ("write", 2)):
            status = child(lambda: t.made(split, folder / "changed", **options), name, calls)
            if status == -signal.SIGKILL:
                kills += 1
                t.check_unreadable(folder / "changed" / "train.zarr")
    assert child(lambda: t.made(split, folder / "changed", **options)) == 0
    found = [{n: d for n, d in t.contents(folder / name).items() if n.startswith("train.")}
             for name in ("changed", f"scratch-{number}")]
    assert found[0] == found[1], options
print(kills)
"""


@pytest.mark.slow
def test_killed_in_the_middle_of_a_change_it_ends_with_the_bytes_of_one_from_scratch(tmp_path: Path) -> None:
    make_manifest(tmp_path, per_class=24)
    (tmp_path / "kill.py").write_text(KILLED)
    places = (tmp_path / "kill.py", tmp_path, Path(__file__).parent, tmp_path / "m.parquet")
    command = [sys.executable, *map(str, places)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) >= 4 * (len(CHANGES) - 1)
