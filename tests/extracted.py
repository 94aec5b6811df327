"""Stores as the stages of extraction leave them, for tests that need the activations of a small model."""

from pathlib import Path
from typing import Any

from sparsight import config
from sparsight.activations.extract import extract
from sparsight.activations.store import ActivationStore
from sparsight.activations.writer import finish_store
from sparsight.backbones.backbone import Backbone
from sparsight.common.work import Work
from sparsight.config import Compute
from sparsight.images.manifest import Manifest

SPLITS = ("train", "val", "test")
Stores = dict[str, ActivationStore]


def extracted(backbone: Backbone, manifest: Manifest, folder: Path, **options: Any) -> Stores:
    """The stores of every split; ``options`` are those of the section ``activations``, float32 unless they say so."""
    section, found = config.Activations(**{"dtype": "float32", **options}), {}
    for split in SPLITS:
        with Work(folder / "work", split) as work:
            store = folder / f"{split}.zarr"
            extract(backbone, manifest.split(split), section, Compute(), work, store, 0, {"split": split})
            work.finish(folder)
        finish_store(store, [folder / f"{split}.part-0.json"], folder / f"{split}.json")
        found[split] = ActivationStore.open(store)
    return found
