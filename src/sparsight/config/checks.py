"""Checks of field values, shared by all sections; each raises SparsightError."""

import dataclasses
import json
from typing import Any, get_type_hints

from sparsight.common.errors import SparsightError
from sparsight.config.bounds import bounds_of, check


class Section:
    """Base of the sections: every number must lie within the bounds in the type of its field."""

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self), include_extras=True).items():
            if bounds := bounds_of(hint):
                check(bounds, getattr(self, name), name)


def rising(section: Any, *names: str) -> None:
    """Check that each named field holds one or more rising numbers."""
    for name in names:
        values = list(getattr(section, name))
        if not values or values != sorted(set(values)):
            raise SparsightError(f"{name}: give at least one, rising; got {values}")


def only_if(read: bool, reader: str, section: Any, *names: str) -> None:
    """Check that settings are read: unless ``read``, each named field must have its default.

    Args:
        read: whether the section's other fields make a stage read these fields.
        reader: what reads them, for the message.
        section: the section.
        names: the fields.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(section)}
    ignored = [name for name in names if not read and getattr(section, name) != defaults[name]]
    if ignored:
        default = ", ".join(f"{name}: {json.dumps(defaults[name])}" for name in ignored)
        raise SparsightError(
            f"{', '.join(ignored)}: would be ignored, because only {reader} reads it; leave it out, or set the default "
            f"({default})"
        )
