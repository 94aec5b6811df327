"""What a run consisted of, stage by stage, and what each part of it read."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from sparsight.images.manifest import Manifest


class Part(NamedTuple):
    """A box of the graph: a section of the configuration."""

    name: str
    about: str
    reads: str


class Stage(NamedTuple):
    """A row of boxes, which read those of the rows above."""

    name: str
    section: str
    """Where the page says more; empty where it does not."""
    parts: list[Part]


def stages(manifest: Manifest, inputs: dict[str, Any]) -> list[Stage]:
    """The stages in order, without those that made nothing.

    Args:
        manifest: of the images.
        inputs: paths by name, as of :func:`sparsight.report.page.write_page`.
    """
    backbones = {path.parent.name: _read(path) for path in inputs["backbones"]}
    stores = {path.parent.name: _read(path) for path in inputs["stores"]}
    saes = [_read(path.with_name("config.json")) for path in inputs["saes"]]
    saes += [_read(next(path.parent.glob("*/config.json"))) for path in inputs["chains"]]
    steerings = [(path.stem, _read(path.with_suffix(".json"))) for path in inputs["steerings"]]
    sections = {_section(about["name"]): about["training"] for about in saes}
    steered = {_section(name): about for name, about in steerings}
    source = Part(manifest.about["source"], f"{len(manifest.table):,} images, {len(manifest.classes)} classes", "")
    found = [
        Stage("Images", "", [source]),
        Stage("Backbones", "backbones", [_backbone(name, about) for name, about in backbones.items()]),
        Stage("Activations", "", [_store(name, about) for name, about in stores.items()]),
        Stage("SAEs", "saes", [_sae(name, section) for name, section in sections.items()]),
        Stage("Steering", "steering", [Part(name, about["kind"], about["sae"]) for name, about in steered.items()]),
        Stage("Head policies", "pruning", [_policy(path) for path in inputs["policies"]]),
        Stage("Report", "", [Part("this page", "and metrics.json, the numbers alone", "all of these")]),
    ]
    return [stage for stage in found if stage.parts]


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


def _section(name: str) -> str:
    """The section of the configuration that one of its seeds belongs to."""
    return name.rpartition("-s")[0]


def _backbone(name: str, about: dict[str, Any]) -> Part:
    sizes = f"{about['n_blocks']} blocks of {about['n_heads']} heads, width {about['d_in']}"
    trained = about["training"] != "none"
    return Part(name, f"{about['model']}, {sizes}", "images" if trained else "")


def _store(name: str, about: dict[str, Any]) -> Part:
    return Part(name, f"{', '.join(about['sites'])}; tokens: {about['tokens']}", f"images, {name}")


def _sae(name: str, section: dict[str, Any]) -> Part:
    places = section["sites"] or [section["site"]]
    parts = [section["kind"], f"{section['d_sae']} latents", f"k {section['k']}", _count(section["seeds"], "seed")]
    if section["sites"]:
        parts.append(f"chain, maps {section['affine']}")
    return Part(name, ", ".join(parts), f"{section['backbone']}: {', '.join(places)}")


def _policy(path: Path) -> Part:
    about, metrics = _read(path.with_name("config.json")), _read(path)
    saes = dict.fromkeys(map(_section, metrics["fvu_on_pruned_stream"]))
    return Part(about["name"], f"decides in {_count(about['blocks'], 'block')}", ", ".join([about["backbone"], *saes]))


def _count(things: list[Any], name: str) -> str:
    return f"{len(things)} {name}{'' if len(things) == 1 else 's'}"
