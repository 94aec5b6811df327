"""Images without labels: what to say of them, and what cannot be done with them."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from sparsight import config
from sparsight.common.errors import SparsightError
from sparsight.images.manifest import Manifest
from sparsight.images.split import Split


class Need(NamedTuple):
    """A section of the configuration that needs a label for every image of some splits."""

    section: str
    """Its dotted place, e.g. ``policies.heads``."""
    splits: tuple[str, ...]
    remedy: str
    """How to do without it, e.g. ``set policies.heads to null``."""


def needs(where: str, section: object) -> list[Need]:
    """What a section at the place ``where`` needs labels for: one entry or none."""
    every = ("train", "val", "test")
    match section:
        case config.Backbone() if section.epochs:
            return [Need(f"{where}.training", ("train", "val"), f"set {where}.epochs to 0, with trained weights")]
        case config.Sae() if section.prototype_weight:
            return [Need(f"{where}.prototype_weight", ("train",), f"set {where}.prototype_weight to 0")]
        case config.Steering(kind="class-latents") | config.Policy() | config.Pruning():
            return [Need(where, every, f"set {where} to null")]
    return []


def unlabelled(splits: Mapping[str, Split]) -> str:
    """The splits that lack labels, e.g. ``3 of 12 images of val``; empty if every image has one."""
    missing = {name: int((split.labels < 0).sum()) for name, split in splits.items()}
    return ", ".join(f"{n} of {len(splits[name])} images of {name}" for name, n in missing.items() if n)


def need_labels(manifest: Manifest, needs: Sequence[Need]) -> None:
    """Raise SparsightError, one line for all sections, unless the splits that they need are labelled."""
    splits = {name: manifest.split(name) for name in dict.fromkeys(name for need in needs for name in need.splits)}
    unmet = [need for need in needs if unlabelled({name: splits[name] for name in need.splits})]
    if unmet:
        sections, remedies = ", ".join(need.section for need in unmet), "; ".join(need.remedy for need in unmet)
        raise SparsightError(
            f"images: {unlabelled(splits)} have no label, which {sections} need{'s' * (len(unmet) == 1)}; "
            f"{remedies}; or label the images"
        )
