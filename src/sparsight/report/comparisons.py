"""Sections of SAEs whose seeds are taken together, and which of them belong into one figure.

The Snakefile asks too which figures there will be, so nothing here is slow to import.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

from sparsight.config import Sae

_Key = TypeVar("_Key", bound=Hashable)


@dataclass(frozen=True)
class Comparison:
    """A figure of several sections."""

    kind: Literal["tradeoff", "depth", "chains"]
    name: str
    members: tuple[str, ...]


def comparisons(sections: Mapping[str, Sae]) -> list[Comparison]:
    """What is comparable in a run.

    ``tradeoff``: two or more SAEs of one site; ``depth``: one kind of SAE at three or more sites; ``chains``: two or
    more chains over the same sites.
    """
    single = {name: section for name, section in sections.items() if not section.sites}
    chained = {name: section for name, section in sections.items() if section.sites}
    found = [
        Comparison("tradeoff", f"{backbone}-{site}", members)
        for (backbone, site), members in _alike(single, lambda s: (s.backbone, s.site)).items()
        if len(members) > 1
    ]
    alike = _alike(single, lambda s: (s.backbone, s.kind, s.d_sae, s.k, s.experts))
    found += [Comparison("depth", m[0], m) for m in alike.values() if len({single[name].site for name in m}) > 2]
    same_sites = _alike(chained, lambda s: (s.backbone, s.sites))
    return found + [Comparison("chains", members[0], members) for members in same_sites.values() if len(members) > 1]


def _alike(sections: Mapping[str, Sae], key: Callable[[Sae], _Key]) -> dict[_Key, tuple[str, ...]]:
    groups: defaultdict[_Key, tuple[str, ...]] = defaultdict(tuple)
    for name, section in sections.items():
        groups[key(section)] += (name,)
    return groups
