"""Writes docs/configuration.md from the dataclasses of sparsight.config: python docs/build.py."""

import dataclasses
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from sparsight import config
from sparsight.config import schema

SECTIONS = {
    "compute": config.Compute,
    "images": config.Images,
    "backbones.<name>": config.Backbone,
    "activations": config.Activations,
    "saes.<name>": config.Sae,
    "policies.<name>": config.Policy,
    "steering.<name>": config.Steering,
    "pruning": config.Pruning,
    "report": config.Report,
}
HEAD = """# Configuration

Made by `python docs/build.py`. Two keys stand alone: `run`, the folder under `results/`, and `seed`, from which every
random number is derived. A stage sees its own section alone, so a change reruns that stage and what follows it.
"""


def page() -> str:
    """The text of docs/configuration.md."""
    parts = [HEAD]
    for name, cls in SECTIONS.items():
        docs = schema.field_docs(cls)
        lines = [f"## `{name}`", "", f"{cls.__doc__}", "", "| key | type | default | |", "|---|---|---|---|"]
        for field in dataclasses.fields(cls):
            kind = _kind(field.type)
            default = field.default
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            shown = "required" if default is dataclasses.MISSING else f"`{_plain(default)}`"
            lines.append(f"| `{field.name}` | {kind} | {shown} | {docs[field.name]} |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _kind(hint: Any) -> str:
    """A type in words."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " or ".join(map(str, arguments))
    if origin is tuple:
        return f"list of {_kind(arguments[0])}"
    if origin is dict:
        return f"keys to {_kind(arguments[1])}"
    if arguments:  # X | None
        return " or ".join("null" if a is type(None) else _kind(a) for a in arguments)
    return str(hint.__name__)


def _plain(value: object) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(map(str, value)) + "]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


if __name__ == "__main__":
    (Path(__file__).parent / "configuration.md").write_text(page())
