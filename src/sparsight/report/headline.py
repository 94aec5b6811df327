"""One line about a finished run, for the end of Snakemake's output. Nothing here is slow to import."""

import json
import re
from pathlib import Path


def headline(metrics: Path, main: str = "") -> str:
    """What an SAE of a run explains, beside its control: from ``metrics.json``, test split.

    The control of one SAE is as many principal components, that of a chain the affine maps alone. A run without SAEs
    has the accuracy of its backbone.

    Args:
        metrics: the file.
        main: name of the SAE; without it the first in the file.
    """
    flat: dict[str, float] = json.loads(metrics.read_text())

    def first(pattern: str) -> str:
        return next((name for key in flat if (name := "".join(re.findall(pattern, key)))), "")

    if name := main if f"sae.{main}.fvu_pca_k" in flat else first(r"^sae\.(.+)\.fvu_pca_k$"):
        fvu, control, l0 = (flat[f"sae.{name}.{key}"] for key in ("fvu", "fvu_pca_k", "l0"))
        return (
            f"SAE {name} leaves {100 * fvu:.1f} % of the variance unexplained with {l0:.0f} active latents, as many "
            f"principal components leave {100 * control:.1f} %"
        )
    if name := first(r"^chain\.(.+)\.fvu_affine$"):
        fvu, control = (flat[f"chain.{name}.{key}"] for key in ("fvu", "fvu_affine"))
        return (
            f"chain {name} leaves {100 * fvu:.1f} % of the variance unexplained, its affine maps alone leave "
            f"{100 * control:.1f} %"
        )
    if name := first(r"^backbone\.(.+)\.accuracy$"):
        return f"backbone {name} is right on {100 * flat[f'backbone.{name}.accuracy']:.1f} % of the test images"
    return "the run has neither SAEs nor labels"
