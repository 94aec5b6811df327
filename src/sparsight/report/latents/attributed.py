"""What the attribution of class logits says of each latent, for its page.

Shapes: F latents (d_sae).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparsight.common import tables

CLASSES = 6
"""Classes listed per latent, of the largest attributions of either sign."""


class Attributed:
    """Mean attributions by SAE, latent and class; of an SAE that several results are about, those of the first.

    Args:
        paths: ``<name>.parquet`` of every result, beside its ``<name>-latents.parquet``.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._rows: dict[str, list[dict[str, Any]]] = {}
        for path in paths:
            found: dict[str, list[dict[str, Any]]] = {}
            for row in tables.read(path.with_name(f"{path.stem}-latents.parquet")):
                found.setdefault(row["sae"], []).append(row)
            self._rows = found | self._rows

    def facts(self, sae: str, n_latents: int) -> dict[str, np.ndarray]:
        """Classes (F, 6), -1 for none, and attributions (F, 6), largest first; nothing for an SAE without a result."""
        if sae not in self._rows:
            return {}
        classes = np.full((n_latents, CLASSES), -1, np.int32)
        values = np.zeros((n_latents, CLASSES), np.float32)
        by_latent: dict[int, list[dict[str, Any]]] = {}
        for row in self._rows[sae]:
            by_latent.setdefault(row["latent"], []).append(row)
        for latent, rows in by_latent.items():
            largest = sorted(rows, key=lambda row: -abs(row["attribution"]))[:CLASSES]
            for place, row in enumerate(sorted(largest, key=lambda row: -row["attribution"])):
                classes[latent, place], values[latent, place] = row["class"], row["attribution"]
        return {"attributed": classes, "attributions": values}
