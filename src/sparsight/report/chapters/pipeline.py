"""The stages of a run, and what each of their parts reads."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from sparsight.common.tokens import EMBEDDING
from sparsight.images.manifest import Manifest


class Part(NamedTuple):
    """A box of the graph: a section of the configuration."""

    name: str
    about: str
    reads: str


class Stage(NamedTuple):
    """A row of boxes, which read the boxes of the rows above."""

    name: str
    section: str
    """The section of the page with details; empty if there is none."""
    parts: list[Part]


def stages(manifest: Manifest, inputs: dict[str, Any]) -> list[Stage]:
    """The stages in order, without empty ones.

    Args:
        manifest: the manifest of the images.
        inputs: paths by name, as for :func:`sparsight.report.page.write_page`.
    """
    backbones = {path.parent.name: _read(path) for path in inputs["backbones"]}
    stores = {path.parent.name: _read(path) for path in inputs["stores"]}
    saes = [_read(path.with_name("config.json")) for path in inputs["saes"]]
    saes += [_read(next(path.parent.glob("*/config.json"))) for path in inputs["chains"]]
    steerings = [(path.stem, _read(path.with_suffix(".json"))) for path in inputs["steerings"]]
    sections = {_section(metadata["name"]): metadata["training"] for metadata in saes}
    steered = {_section(name): metadata for name, metadata in steerings}
    listed, drawn = manifest.about["part"]["listed"], len(manifest) + len(manifest.about["skipped"])
    of = f" of {listed:,}" if drawn < listed else ""
    classes = f"{len(manifest.classes)} classes" if manifest.classes else "without labels"
    source = Part(manifest.about["source"], f"{len(manifest):,}{of} images, {classes}", "")
    all_stages = [
        Stage("Images", "", [source]),
        Stage("Backbones", "backbones", [_backbone(name, metadata) for name, metadata in backbones.items()]),
        Stage("Activations", "", [_store(name, metadata) for name, metadata in stores.items()]),
        Stage("SAEs", "saes", [_sae(name, section) for name, section in sections.items()]),
        Stage(
            "Steering",
            "steering",
            [Part(name, metadata["kind"], metadata["sae"]) for name, metadata in steered.items()],
        ),
        Stage("Disentangling", "disentangling", [_interchanges(path) for path in inputs["disentanglings"]]),
        Stage("Localisation", "localisation", [_localised(path) for path in inputs["localisations"]]),
        Stage("Attribution", "attribution", [_attribution(path) for path in inputs["attributions"]]),
        Stage("Spurious features", "spurious", [_spurious(path) for path in inputs["spurious"]]),
        Stage("Head policies", "pruning", [_policy(path) for path in inputs["policies"]]),
        Stage("Report", "", [Part("this page", "and metrics.json, the numbers alone", "all of these")]),
    ]
    return [stage for stage in all_stages if stage.parts]


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


def _section(name: str) -> str:
    """The section of the configuration, from the name of one of its seeds."""
    return name.rpartition("-s")[0]


def _backbone(name: str, about: dict[str, Any]) -> Part:
    sizes = f"{about['n_blocks']} blocks of {about['n_heads']} heads, width {about['d_in']}"
    trained = about["training"] != "none"
    return Part(name, f"{about['model']}, {sizes}", "images" if trained else "")


def _store(name: str, about: dict[str, Any]) -> Part:
    sites = (f"{site} ({entry['tokens']})" for site, entry in about["sites"].items() if site != EMBEDDING)
    whole = [EMBEDDING] if EMBEDDING in about["sites"] else []
    return Part(name, ", ".join([*sites, *whole]), f"images, {name}")


def _sae(name: str, section: dict[str, Any]) -> Part:
    places = section["sites"] or [section["site"]]
    parts = [section["kind"], f"{section['d_sae']} latents", f"k {section['k']}", _count(section["seeds"], "seed")]
    if section["sites"]:
        parts.append(f"chain, maps {section['affine']}")
    if section.get("control_of"):
        parts.append(f"control of {section['control_of']}")
    return Part(name, ", ".join(parts), f"{section['backbone']}: {', '.join(places)}")


def _interchanges(path: Path) -> Part:
    metadata = _read(path.with_suffix(".json"))
    return Part(path.stem, f"interchanges {' and '.join(metadata['attributes'])}", metadata["sae"])


def _localised(path: Path) -> Part:
    regions = _read(path.with_suffix(".json"))["regions"]
    return Part(path.stem, f"where latents fire, {len(regions)} classes of masks", f"images, {path.stem}")


def _attribution(path: Path) -> Part:
    metadata = _read(path.with_suffix(".json"))
    return Part(path.stem, f"class logits of {metadata['images']:,} test images", metadata["sae"])


def _spurious(path: Path) -> Part:
    metadata = _read(path.with_suffix(".json"))
    return Part(path.stem, f"{len(metadata['groups'])} groups by class and {metadata['group']}", metadata["sae"])


def _policy(path: Path) -> Part:
    metadata, metrics = _read(path.with_name("config.json")), _read(path)
    saes = dict.fromkeys(map(_section, metrics["fvu_on_pruned_stream"]))
    return Part(
        metadata["name"], f"decides in {_count(metadata['blocks'], 'block')}", ", ".join([metadata["backbone"], *saes])
    )


def _count(things: list[Any], name: str) -> str:
    return f"{len(things)} {name}{'' if len(things) == 1 else 's'}"
