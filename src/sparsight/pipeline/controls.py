"""Sections that ``saes.<name>.controls`` stands for: SAEs, and backbones with random weights.

All other code sees ordinary sections. Those of controls name theirs in ``control_of``.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, get_args

from sparsight.common.errors import SparsightError
from sparsight.config import Backbone, Sae
from sparsight.config.backbone import RANDOM
from sparsight.config.sae import Control

_FROZEN: dict[str, dict[str, Any]] = {
    "frozen-decoder": {"frozen": "decoder"},
    "soft-frozen": {"frozen": "soft-decoder"},
    "frozen-encoder": {"frozen": "encoder"},
}
"""By control, the settings in which its section differs; ``random-weights`` differs in its backbone."""


def names_of(section: str) -> set[str]:
    """Names that controls of a section of SAEs may have."""
    return {f"{section}-{control}" for control in get_args(Control)}


def with_controls(
    saes: Mapping[str, Sae], backbones: Mapping[str, Backbone]
) -> tuple[dict[str, Sae], dict[str, Backbone]]:
    """All sections, each followed by its controls, and all backbones with those that controls need.

    Sections that are there already, as in the ``configuration.json`` of a run, stay.

    Raises:
        SparsightError: a control that is not possible for a section, or whose name is taken.
    """
    every_sae: dict[str, Sae] = {}
    every_backbone = dict(backbones)
    for name, section in saes.items():
        if section.control_of is not None:
            continue
        every_sae[name] = section
        for control in section.controls:
            derived = f"{name}-{control}"
            own = _FROZEN.get(control)
            if own is None:
                own = {"backbone": _random(section.backbone, backbones, every_backbone, f"saes.{name}")}
            try:
                every_sae[derived] = dataclasses.replace(section, **own, controls=(), control_of=name)
            except SparsightError as error:
                raise SparsightError(f"saes.{name}.controls: {control} is not possible: {error}") from None
            if saes.get(derived, every_sae[derived]) != every_sae[derived]:
                raise SparsightError(
                    f"saes.{derived}: is the name of a control of {name!r}; name this section otherwise"
                )
    for name in saes:
        if name not in every_sae:
            raise SparsightError(f"saes.{name}.control_of: is set by controls alone; leave it out")
    return every_sae, every_backbone


def _random(name: str, given: Mapping[str, Backbone], every: dict[str, Backbone], where: str) -> str:
    """The name of the backbone of this architecture with random weights, which is added to ``every``."""
    if name not in given:
        raise SparsightError(f"{where}.backbone: there is no {name!r}; known: {', '.join(given) or 'none'}")
    random, section = f"{name}-random", given[name]
    if section.model.startswith(("open_clip/hf-hub:", "open_clip/local-dir:")):
        raise SparsightError(
            f"{where}.controls: random-weights is not possible: {section.model} comes with its weights alone"
        )
    architecture = {key: value for key, value in section.architecture.items() if key != "num_classes"}
    every[random] = Backbone(section.model, RANDOM, architecture, "none")
    if given.get(random, every[random]) != every[random]:
        raise SparsightError(f"backbones.{random}: is the name of {name!r} with random weights; name it otherwise")
    return random
