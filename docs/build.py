"""Writes what docs takes from the code, configuration.md and architecture.svg: python docs/build.py."""

import dataclasses
import importlib
import tomllib
from html import escape
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import grimp

from sparsight import config
from sparsight.config import schema

DOCS = Path(__file__).parent
SECTIONS = {
    "compute": config.Compute,
    "images": config.Images,
    "backbones.<name>": config.Backbone,
    "activations": config.Activations,
    "saes.<name>": config.Sae,
    "policies.<name>": config.Policy,
    "steering.<name>": config.Steering,
    "disentangle.<name>": config.Disentangle,
    "attribution.<name>": config.Attribution,
    "spurious.<name>": config.Spurious,
    "pruning": config.Pruning,
    "report": config.Report,
}
HEAD = """# Configuration

Made by `python docs/build.py`. Two keys stand alone: `run`, the folder under `results/`, and `seed`, from which every
random number is derived. A stage sees its own section alone, so a change reruns that stage and what follows it.
"""


def configuration() -> str:
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
    if origin is Annotated:
        return f"{_kind(arguments[0])}, {arguments[1]}"
    if origin is Literal:
        return " or ".join(map(str, arguments))
    if origin is tuple:
        return f"list of {_kind(arguments[0])}"
    if origin is dict:
        return f"keys to {_kind(arguments[1])}"
    if arguments:  # X | None
        return "null or " + " or ".join(_kind(a) for a in arguments if a is not type(None))
    return str(getattr(hint, "form", hint.__name__))


def _plain(value: object) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(map(str, value)) + "]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def layers() -> list[str]:
    """The packages of sparsight from the top down, as the contract in pyproject.toml orders them."""
    about = tomllib.loads((DOCS.parent / "pyproject.toml").read_text())["tool"]["importlinter"]
    return [layer.partition(" | ")[0] for layer in about["contracts"][0]["layers"]]


def imports() -> dict[tuple[str, str], int]:
    """By importing and imported package, how many modules of the one import one of the other."""
    graph = grimp.build_graph("sparsight", exclude_type_checking_imports=True, cache_dir=None)
    counts: dict[tuple[str, str], int] = {}
    for module in sorted(graph.modules):
        found = {name.split(".")[1] for name in graph.find_modules_directly_imported_by(module) if "." in name}
        for package in found if "." in module else ():
            key = module.split(".")[1], package
            counts[key] = counts.get(key, 0) + 1
    return counts


CELL, TOP, LEFT, RIGHT = 30, 96, 112, 800  # pixels of a cell and of what surrounds the cells


def architecture() -> str:
    """The picture of docs/architecture.md: in the row of a package, how many of its modules import each other one."""
    names, counts = layers(), imports()
    width, height = LEFT + CELL * len(names) + RIGHT, TOP + CELL * len(names) + 8
    text = 'font-family="system-ui, sans-serif" font-size="13"'
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" {text}>',
        "<title>Which package imports which: every number stands right of the diagonal</title>",
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    for i, name in enumerate(names):
        x, y = LEFT + CELL * i, TOP + CELL * i
        doc = (importlib.import_module(f"sparsight.{name}").__doc__ or "").splitlines()[0]
        out += [
            f'<text x="{LEFT - 10}" y="{y + 20}" text-anchor="end" font-weight="600">{name}</text>',
            f'<text transform="translate({x + 20} {TOP - 8}) rotate(-60)">{name}</text>',
            f'<rect x="{x}" y="{y}" width="{CELL}" height="{CELL}" fill="#1b1b1f"/>',
            f'<text x="{LEFT + CELL * len(names) + 12}" y="{y + 20}" fill="#5b5b66">{escape(doc)}</text>',
        ]
        for j, other in enumerate(names):
            count = counts.get((name, other), 0)
            if i != j:
                fill = "#56b4e9" if count else "#f3f3f6"
                place = f'x="{LEFT + CELL * j}" y="{y}" width="{CELL}" height="{CELL}"'
                out.append(f'<rect {place} fill="{fill}" stroke="#fff"/>')
                if count:
                    out.append(f'<text x="{LEFT + CELL * j + 15}" y="{y + 20}" text-anchor="middle">{count}</text>')
    return "\n".join([*out, "</svg>"]) + "\n"


MADE = {"configuration.md": configuration, "architecture.svg": architecture}

if __name__ == "__main__":
    for file, make in MADE.items():
        (DOCS / file).write_text(make())
