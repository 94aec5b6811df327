"""Disks that are full or read-only: what the user is told, and that the same command goes on afterwards."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import snakemake, workspace, write_store
from test_mistakes import one_line, stage

pytestmark = pytest.mark.slow
MANIFEST = "results/tiny/images/manifest.parquet"


def mount(*words: str) -> None:
    if subprocess.run(["mount", *words], capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a small disk")


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A workspace whose results lie on a disk of 100 kB."""
    folder = workspace(tmp_path / "w")
    (folder / "results").mkdir()
    mount("-t", "tmpfs", "-o", "size=100k", "tmpfs", str(folder / "results"))
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder / "results")], check=True)


def test_full_disk_is_named_and_with_more_room_the_same_command_goes_on(small: Path) -> None:
    failed = snakemake(small, "--cores", "1", MANIFEST)
    assert failed.returncode == 1 and not (small / MANIFEST).exists()
    assert "error: the disk of results/tiny is full" in failed.stdout + failed.stderr
    mount("-o", "remount,size=50m", str(small / "results"))
    assert snakemake(small, "--cores", "1", MANIFEST).returncode == 0
    assert not list((small / "results" / "tiny" / ".work").iterdir())


def test_stages_say_in_one_line_that_the_disk_is_full(small: Path, tmp_path: Path) -> None:
    full = small / "results"
    images = stage("images.py", full, source="mnist-5000")
    assert images.returncode == 1 and "Traceback" not in images.stderr
    assert "No space left on device" in images.stderr.splitlines()[-1]
    store = write_store(tmp_path / "store", 512, {"blocks.0.input": (64,)}).with_suffix(".json")
    section = {"backbone": "vit", "site": "blocks.0.input", "d_sae": "1024", "k": "4", "epochs": "1", "threads": "1"}
    sae = stage("sae.py", full, name="x", from_images=__file__, from_store=store, from_backbone=__file__, **section)
    assert sae.returncode == 1 and "Traceback" not in sae.stderr
    assert "No space left on device" in sae.stderr.splitlines()[-1]


def test_read_only_results_stop_snakemake_with_one_line(small: Path) -> None:
    mount("-o", "remount,ro", str(small / "results"))
    error = one_line(snakemake(small, "--cores", "1"))
    assert "results: cannot write to 'results'" in error
