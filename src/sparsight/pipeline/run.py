"""A run: every section of the configuration, checked by itself and against other sections."""

import dataclasses
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sparsight.common import tokens
from sparsight.common.errors import SparsightError
from sparsight.config import (
    Activations,
    Attribution,
    Backbone,
    Compute,
    Disentangle,
    Images,
    Policy,
    Pruning,
    Report,
    Sae,
    Spurious,
    Steering,
)  # fmt: skip
from sparsight.config.bounds import CountOrZero, bounds_of, check
from sparsight.config.schema import check_keys, parse
from sparsight.config.twice import check_no_key_twice
from sparsight.pipeline.controls import names_of, with_controls
from sparsight.pipeline.links import check_links


@dataclass(frozen=True)
class Run:
    """A whole configuration, checked section by section and across sections."""

    run: str
    seed: CountOrZero
    compute: Compute
    images: Images
    other_images: dict[str, Images]
    backbones: dict[str, Backbone]
    activations: Activations
    saes: dict[str, Sae]
    policies: dict[str, Policy]
    steering: dict[str, Steering]
    disentangle: dict[str, Disentangle]
    attribution: dict[str, Attribution]
    spurious: dict[str, Spurious]
    pruning: Pruning | None
    report: Report

    @property
    def folder(self) -> Path:
        """Folder of the run's results."""
        return Path("results") / self.run

    @cached_property
    def grids(self) -> dict[str, list[str]]:
        """By section, the folders in ``saes`` of its SAEs, which are trained together."""
        return {
            name: [f"{name}-s{seed}/{site}".removesuffix(f"/{s.site}") for seed in s.seeds for site in s.places]
            for name, s in self.saes.items()
        }

    @cached_property
    def shapes(self) -> dict[tuple[str, ...], list[str]]:
        """The sections of ``saes`` with the same seeds and sites, by the suffixes of their folders.

        Suffixes are ``-s0``, ``-s1`` and so on, for chains ``-s0/blocks.2.input`` and so on.
        """
        by_suffixes: dict[tuple[str, ...], list[str]] = {}
        for section, names in self.grids.items():
            by_suffixes.setdefault(tuple(name.removeprefix(section) for name in names), []).append(section)
        return by_suffixes

    @cached_property
    def sae_names(self) -> dict[str, Sae]:
        """The section of every SAE of one site, by the name of its folder (<section>-s<seed>)."""
        return {f"{name}-s{seed}": s for name, s in self.saes.items() if not s.sites for seed in s.seeds}

    @cached_property
    def chains(self) -> dict[str, Sae]:
        """The section of every ReSAE chain, by the name of its folder (<section>-s<seed>)."""
        return {f"{name}-s{seed}": s for name, s in self.saes.items() if s.sites for seed in s.seeds}

    def tokens_of(self, name: str) -> str:
        """The tokens that the SAEs of a section read.

        Raises:
            SparsightError: a site that does not hold them.
        """
        section, stored = self.saes[name], self.activations.tokens_by_site
        try:
            return tokens.chosen(section.tokens, {site: stored[site] for site in section.places})
        except SparsightError as error:
            raise SparsightError(f"saes.{name}.{error}") from None

    def namer_of(self, backbone: str) -> list[str]:
        """The image-text model that names the latents of a backbone's SAEs: itself, or else the run's first; or none.

        It needs stored embeddings.
        """
        models = [name for name, section in self.backbones.items() if section.reads_text]
        if "embedding" not in self.activations.tokens_by_site:
            return []
        return [backbone] if backbone in models else models[:1]

    @cached_property
    def repeated(self) -> list[str]:
        """The sections of ``saes`` with several seeds, whose SAEs can be compared."""
        return [name for name, section in self.saes.items() if len(section.seeds) > 1]

    @cached_property
    def localised(self) -> list[str]:
        """The sections of ``saes`` that are compared with masks: SAEs of one site on patches, if images have masks."""
        single = [name for name, section in self.saes.items() if not section.sites]
        return [name for name in single if self.images.has_masks and self.tokens_of(name) == "patches"]

    @cached_property
    def transfers(self) -> list[str]:
        """The steering results that are also run on other images: VS2 on a model that classifies."""
        return [
            name
            for name, sae in self.steering_names.items()
            if self.steering[name.rpartition("-s")[0]].kind == "vs2"
            and self.backbones[self.sae_names[sae].backbone].classifies
        ]

    @cached_property
    def steering_names(self) -> dict[str, str]:
        """Every steering result (<section>-s<seed>) and the SAE folder it uses."""
        return {
            f"{name}-s{seed}": f"{section.sae}-s{seed}"
            for name, section in self.steering.items()
            for seed in self.saes[section.sae].seeds
        }

    @cached_property
    def steering_seeds(self) -> dict[tuple[int, ...], list[str]]:
        """The sections of ``steering`` by the seeds of their SAEs."""
        by_seeds: dict[tuple[int, ...], list[str]] = {}
        for name, section in self.steering.items():
            by_seeds.setdefault(self.saes[section.sae].seeds, []).append(name)
        return by_seeds

    @cached_property
    def steered(self) -> list[str]:
        """Folders in ``saes`` of the SAEs that pruning steers with."""
        section = self.pruning.steering if self.pruning else None
        return [sae for name, sae in self.steering_names.items() if name.rpartition("-s")[0] == section]


