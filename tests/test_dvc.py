"""DVC keeps a store: whole shards move, and only those that changed."""

import subprocess
import sys
from pathlib import Path

from conftest import write_store

from sparsight.store import ActivationStore, verify


def run(folder: Path, *words: str) -> None:
    command = [sys.executable, "-m", "dvc", *words[1:]] if words[0] == "dvc" else list(words)
    subprocess.run(command, cwd=folder, check=True, capture_output=True)


def test_push_and_pull_move_only_the_shards_that_changed(tmp_path: Path) -> None:
    repository, remote, clone = (tmp_path / name for name in ("repository", "remote", "clone"))
    shapes = {"blocks.0.input": (8,), "embedding": (8,)}
    store = write_store(repository, 32, shapes)
    for words in (("git", "init", "-q"), ("dvc", "init", "-q"), ("dvc", "remote", "add", "-d", "here", str(remote))):
        run(repository, *words)
    run(repository, "dvc", "add", "-q", "train.zarr")
    run(repository, "dvc", "push", "-q")

    def objects() -> set[Path]:
        return {path for path in remote.rglob("*") if path.is_file()}

    first = objects()
    assert len(first) == len(list(store.rglob("*/c/*/0"))) + 3, "shards, group, two equal arrays, the list"
    shard = store / "embedding" / "c" / "3" / "0"
    changed = shard.read_bytes()[::-1]
    shard.unlink()
    shard.write_bytes(changed)
    run(repository, "dvc", "add", "-q", "train.zarr")
    run(repository, "dvc", "push", "-q")
    assert len(objects() - first) == 2, "the shard and the list"

    run(repository, "git", "add", ".")
    run(repository, "git", "-c", "user.name=x", "-c", "user.email=x@x", "commit", "-qm", "store")
    run(tmp_path, "git", "clone", "-q", str(repository), str(clone))
    run(clone, "dvc", "pull", "-q")
    assert verify(clone / "train.zarr") == ["embedding/c/3/0: content differs from the manifest"]
    assert len(ActivationStore.open(clone / "train.zarr").rows("blocks.0.input")[:]) == 32
