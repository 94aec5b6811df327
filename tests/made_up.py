"""A run of random SAEs on made-up images and activations, with the files that the pages of latents and images read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import write_store
from PIL import Image
from safetensors.numpy import save_file

from sparsight import config, sae
from sparsight.activations.store import ActivationStore
from sparsight.common import tables
from sparsight.common.files import write_json
from sparsight.images.manifest import Manifest, write_manifest
from sparsight.sae.metrics.firing import ByClass, Firing, class_columns
from sparsight.sae.metrics.geometry import nearest
from sparsight.sae.metrics.sparse_codes import from_codes, pooled

D, SIDE, HEADS = 16, 4, 3
NOWHERE = (
    "saes",
    "chains",
    "stabilities",
    "steerings",
    "transfers",
    "disentanglings",
    "localisations",
    "attributions",
    "spurious",
    "policies",
)
"""Inputs of the page of which the made-up run has none."""


def made_up(folder: Path, n: int, saes: Mapping[str, tuple[str, int]], main: str, pixels: int = 28) -> dict[str, Any]:
    """Make a run of ``n`` test images; returns the inputs of the page.

    Args:
        folder: the run's folder.
        n: number of test images.
        saes: by name, the tokens that it reads (``cls`` or ``patches``) and its number of latents.
        main: the section that pruning steers with.
        pixels: side of the images.
    """
    _pictures(folder / "pictures", n, pixels)
    source = config.Images(source="folder", path=str(folder / "pictures"))
    (folder / "images").mkdir()
    write_manifest(source, 0, {}, 2, folder / "images" / "manifest.parquet")
    manifest = Manifest(folder / "images" / "manifest.parquet")
    stores = {}
    for tokens, shape in (("cls", (D,)), ("patches", (SIDE**2, D))):
        place = folder / "activations" / tokens
        write_store(place, n, {"blocks.0.output": shape}, tokens)
        for kind in ("zarr", "json"):
            (place / f"train.{kind}").rename(place / f"test.{kind}")
        stores[tokens] = ActivationStore.open(place / "test.zarr")
        _backbone(folder / "backbones" / tokens, pixels)
    for seed, (name, (tokens, d_sae)) in enumerate(saes.items()):
        about = {"site": "blocks.0.output", "tokens": tokens, "backbone": tokens}
        one = sae.create("topk", D, d_sae, 4, seed=seed)
        with torch.no_grad():
            one.b_enc[: max(3, d_sae // 20)] = -1e3  # dead
        one.save(folder / "saes" / name, **about)
        _latents(one, stores[tokens], manifest, folder / "saes" / name, named=tokens == "cls")
    sections = {"steering": {"s": {"sae": main}}, "pruning": {"steering": "s"}}
    write_json(folder / "configuration.json", {"run": "made-up", **sections})
    (folder / "pruning" / "heads").mkdir(parents=True)
    pushes = {
        name: np.random.default_rng(0).standard_normal((HEADS, d_sae)).astype(np.float32)
        for name, (_, d_sae) in saes.items()
        if name.startswith(f"{main}-s")
    }
    save_file(pushes, folder / "pruning" / "heads" / "head_latents.safetensors")
    return {
        "images": folder / "images" / "manifest.parquet",
        "configuration": folder / "configuration.json",
        "backbones": [folder / "backbones" / tokens / "config.json" for tokens in stores],
        "stores": [folder / "activations" / tokens / "test.json" for tokens in stores],
        "latents": [folder / "saes" / name / "latents.parquet" for name in saes],
        "head_latents": [folder / "pruning" / "heads" / "head_latents.safetensors"],
        "test_images": [],
        **{kind: [] for kind in NOWHERE},
    }


def _pictures(folder: Path, n: int, pixels: int) -> None:
    """Coloured discs on slopes, of two classes; ``n`` for test and a few for the other splits."""
    generator = np.random.default_rng(0)
    y, x = np.mgrid[:pixels, :pixels] / pixels
    for split, count in (("train", 8), ("val", 8), ("test", n)):
        for i in range(count):
            place = folder / split / ("round", "flat")[i % 2]
            place.mkdir(parents=True, exist_ok=True)
            slope, color, (cy, cx) = generator.random((2, 3)), 255 * generator.random(3), generator.random(2)
            inside = (y - cy) ** 2 + (x - cx) ** 2 < 0.05
            rgb = 255 * (y[:, :, None] * slope[0] + x[:, :, None] * slope[1]) / 2
            if i % 2 == 0:
                rgb[inside] = color
            Image.fromarray(rgb.astype(np.uint8)).save(place / f"{i:05}.png", compress_level=1)


def _backbone(folder: Path, pixels: int) -> None:
    preprocess = {"size": [pixels, pixels], "channels": 3, "mean": [0.0] * 3, "std": [1.0] * 3}
    about = {"model": "made up", "weights": None, "n_blocks": 1, "n_heads": HEADS, "d_in": D, "training": "none"}
    folder.mkdir(parents=True)
    write_json(folder / "config.json", {**about, "accuracy": {}, "classes": [], "preprocess": preprocess})
    (folder / "training.jsonl").touch()


@torch.no_grad()
def _latents(one: sae.SAE, store: ActivationStore, manifest: Manifest, folder: Path, named: bool) -> None:
    """``latents.parquet`` of the test split."""
    rows, labels = store.rows("blocks.0.output"), manifest.split("test").labels
    firing, by_class = Firing(one.d_sae, 1.0), ByClass(one.d_sae, len(manifest.classes))
    for start in range(0, len(labels), 250):
        images = slice(start, min(start + 250, len(labels)))
        z = from_codes(one.encode(torch.from_numpy(rows.images(images.start, images.stop)).float()))
        firing.update(z)
        by_class.update(pooled(z, rows.tokens_per_image), labels[images])
    cosine, index = nearest(one.W_dec)
    columns = {
        "latent": np.arange(one.d_sae),
        "frequency": firing.frequency,
        "mean_activation": firing.mean,
        "max_activation": firing.largest,
        **class_columns(by_class, by_class),
        "monosemanticity": np.where(firing.count > 1, firing.frequency, np.nan),
        "nearest": index.numpy(),
        "nearest_cosine": cosine.double().numpy(),
        "histogram": firing.histogram,
    }
    table = [dict(zip(columns, row, strict=True)) for row in zip(*(c.tolist() for c in columns.values()), strict=True)]
    for i, row in enumerate(table if named else []):
        known = i % 3 == 0 and row["frequency"] > 0
        row |= {"name": f"word {i}" if known else None, "name_auroc": 0.5 + 0.4 * i / len(table), "name_null": 0.5}
    tables.write(folder / "latents.parquet", table)