def load_run(config: Mapping[str, Any], files: Iterable[str | Path] = ()) -> Run:
    """Validate a merged configuration (params.yaml with its overlays).

    ``null`` in an overlay removes a named section (in other_images, backbones, saes, policies, steering,
    disentangle, attribution or spurious) and every section that depends on it. Without policies, ``pruning`` may be
    null too.

    Args:
        config: the configuration.
        files: those that it was merged from; in none of them may a key stand twice.

    Raises:
        SparsightError: an unknown key, a wrong type, an invalid value, sections that do not fit together, or a key that
            stands twice.
    """
    check_no_key_twice(files)
    fields = {f.name: f for f in dataclasses.fields(Run)}
    check_keys(config, fields, "configuration")
    for key in fields:
        if key not in config:
            raise SparsightError(f"configuration: the section {key!r} is missing")
    values: dict[str, Any] = {}
    for name, kind in (("run", str), ("seed", int)):
        if not isinstance(config[name], kind) or isinstance(config[name], bool):
            raise SparsightError(f"configuration: {name}: expected {kind.__name__}, got {config[name]!r}")
        values[name] = config[name]
    if bounds := bounds_of(CountOrZero):
        check(bounds, values["seed"], "configuration: seed")
    single: dict[str, type] = {
        "compute": Compute,
        "images": Images,
        "activations": Activations,
        "pruning": Pruning,
        "report": Report,
    }
    named: dict[str, type] = {
        "other_images": Images,
        "backbones": Backbone,
        "saes": Sae,
        "policies": Policy,
        "steering": Steering,
        "disentangle": Disentangle,
        "attribution": Attribution,
        "spurious": Spurious,
    }
    for name, cls in single.items():
        values[name] = None if (name, config[name]) == ("pruning", None) else parse(cls, config[name], name)
    dropped: dict[str, set[str]] = {}
    for name, cls in named.items():
        if not isinstance(config[name], Mapping):
            raise SparsightError(f"{name}: expected named sections, got {config[name]!r}")
        remaining = _left(name, config, dropped)
        values[name] = {key: parse(cls, section, f"{name}.{key}") for key, section in remaining.items()}
    values["saes"], values["backbones"] = with_controls(values["saes"], values["backbones"])
    run = Run(**values)
    check_links(run)
    return run


_READS = {
    "saes": {"backbone": "backbones", "judge": "backbones"},
    "policies": {"backbone": "backbones"},
    "steering": {"sae": "saes", "layers": "saes", "neighbour_backbone": "backbones"},
    "disentangle": {"sae": "saes"},
    "attribution": {"sae": "saes"},
    "spurious": {"sae": "saes"},
}
"""By kind of section, the keys that name another section, and the kind of that section."""


def _left(kind: str, config: Mapping[str, Any], dropped: dict[str, set[str]]) -> dict[str, Any]:
    """The named sections of a kind that are not removed. Names of removed sections are added to ``dropped``."""
    removed = {
        name
        for name, section in config[kind].items()
        if section is None
        or (
            isinstance(section, Mapping)
            and any(_names(section.get(key)) & dropped[target] for key, target in _READS.get(kind, {}).items())
        )
    }
    dropped[kind] = removed.union(*map(names_of, removed)) if kind == "saes" else removed
    return {name: section for name, section in config[kind].items() if name not in removed}


def _names(value: Any) -> set[Any]:
    """The section or sections that a key names; a value of a wrong type is left to the parser."""
    return {name for name in (value if isinstance(value, list | tuple) else [value]) if isinstance(name, str)}


def check_writable(folder: Path) -> None:
    """Raise SparsightError if results could not be written, before any work starts. Nothing is written."""
    there = next(path for path in (folder, *folder.parents) if path.exists())  # the last of them is "."
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise SparsightError(f"results: cannot write to {str(there)!r}; free the name or mend its permissions")
