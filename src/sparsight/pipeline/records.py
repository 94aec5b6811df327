"""What a stage's result was made of and what was made: ``records/<stage>.json`` in the folder of the run.

compute, config, seed   what of the configuration decided it
inputs, outputs         sha256 of every file read and made, by its path from the run's folder
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsight.common.digests import digest, file_digest

VOLATILE = {"timings.json", "provenance.json"}
"""Files that hold times and hosts: equal runs differ in them."""


def settings(compute: Any, section: Any, seed: int) -> dict[str, Any]:
    """What of the configuration decides a stage's result, as its record holds it."""
    config = digest(section) if section is not None else None
    return {"compute": digest(compute), "config": config, "seed": seed}


def content(
    settings: dict[str, Any], inputs: Mapping[Path, str], outputs: Mapping[Path, Path], path: Path
) -> dict[str, Any]:
    """What a stage's record holds.

    Args:
        settings: see :func:`settings`.
        inputs: sha256 of every file that the stage has read.
        outputs: by the place where they will lie, the files that it has made.
        path: where the record will lie; files are named from the folder above its own.
    """
    digests = {place: file_digest(file) for place, file in outputs.items() if place.name not in VOLATILE}
    return {
        **settings,
        "inputs": {os.path.relpath(place, path.parent.parent): digest for place, digest in inputs.items()},
        "outputs": {os.path.relpath(place, path.parent.parent): digest for place, digest in digests.items()},
    }
