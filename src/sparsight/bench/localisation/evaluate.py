"""Do latents fire where something is? The best feature for each region of the masks, chosen on train, scored on test.

Shapes: N patches, P patches of an image, D width (d_in).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from sparsight.activations.store import ActivationStore
from sparsight.backbones.backbone import Backbone
from sparsight.bench.localisation import candidates
from sparsight.bench.localisation.best import Best, Part, Scored, score
from sparsight.bench.localisation.regions import UNKNOWN, patch_grid, patch_regions
from sparsight.common import tables
from sparsight.common.errors import SparsightError
from sparsight.common.files import write_json
from sparsight.common.progress import log
from sparsight.common.seeds import derive_seed
from sparsight.common.work import Work
from sparsight.images.manifest import Manifest
from sparsight.sae.base import SAE

PATCHES = 2**18
"""Patches of a split at most: those of its first images, which are in random order."""
_LEAST_MAPS = 50
"""Valid maps that a feature needs to count in the mean of Moran's I over features; at most a tenth of the images."""
_TYPES = {"sae": pa.string(), "moran": pa.float64()}


@torch.no_grad()
def evaluate(
    saes: Mapping[str, SAE], backbone: Backbone, stores: Mapping[str, ActivationStore], manifest: Manifest, name: str,
    seed: int, threads: int, work: Work, record: dict[str, Any],
) -> None:  # fmt: skip
    """Write ``<name>.parquet`` and ``<name>.json`` (docs/localisation.md).

    Args:
        saes: SAEs of one section, which read patches, by name.
        backbone: their model.
        stores: stores of train and test.
        manifest: the images, which have masks.
        name: name of the result.
        seed: the run's seed.
        threads: number of threads that decode masks.
        work: the stage's working folder.
        record: origin of the result.

    Raises:
        SparsightError: a mask that is missing or changed, or no region that fills a patch of train and one of test.
    """
    first = next(iter(saes.values()))
    device, names = first.W_dec.device, manifest.about["masks"]["names"]
    grid = patch_grid(backbone.n_patches, backbone.preprocess.size)
    train, test = (_part(first, backbone, stores[split], manifest, split, grid, threads) for split in ("train", "test"))
    there = np.intersect1d(train.regions, test.regions)
    regions = there[there > 0].tolist()
    if not regions:
        raise SparsightError(
            f"localisation: none of {', '.join(names)} covers more than half of a patch of train and of one of test; "
            "use a model with smaller patches, or more images"
        )
    least_maps = min(_LEAST_MAPS, max(1, test.n_images // 10))

    def scored(some: candidates.Candidates, shuffle: int | None = None) -> Scored:
        return score(some, train, test, regions, device, least_maps, shuffle)

    fitted = candidates.shared(train.x, first.d_sae, device, derive_seed(seed, "localisation", "kmeans"))
    controls = {method: scored(some) for method, some in fitted.items()}
    rows = [row for method, one in controls.items() for row in _rows(method, None, one.best, names, train, test)]
    common = {"n_classes": len(regions), "n_images": test.n_images, "n_patches": int((test.regions != UNKNOWN).sum())}
    of_saes = {}
    for sae, one in saes.items():
        own = scored(candidates.of_sae(one), derive_seed(seed, "localisation", "shuffled", sae))
        drawn = candidates.random(one, train.x, derive_seed(seed, "localisation", "random", sae))
        random = scored(drawn)
        of_methods = {"sae": own.best, "random": random.best, "shuffled": own.shuffled}
        for method, best in of_methods.items():
            rows += _rows(method, sae, best, names, train, test)
        of_methods |= {method: one.best for method, one in controls.items()}
        flat: dict[str, float] = {**common}
        for method, best in of_methods.items():
            flat |= _means(method, best)
        flat |= {
            f"moran_all_{method}": one.moran
            for method, one in {"sae": own, "random": random, **controls}.items()
            if not math.isnan(one.moran)
        }
        of_saes[sae] = flat
        strongest = max(flat[f"ap_{method}"] for method in ("random", *controls))
        log(f"{sae}: average precision {flat['ap_sae']:.3f}, strongest control {strongest:.3f}")
    tables.write(work.out / f"{name}.parquet", rows, _TYPES)
    summary = {
        "site": first.about["site"], "tokens": first.about["tokens"], "grid": list(grid),
        "regions": [names[region - 1] for region in regions], "n_images_train": train.n_images,
        "least_maps": least_maps, "saes": of_saes,
    }  # fmt: skip
    write_json(work.out / f"{name}.json", {**summary, "record": record})


def _part(
    sae: SAE, backbone: Backbone, store: ActivationStore, manifest: Manifest, split: str, grid: tuple[int, int],
    threads: int,
) -> Part:  # fmt: skip
    """The patches of the first images of a split."""
    stored = store.rows(sae.about["site"], sae.about["tokens"])
    n_images = min(len(stored) // stored.tokens_per_image, max(1, PATCHES // stored.tokens_per_image))
    regions = patch_regions(manifest, split, n_images, backbone.preprocess, grid, threads)
    assert regions.shape[1] == stored.tokens_per_image
    return Part(torch.from_numpy(stored.images(0, n_images)), regions.ravel(), grid)


def _rows(
    method: str, sae: str | None, best: Sequence[Best], names: Sequence[str], train: Part, test: Part
) -> list[dict[str, Any]]:
    return [
        {
            "class": names[one.region - 1], "method": method, "sae": sae, "feature": one.feature, "sign": one.sign,
            "n_train": int((train.regions == one.region).sum()), "n": int((test.regions == one.region).sum()),
            "share": float((test.regions == one.region).sum() / (test.regions != UNKNOWN).sum()),
            "ap_train": one.ap_train, "ap": one.ap, "purity": one.purity,
            "moran": None if math.isnan(one.moran) else one.moran, "maps": one.maps,
        }
        for one in best
    ]  # fmt: skip


def _means(method: str, best: Sequence[Best]) -> dict[str, float]:
    """Means over the regions; without Moran's I if no feature has a valid map."""
    morans = [one.moran for one in best if not math.isnan(one.moran)]
    means = {"ap": np.mean([one.ap for one in best]), "purity": np.mean([one.purity for one in best])}
    if morans:
        means["moran"] = np.mean(morans)
    return {f"{key}_{method}": float(value) for key, value in means.items()}
