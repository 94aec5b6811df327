"""The chapter on a backbone."""

import json
from pathlib import Path
from typing import Any

from sparsight.report.figures import backbones as figures


def chapter(folder: Path) -> dict[str, Any]:
    """The chapter's metadata and figure, from the folder of the backbone."""
    metadata = json.loads((folder / "config.json").read_text())
    svg = figures.training(folder)
    return {"name": folder.name, "about": metadata, "figures": {f"backbone-{folder.name}": svg} if svg else {}}
