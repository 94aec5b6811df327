"""Sections of SAEs that are compared in one figure; the seeds of a section are averaged.

The workflow also uses this to list the figures, so nothing here is slow to import.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

from sparsight.config import Sae

_Key = TypeVar("_Key", bound=Hashable)


@dataclass(frozen=True)
class Comparison:
    """A figure that compares several sections."""

    kind: Literal["tradeoff", "depth", "chains"]
    name: str
    members: tuple[str, ...]


def comparisons(sections: Mapping[str, Sae]) -> list[Comparison]:
    """The comparisons that a run allows.

    ``tradeoff`` needs two or more SAEs of one site, ``depth`` one kind of SAE at three or more sites, trained here, and
    ``chains`` two or more chains over the same sites. SAEs of other tokens are not compared.
    """
    single = {name: section for name, section in sections.items() if not section.sites}
    chained = {name: section for name, section in sections.items() if section.sites}
    figures = [
        Comparison("tradeoff", "-".join(filter(None, (backbone, site, tokens))), members)
        for (backbone, site, tokens), members in _alike(single, lambda s: (s.backbone, s.site, s.tokens)).items()
        if len(members) > 1
    ]
    trained = {name: section for name, section in single.items() if section.weights is None}
    alike = _alike(trained, lambda s: (s.backbone, s.tokens, s.kind, s.d_sae, s.k, particulars(s)))
    figures += [
        Comparison("depth", members[0], members)
        for members in alike.values()
        if len({single[name].site for name in members}) > 2
    ]
    same_sites = _alike(chained, lambda s: (s.backbone, s.tokens, s.sites))
    return figures + [Comparison("chains", members[0], members) for members in same_sites.values() if len(members) > 1]


def particulars(section: Sae) -> tuple[str, ...]:
    """What else than kind and sizes distinguishes the SAEs of a section, in words."""
    words = {
        f"of {section.format}": section.format is not None,
        f"{section.experts} experts": section.experts is not None,
        f"{section.routing} routing": section.routing != "learned",
        f"{section.loss} loss": section.loss != "local",
        f"mutual {section.mutual:g}": section.mutual > 0,
        _FROZEN.get(section.frozen, ""): section.frozen != "none",
        "backbone of random weights": section.control_of is not None and section.frozen == "none",
        f"{section.candidates} candidates, delta {section.delta:g}": section.kind == "archetypal",
    }
    return tuple(word for word, applies in words.items() if applies)


_FROZEN = {"decoder": "frozen decoder", "soft-decoder": "soft-frozen decoder", "encoder": "frozen encoder"}


def _alike(sections: Mapping[str, Sae], key: Callable[[Sae], _Key]) -> dict[_Key, tuple[str, ...]]:
    groups: defaultdict[_Key, tuple[str, ...]] = defaultdict(tuple)
    for name, section in sections.items():
        groups[key(section)] += (name,)
    return groups
