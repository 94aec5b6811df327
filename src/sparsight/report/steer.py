"""What the sliders of an image's page need (scripts/steer.js), from the pruning stage: one pack of arrays per policy.

Shapes: n images, H heads, K active latents of an image, U latents active on any image, M masks.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from sparsight.report.latents.pack import Pack, pack

_BYTES = 1_500_000  # space in the page; with all masks of 12 heads it holds some hundred images


def panels(policies: Sequence[Path], rows: np.ndarray) -> dict[str, Any]:
    """The content of the page's JSON (``data``), and by name the texts beside it (``texts``).

    Args:
        policies: ``test_images.safetensors`` of every policy.
        rows: images in the page, by their row in the test split. The first that fit into the space are taken, of those
            that the pruning stage has written.
    """
    found: list[dict[str, Any]] = []
    texts: dict[str, str] = {}
    for path in policies if len(rows) else ():
        name = path.parent.name
        arrays, pushes = load_file(path), load_file(path.parent / "head_latents.safetensors")
        n, heads = arrays["head_logits"].shape
        made = _fitting(arrays, pushes, rows[rows < n], _BYTES // len(policies))
        texts[f"steer-{name}"] = made.text
        found.append({"name": name, "heads": heads, "saes": list(pushes), "directory": made.directory})
    return {"data": found, "texts": texts}


def _fitting(arrays: dict[str, np.ndarray], pushes: dict[str, np.ndarray], rows: np.ndarray, space: int) -> Pack:
    """The pack of as many of the rows as fit."""
    made = _packed(arrays, pushes, rows)
    while len(made.text) > space and len(rows) > 1:
        rows = rows[: min(len(rows) - 1, int(0.95 * len(rows) * space / len(made.text)))]
        made = _packed(arrays, pushes, rows)
    return made


def _packed(arrays: dict[str, np.ndarray], pushes: dict[str, np.ndarray], rows: np.ndarray) -> Pack:
    """The pack of these rows.

    It holds ``rows`` (n,), ``logits`` (n, H), ``predictions`` (n, M) if there are any. Each SAE, here the first, has
    ``latents0`` and ``codes0`` (n, K), with -1 and 0 after the active latents, ``used0`` (U,), the latents among them,
    and ``push0`` (U, H), their effects on the head logits per unit of their codes.
    """
    packed = {"rows": rows.astype(np.uint32), "logits": arrays["head_logits"][rows]}
    if "predictions" in arrays:
        packed["predictions"] = arrays["predictions"][rows]
    for i, (name, push_HF) in enumerate(pushes.items()):
        latents = arrays[f"{name}.latents"][rows]
        used = np.setdiff1d(latents, [-1])
        packed |= {f"latents{i}": latents, f"codes{i}": arrays[f"{name}.codes"][rows]}
        packed |= {f"used{i}": used.astype(np.int32), f"push{i}": push_HF.T[used]}
    return pack(packed)
