"""Fixtures: small models, small image folders, and one small run of the whole pipeline."""

import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # as the stages do
os.environ.update(OMP_DYNAMIC="FALSE", MKL_DYNAMIC="FALSE", MKL_CBWR="AUTO")  # as the stages do: read at torch's import
os.environ.setdefault("TRITON_INTERPRET", "1")  # the kernels of the CUDA backend, on CPU tensors

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from unlabelled import unlabelled

from sparsight import backbones, config
from sparsight.activations.writer import Plan, StoreWriter, finish_store, shard_size
from sparsight.backbones.backbone import Backbone
from sparsight.config import Compute
from sparsight.images.manifest import Manifest, write_manifest
from sparsight.pipeline.stage import prepare_torch
from sparsight.sae import SAE, Trainer

pytest_plugins = ["browsers", "pretended_cuda", "runs"]
ROOT = Path(__file__).parent.parent
TINY = ROOT / "tests" / "tiny.yaml"


# Tests that may be skipped where everything else must run (--strict-skips), by the beginning of their reason.
MAY_SKIP = {
    "no CUDA device": "the machine has no card",
    "no real data": "the repository has none; docs/data.md says how to get it",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--strict-skips", action="store_true", help="fail if a test is skipped for an unlisted reason")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the tests of a shared run together: pytest-xdist gives what follows each other to one process."""
    runs = ("run_folder", "both_runs", "small", "recorded")

    def order(item: pytest.Item) -> int:
        names = getattr(item, "fixturenames", ())
        return next((i for i, run in enumerate(runs) if run in names), len(runs))

    items.sort(key=order)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for reason in _unlisted(terminalreporter) if config.getoption("--strict-skips") else ():
        terminalreporter.write_line(
            f"skipped for an unlisted reason (MAY_SKIP in tests/conftest.py): {reason}", red=True
        )


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if session.config.getoption("--strict-skips") and reporter and _unlisted(reporter):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _unlisted(reporter: pytest.TerminalReporter) -> list[str]:
    """Reasons of skipped tests that are not among those allowed."""
    reasons = [str(report.longrepr[2]).removeprefix("Skipped: ") for report in reporter.stats.get("skipped", [])]
    return sorted({reason for reason in reasons if not reason.startswith(tuple(MAY_SKIP))})


def script(path: str) -> ModuleType:
    """A script of the repository that belongs to no package, imported; it finds the modules beside it, as when run."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend((ROOT / path).parent)
        spec.loader.exec_module(module)
    return module


def data_folder() -> Path:
    """The real images and weights of docs/data.md; SPARSIGHT_DATA says where, if not in ``data``."""
    folder = Path(os.environ.get("SPARSIGHT_DATA") or ROOT / "data")
    if not folder.is_dir():
        pytest.skip("no real data; see docs/data.md")
    return folder


@pytest.fixture(scope="session", autouse=True)
def deterministic_torch() -> None:
    prepare_torch(Compute())


def make_backbone(seed: int = 0, classes: int = 5, **options: Any) -> Backbone:
    """A random ViT whose biases and layer scales are not zero, so that forgetting one of them shows."""
    torch.manual_seed(seed)
    sizes = {"img_size": 16, "patch_size": 4, "in_chans": 1, "embed_dim": 48, "depth": 3, "num_heads": 6, **options}
    backbone = backbones.load("timm/vit_tiny_patch16_224", None, classes, **sizes)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return backbone.requires_grad_(False)


@pytest.fixture
def backbone() -> Backbone:
    return make_backbone()


def make_folder(path: Path, per_class: int = 12, size: int = 16) -> Path:
    """An image folder of two classes, bright and dark."""
    generator = np.random.default_rng(0)
    for name, level in (("bright", 170), ("dark", 30)):
        (path / name).mkdir(parents=True)
        for i in range(per_class):
            pixels = generator.integers(level, level + 60, (size, size), dtype=np.uint8)
            Image.fromarray(pixels).save(path / name / f"{i:03}.png")
    return path


def make_manifest(folder: Path, per_class: int) -> Manifest:
    """The manifest of such a folder, read from ``folder``."""
    section = config.Images(source="folder", path=str(make_folder(folder / "images", per_class)))
    write_manifest(section, 0, {}, 2, folder / "m.parquet")
    return Manifest(folder / "m.parquet")


def workspace(path: Path, overlay: Path = TINY) -> Path:
    """A folder in which snakemake runs ``overlay`` as in the repository, with results of its own."""
    path.mkdir(parents=True, exist_ok=True)
    for name in ("Snakefile", "workflow", "profiles", "src", "params.yaml"):
        (path / name).symlink_to(ROOT / name)
    shutil.copy(overlay, path / "tiny.yaml")
    return path


def shared_folder(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that one process of the session makes and all of them read (pytest-xdist runs several)."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    finished = folder.with_name(f"{name}.finished")
    with FileLock(f"{folder}.lock"):
        if not finished.exists():
            make(folder)
            finished.touch()
    return folder


def snakemake(folder: Path, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run snakemake on the small configuration."""
    command = [sys.executable, "-m", "snakemake", "--configfile", "tiny.yaml", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, **options)


def write_store(
    folder: Path, n: int, shapes: Mapping[str, tuple[int, ...]], tokens: str = "cls", seed: int = 0, **plan: Any
) -> Path:
    """A store of random numbers, ``folder/train.zarr``; its second token, where there are several, is a register."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens_by_site = {site: site if site == "embedding" else tokens for site in shapes}
    shard_images = plan.get("shard_images", shard_size(n, 4))
    made = Plan(n, shapes, plan.get("dtype", "float16"), shard_images, tokens_by_site)
    writer, generator = StoreWriter(folder / "train.zarr", made, folder), np.random.default_rng(seed)
    records = {}
    for shard, images in enumerate(made.shards):
        size = images.stop - images.start
        values = {site: generator.standard_normal((size, *shape)).astype(made.dtype) for site, shape in shapes.items()}
        records[shard] = writer.write(shard, values, [])
    n_tokens = max(shape[0] for shape in shapes.values()) if tokens == "all" else 2
    positions = {"class": [0], "register": [1], "patches": [2, n_tokens]}
    about = {"split": "train", "token_positions": positions, "backbone": "vit"}
    part = folder / "train.part-0.json"
    part.write_text(json.dumps({"plan": dataclasses.asdict(made), "about": about, "shards": records}))
    finish_store(folder / "train.zarr", [part], folder / "train.json")
    part.unlink()
    return folder / "train.zarr"


def train_sae(one: SAE, batch: Callable[[int], torch.Tensor], steps: int) -> SAE:
    """The SAE after ``steps`` steps on ``batch(step)``."""
    trainer = Trainer([one], lr=3e-3)
    for step in range(steps):
        trainer.step(batch(step))
    return one


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The manifest's file of 80 labelled images of two classes."""
    folder = tmp_path_factory.mktemp("images")
    make_manifest(folder, per_class=40)
    return folder / "m.parquet"


@pytest.fixture
def bare(labelled: Path, tmp_path: Path) -> Manifest:
    """The same images without any label."""
    return unlabelled(labelled, tmp_path / "bare.parquet", "train", "val", "test")
