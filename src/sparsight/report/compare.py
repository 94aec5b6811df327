"""Two runs on one page: their numbers, their settings, and which latents they share."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np

from sparsight.common import tables
from sparsight.common.errors import SparsightError, reason
from sparsight.common.files import write_atomic
from sparsight.images.manifest import Manifest
from sparsight.sae.base import SAE, load
from sparsight.sae.metrics.geometry import MATCHED, pairs

_TEMPLATES = Path(__file__).parent / "templates"
_BINS = 20
_ROWS = 500
"""Matched latents that the page lists for one SAE; the histogram counts all of them."""


class Line(NamedTuple):
    """A number or a setting of both runs; None where a run does not have it."""

    name: str
    a: Any
    b: Any

    @property
    def difference(self) -> float | None:
        """B minus A."""
        return None if self.a is None or self.b is None else self.b - self.a


class Match(NamedTuple):
    """Two SAEs of the same name, their decoder rows matched one to one (docs/evaluation.md)."""

    name: str
    cosine: float
    """Mean over the pairs."""
    over: float
    """Share of the pairs above ``MATCHED``."""
    bars: list[int]
    """Pairs by cosine, in equal steps from 0 to 1; the few below 0 are in the first."""
    latents: list[dict[str, Any]]
    """The pairs, best first: ``a``, ``b``, ``cosine``, and the classes ``class_a``, ``class_b``."""
    hidden: int
    """Pairs that are not listed."""


def write_comparison(a: Path, b: Path, out: Path) -> None:
    """Write one offline page that compares two finished runs.

    Args:
        a: folder of a run, ``results/<run>``.
        b: that of another, or the same.
        out: the HTML file. Links to latents start in its folder.

    Raises:
        SparsightError: a folder without a finished run.
    """
    numbers = compared(_read(a, "metrics.json"), _read(b, "metrics.json"))
    settings = compared(flat(_read(a, "configuration.json")), flat(_read(b, "configuration.json")))
    found_a, found_b = saes(a), saes(b)
    names_a, names_b = (Manifest(run / "images" / "manifest.parquet").classes for run in (a, b))
    matched, unmatched = [], []
    for name in dict.fromkeys([*found_a, *found_b]):
        if name not in found_a or name not in found_b:
            unmatched.append(f"{name}: only in {b if name in found_b else a}")
            continue
        one, other = load(found_a[name]), load(found_b[name])
        if one.d_in != other.d_in:
            unmatched.append(f"{name}: of width {one.d_in} and {other.d_in}")
            continue
        latents_a, latents_b = _classes(found_a[name], names_a), _classes(found_b[name], names_b)
        matched.append(match(name, one, other, latents_a, latents_b))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template("compare.html.j2").render(
        a=a,
        b=b,
        groups=grouped(numbers),
        settings=[line for line in settings if line.a != line.b],
        matches=matched,
        unmatched=unmatched,
        threshold=MATCHED,
        page_a=os.path.relpath(a / "report" / "index.html", out.parent),
        page_b=os.path.relpath(b / "report" / "index.html", out.parent),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, lambda path: path.write_text(page))


def _read(run: Path, name: str) -> dict[str, Any]:
    try:
        return dict(json.loads((run / name).read_text()))
    except OSError as error:
        raise SparsightError(
            f"{run}: no finished run here ({reason(error)}: {name}); give two folders results/<run>, finished"
        ) from None


def flat(values: Mapping[str, Any], place: str = "") -> dict[str, Any]:
    """A configuration with dotted keys."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        out |= flat(value, f"{place}{key}.") if isinstance(value, Mapping) and value else {f"{place}{key}": value}
    return out


def compared(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Line]:
    """The values of both by name, in the order of ``a``; what only ``b`` has comes last."""
    return [Line(name, a.get(name), b.get(name)) for name in dict.fromkeys([*a, *b])]


def grouped(numbers: list[Line]) -> dict[str, list[Line]]:
    """The numbers by what they are about: the first word of their name."""
    groups: dict[str, list[Line]] = {}
    for line in numbers:
        groups.setdefault(line.name.split(".")[0], []).append(line)
    return groups


def saes(run: Path) -> dict[str, Path]:
    """The folders of a run's SAEs, those of chains included, by name."""
    root = run / "saes"
    return {path.parent.relative_to(root).as_posix(): path.parent for path in sorted(root.rglob("sae.safetensors"))}


def match(name: str, a: SAE, b: SAE, classes_a: Mapping[int, str], classes_b: Mapping[int, str]) -> Match:
    """The latents of two SAEs, matched by their decoder rows.

    Args:
        classes_a: for latents of ``a`` that have one, the class that they fire on most; ``classes_b`` likewise.
    """
    rows, columns, cosines = pairs(a.W_dec, b.W_dec)
    order = np.argsort(-cosines, kind="stable")
    latents = [
        {
            "a": int(rows[i]),
            "b": int(columns[i]),
            "cosine": float(cosines[i]),
            "class_a": classes_a.get(int(rows[i]), ""),
            "class_b": classes_b.get(int(columns[i]), ""),
        }
        for i in order[:_ROWS]
    ]
    bars, _ = np.histogram(cosines.clip(0, 1), _BINS, (0, 1))
    over = float((cosines > MATCHED).mean())
    return Match(name, float(cosines.mean()), over, bars.tolist(), latents, len(order) - len(latents))


def _classes(folder: Path, names: list[str]) -> dict[int, str]:
    """The class of each latent that has one."""
    path = folder / "latents.parquet"
    rows = tables.read(path) if path.exists() else []
    return {row["latent"]: names[row["best_class"]] for row in rows if row["best_class"] not in (None, -1)}
