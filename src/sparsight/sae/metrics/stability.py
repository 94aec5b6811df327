"""Whether training again, from another seed, finds the same features.

For every two seeds of a section (and site of a chain) decoder rows are matched one to one (:func:`matching`; Paulo and
Belrose 2025, arXiv 2501.16615). The same is done with as many random dictionaries of the same shape: what chance makes
of these numbers, which grows with F and shrinks with D.
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
    """Write, by site, means over all pairs of seeds, the least and largest of a pair, and the control.

    Args:
        folders: of SAEs of one section, of every seed and site.
        seed: of the random dictionaries.
        path: of the JSON file.
        record: what it was made of.
    """
    rows_of: dict[str, list[Any]] = {}
    for folder in folders:
        one = load(folder)
        rows_of.setdefault(one.about["site"], []).append(one.W_dec)
    sites = {}
    for site, rows in rows_of.items():
        control = [random_rows(one, derive_seed(seed, "stability", number)) for number, one in enumerate(rows)]
        pairs, chance = ([matching(a, b) for a, b in itertools.combinations(each, 2)] for each in (rows, control))
        found: dict[str, float] = {"saes": len(rows), "pairs": len(pairs), "matched": pairs[0]["matched"]}
        for key in ("cosine", "over_0.7"):
            values = [pair[key] for pair in pairs]
            found |= {key: float(np.mean(values)), f"{key}_min": min(values), f"{key}_max": max(values)}
            found[f"{key}_random"] = float(np.mean([pair[key] for pair in chance]))
        log(f"{site}: " + ", ".join(f"{name} {value:.4g}" for name, value in found.items()))
        sites[site] = found
    write_json(path, {"sites": sites, "record": record})
