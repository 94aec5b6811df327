"""Records: what a stage read and what it wrote, in ``records/<stage>.json`` of the run's folder.

compute, config, seed   the settings that decide the result: two digests and the seed
code                    digest of the code that decides it, without comments and docstrings
inputs, outputs         sha256 of every file read or written, by its path from the run's folder
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsight.common.digests import digest, file_digest
from sparsight.config import Compute

VOLATILE = {"timings.json", "provenance.json"}
"""Files with times and host names, which differ between equal runs."""


def settings(compute: Compute, section: Any, seed: int, code: str) -> dict[str, Any]:
    """The settings and the code that decide a stage's result, as its record holds them."""
    config = digest(section) if section is not None else None
    return {"compute": digest(compute.of_stage(section)), "config": config, "seed": seed, "code": code}


def content(
    settings: dict[str, Any], inputs: Mapping[Path, str], outputs: Mapping[Path, Path], path: Path
) -> dict[str, Any]:
    """Content of a stage's record.

    Args:
        settings: see :func:`settings`.
        inputs: sha256 of every file that the stage has read.
        outputs: files that the stage has written, by their final paths.
        path: final path of the record. Files are named by their paths from the folder above the record's.
    """
    digests = {place: file_digest(file) for place, file in outputs.items() if place.name not in VOLATILE}
    return {
        **settings,
        "inputs": {os.path.relpath(place, path.parent.parent): digest for place, digest in inputs.items()},
        "outputs": {os.path.relpath(place, path.parent.parent): digest for place, digest in digests.items()},
    }
