"""One run that stores all tokens at one site and class tokens at another, against two runs that store one of them."""

import base64
import gzip
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import workspace
from runs import TINY_RUN, run_in_one_process

from sparsight.activations.store import ActivationStore

pytestmark = pytest.mark.slow

PATCHES, CLASS = {"site": "blocks.1.input", "tokens": "all"}, "blocks.2.input"
SMALL = {"d_sae": 48, "k": 4, "seeds": [0], "epochs": 2, "batch_size": 128, "lr": 1e-3}
COMMON: dict[str, Any] = {
    "run": "tiny",
    "compute": {"threads": 1},
    "backbones": {
        "vit": {
            "architecture": {
                "img_size": 28, "patch_size": 7, "in_chans": 1, "embed_dim": 24, "depth": 3, "num_heads": 6,
            },
            "epochs": 1, "batch_size": 64, "lr": 2e-3,
        },
        "clip": None,
    },
    "saes": {"switch": None, "resae": None, "plain": None},
    "report": {"images": 4},
}  # fmt: skip
OF_PATCHES = {"patches": {"backbone": "vit", "site": PATCHES["site"], "tokens": "patches", **SMALL}}
OF_CLASS = {"topk": {"site": CLASS, **SMALL}}
STEERED: dict[str, Any] = {
    "policies": {"heads": {"epochs": 1}},
    "steering": {"class-latents": {"latents": 3, "strengths": [2, 10]}},
    "pruning": {"strengths": [2, 30], "latents": [1, 3], "bias_strengths": [1, 5]},
}
UNSTEERED: dict[str, Any] = {"policies": {"heads": None}, "steering": {"class-latents": None}, "pruning": None}
RUNS: dict[str, tuple[list[Any], dict[str, Any], dict[str, Any]]] = {
    "mixed": ([PATCHES, CLASS, "embedding"], {**OF_PATCHES, **OF_CLASS}, STEERED),
    "patches": ([PATCHES, "embedding"], {**OF_PATCHES, "topk": None}, UNSTEERED),
    "class": ([CLASS, "embedding"], OF_CLASS, STEERED),
}
"""By run: sites, SAEs, what steers."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The results of each run."""
    made = {}
    for name, (sites, saes, steering) in RUNS.items():
        folder = tmp_path_factory.mktemp(name)
        overlay = COMMON | steering | {"activations": {"sites": sites}, "saes": COMMON["saes"] | saes}
        (folder / "overlay.yaml").write_text(yaml.safe_dump(overlay))
        made[name] = run_in_one_process(workspace(folder / "run", folder / "overlay.yaml")) / TINY_RUN
    return made


def unpacked(page: str, name: str, directory: dict[str, list[Any]], array: str) -> np.ndarray:
    """An array of a pack of the page."""
    text = re.search(rf'<script id="pack-{name}" type="text/plain">(.*?)</script>', page, re.DOTALL)
    assert text is not None
    kind, first, size = directory[array]
    data = gzip.decompress(base64.b64decode(text[1]))
    return np.frombuffer(data, {"Uint8": "<u1", "Uint16": "<u2"}[kind], size, first)


def results(run: Path, *folders: str) -> dict[str, Any]:
    """Files of these folders by path; of JSON files all but where they come from and what their section says."""
    found: dict[str, Any] = {}
    for path in sorted(path for folder in folders for path in (run / folder).rglob("*") if path.is_file()):
        found[path.relative_to(run).as_posix()] = path.read_bytes()
        if path.suffix == ".json":
            content = json.loads(path.read_bytes())
            for key in ("record", "store_digest", "training"):
                content.pop(key, None)
            found[path.relative_to(run).as_posix()] = content
    return found


def test_its_numbers_are_those_of_two_separate_runs(runs: dict[str, Path]) -> None:
    for name, site, folders in (
        ("patches", PATCHES["site"], ["saes/patches-s0", "backbones"]),
        ("class", CLASS, ["saes/topk-s0", "steering", "pruning"]),
    ):
        mixed, alone = results(runs["mixed"], *folders), results(runs[name], *folders)
        assert mixed == alone and len(mixed) >= 6
        for split in ("train", "val", "test"):
            store, other = (runs[run] / "activations" / "vit" / f"{split}.zarr" for run in ("mixed", name))
            for place in (site, "embedding"):
                assert results(store, place) == results(other, place)
                stores = [ActivationStore.open(path).manifest["sites"][place] for path in (store, other)]
                assert stores[0] == stores[1]
    assert {"pruning/heads/overall.parquet", "pruning/heads/metrics.json"} <= results(runs["mixed"], "pruning").keys()
    assert "steering/class-latents-s0.parquet" in results(runs["mixed"], "steering")


def test_the_report_has_heat_maps_of_the_patch_sae_alone(runs: dict[str, Path]) -> None:
    page = (runs["mixed"] / "report" / "index.html").read_text()
    data = re.search(r'<script id="latents-data" type="application/json">(.*?)</script>', page, re.DOTALL)
    assert data is not None
    saes = {one["name"]: one for one in json.loads(data[1])["saes"]}
    tops = {name: one["parts"]["top"] for name, one in saes.items()}
    assert {name: "heats" in top for name, top in tops.items()} == {"patches-s0": True, "topk-s0": False}
    heats = unpacked(page, "patches-s0:top", tops["patches-s0"], "heats").reshape(-1, 16)
    images = unpacked(page, "patches-s0:top", tops["patches-s0"], "images")
    assert len(heats) == len(images) and saes["patches-s0"]["side"] == 4
    shown = heats[images != 2**16 - 1]
    assert len(shown) > 100 and (shown.max(axis=1) > 0).all() and shown.max() == 255
    assert "blocks.1.input (all), blocks.2.input (cls), embedding" in page
