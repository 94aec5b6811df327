"""Whether training from another seed finds the same features.

For each pair of seeds of a section, and each site of a chain, decoder rows are matched one to one (:func:`matching`;
Paulo and Belrose 2025, arXiv 2501.16615). As a control, the same is done with as many random decoders of the same
shape. Their cosines are the chance level, which grows with F and shrinks with D.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparsight.common.files import write_json
from sparsight.common.progress import log
from sparsight.common.seeds import derive_seed
from sparsight.sae.base import load
from sparsight.sae.metrics.geometry import matching, random_rows


def write_stability(folders: Sequence[Path], seed: int, path: Path, record: dict[str, Any]) -> None:
    """Write, by site, mean, minimum and maximum over all pairs of seeds, and the control.

    Args:
        folders: folders of the SAEs of one section, of every seed and site.
        seed: seed of the random decoders.
        path: the JSON file to write.
        record: the stage's record, added to the file.
    """
    rows_of: dict[str, list[Any]] = {}
    for folder in folders:
        sae = load(folder)
        rows_of.setdefault(sae.about["site"], []).append(sae.W_dec)
    sites = {}
    for site, rows in rows_of.items():
        control = [random_rows(W_dec, derive_seed(seed, "stability", number)) for number, W_dec in enumerate(rows)]
        pairs, chance = (
            [matching(a, b) for a, b in itertools.combinations(decoders, 2)] for decoders in (rows, control)
        )
        metrics: dict[str, float] = {"saes": len(rows), "pairs": len(pairs), "matched": pairs[0]["matched"]}
        for key in ("cosine", "over_0.7"):
            values = [pair[key] for pair in pairs]
            metrics |= {key: float(np.mean(values)), f"{key}_min": min(values), f"{key}_max": max(values)}
            metrics[f"{key}_random"] = float(np.mean([pair[key] for pair in chance]))
        log(f"{site}: " + ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
        sites[site] = metrics
    write_json(path, {"sites": sites, "record": record})
