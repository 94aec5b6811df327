"""sha256 of files and of JSON values in canonical form."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

FREE = {"free": True}
"""Metadata of a field that never changes the result of the stage that takes the section: it affects only speed, or
planning and later stages read it. Digests leave such fields out."""

LATER = {"later": True}
"""Metadata of a field that is younger than results. Digests leave it out at its default, so results keep theirs."""


def is_free(field: "dataclasses.Field[Any]") -> bool:
    """Whether a field has the metadata ``FREE``."""
    return bool(field.metadata.get("free"))


def digest(value: Any) -> str:
    """sha256 of a JSON value, or of a dataclass without its free fields, serialised with sorted keys."""
    plain = value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [field for field in dataclasses.fields(value) if not is_free(field)]
        held = [f for f in fields if not (f.metadata.get("later") and getattr(value, f.name) == f.default)]
        plain = {f.name: getattr(value, f.name) for f in held}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
