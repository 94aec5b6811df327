"""Which of a run's SAEs its report is about."""

from collections.abc import Mapping
from typing import Any


def main_steering(run: Mapping[str, Any]) -> str | None:
    """The steering section of pruning, else the first one; None without any. Those of controls do not count.

    Args:
        run: the run's configuration.
    """
    named = (run.get("pruning") or {}).get("steering")
    controls = {name for name, section in (run.get("saes") or {}).items() if (section or {}).get("control_of")}
    steering = {name: section for name, section in (run.get("steering") or {}).items() if section}
    wanted = [name for name, section in steering.items() if section.get("sae") not in controls]
    return named if named in wanted else next(iter(wanted), None)


def main_section(run: Mapping[str, Any]) -> str | None:
    """The section of SAEs that the main steering section uses; None without steering."""
    steering = main_steering(run)
    return None if steering is None else run["steering"][steering]["sae"]
