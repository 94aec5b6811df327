"""Every number of the configuration has bounds, and every setting is read or refused."""

import argparse
import ast
import dataclasses
import math
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import pytest
from conftest import ROOT

from sparsight.common.errors import SparsightError
from sparsight.config import Activations, Backbone, Compute, Images, Policy, Pruning, Report, Sae, Steering, schema
from sparsight.config.bounds import Bounds, bounds_of
from sparsight.config.pruning import AMPLIFYING, CHOOSING
from sparsight.pipeline.run import Run
from sparsight.pruning.strategies import KINDS

REQUIRED: dict[type, dict[str, Any]] = {
    Activations: {"sites": ["embedding"]},
    Backbone: {"model": "timm/x", "epochs": 1},
    Compute: {},
    Images: {},
    Policy: {"backbone": "vit"},
    Pruning: {"steering": "s"},
    Report: {},
    Sae: {"backbone": "vit", "site": "embedding"},
    Steering: {"sae": "topk"},
}
"""Every section, with the keys that it needs."""
CLIP = {"model": "open_clip/x", "weights": "pretrained"}
AS_IS = {"model": "timm/x", "weights": "pretrained"}
PROBE = {"model": "timm/x", "epochs": 1, "training": "probe"}
CHAIN = {"site": None, "sites": ["blocks.0.input", "blocks.1.input"]}


def unbounded(hint: Any) -> list[Any]:
    """The numbers in a type that have no bounds."""
    if get_origin(hint) is Annotated and any(isinstance(about, Bounds) for about in get_args(hint)):
        return []
    return [hint] if hint in (int, float) else [one for part in get_args(hint) for one in unbounded(part)]


@pytest.mark.parametrize("cls", [*REQUIRED, Run], ids=lambda cls: cls.__name__)
def test_every_number_has_bounds(cls: type) -> None:
    assert unbounded(int | None) == unbounded(dict[str, int]) == [int] and unbounded(tuple[float, ...]) == [float]
    assert {name: unbounded(hint) for name, hint in get_type_hints(cls, include_extras=True).items()} == {
        field.name: [] for field in dataclasses.fields(cls)
    }


NUMBERS = [
    pytest.param(cls, name, hint, id=f"{cls.__name__}-{name}")
    for cls in REQUIRED
    for name, hint in get_type_hints(cls, include_extras=True).items()
    if bounds_of(hint)
]


def values(bounds: Bounds, whole: bool) -> tuple[list[float], list[float]]:
    """Numbers just within the bounds, and numbers that are not: just outside, and what is no number."""
    inside: list[float] = []
    outside = [math.nan, math.inf, -math.inf]
    for end, included, away in ((bounds.low, bounds.includes_low, -1), (bounds.high, bounds.includes_high, 1)):
        if end == math.inf:
            inside, outside = [*inside, 2**63 - 1 if whole else 1e308], [*outside, 2**63 if whole else 10**400]
        elif whole:
            inside, outside = [*inside, int(end)], [*outside, int(end) + away]
        else:
            beside = [math.nextafter(end, -away * math.inf), end, math.nextafter(end, away * math.inf)]
            inside, outside = [*inside, beside[included]], [*outside, beside[1 + included]]
    return inside, outside


@pytest.mark.parametrize(("cls", "name", "hint"), NUMBERS)
def test_numbers_outside_their_bounds_are_refused(cls: type, name: str, hint: Any) -> None:
    bounds, inner = bounds_of(hint), get_args(get_type_hints(cls)[name])
    assert bounds is not None
    whole = int in (get_type_hints(cls)[name], *inner)
    shape = get_origin(next((h for h in (hint, *get_args(hint)) if get_origin(h) in (tuple, dict)), None))

    def message(value: float) -> str:
        shaped: Any = [value] if shape is tuple else {"key": value} if shape is dict else value
        try:
            schema.parse(cls, {**REQUIRED[cls], name: shaped}, "section")
        except SparsightError as error:
            return str(error)
        return ""

    inside, outside = values(bounds, whole)
    for value in inside:
        assert "must be" not in message(value) and "expected" not in message(value), value
    for value in outside:
        got = message(value)
        assert got.startswith(f"section.{name}") and "\n" not in got, value
        assert f": must be {bounds}" in got or ": expected " in got, value


def test_bounds_are_shown_in_help(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    schema.add_arguments(parser, Policy)
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "Share of heads to keep on average in these blocks. (more than 0 and at most 1; default: 0.6)" in shown
    assert "(more than 0; default: None)" in shown


def test_every_field_is_read_outside_the_configuration() -> None:
    source = ROOT / "src" / "sparsight"
    files = [*source.rglob("*.py"), *(ROOT / "workflow" / "scripts").glob("*.py")]
    trees = [ast.parse(p.read_text()) for p in files if source / "config" not in p.parents]
    read = {
        node.attr
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    fields = {f"{cls.__name__}.{field.name}" for cls in REQUIRED for field in dataclasses.fields(cls)}
    assert {name for name in fields if name.partition(".")[2] not in read} == set()


IGNORED: list[tuple[type, dict[str, Any], str, Any]] = [
    *((Backbone, PROBE, name, 0.01) for name in ("rotate", "zoom", "shift")),
    (Backbone, PROBE, "flip", True),
    (Sae, {}, "affine", "zero"),
    (Sae, {}, "ridge", 0.1),
    *((Sae, CHAIN | {"affine": affine}, "ridge", 0.1) for affine in ("identity", "zero")),
    (Sae, {"aux_k": 0}, "aux_coefficient", 0.1),
    (Sae, {}, "experts", 2),
    (Sae, {}, "routing", "hash"),
    (Sae, {}, "candidates", 32),
    (Sae, {}, "format", "saev"),
    (Sae, {}, "normalized", True),
    (Sae, {}, "delta", 0.5),
    (Sae, {"kind": "switch"}, "prefixes", [0.5, 1]),
    *((Steering, {"kind": kind}, name, value) for kind in ("vs2", "vs2++")
      for name, value in (("latents", 3), ("ranking", "mean"), ("edit", "clamp"))),
    *((Steering, {"kind": kind}, name, value) for kind in ("class-latents", "vs2")
      for name, value in (("neighbours", 3), ("neighbour_backbone", "vit"))),
    *((Steering, {"kind": kind}, "quantiles", [0.5]) for kind in ("class-latents", "vs2++")),
    (Pruning, {"strategies": ["none", "logit-bias"]}, "strengths", [2]),
    (Pruning, {"strategies": ["none", "uniform"]}, "latents", [2]),
    (Pruning, {"strategies": ["none", "uniform"]}, "bias_strengths", [2]),
]  # fmt: skip
READ: list[tuple[type, dict[str, Any], str, Any]] = [
    (Backbone, {}, "rotate", 9),
    (Backbone, AS_IS, "lr", 0.01),  # an overlay that turns training off need not reset what it inherits
    (Backbone, AS_IS, "rotate", 9),
    (Backbone, PROBE, "lr", 0.01),
    (Backbone, CLIP, "batch_size", 8),
    (Sae, CHAIN | {"affine": "diagonal"}, "ridge", 0.1),
    (Sae, {"kind": "switch"}, "experts", 2),
    (Sae, {"kind": "switch"}, "routing", "random"),
    (Sae, {"kind": "archetypal"}, "candidates", 32),
    (Sae, {"kind": "archetypal"}, "delta", 0.5),
    (Sae, {"kind": "matryoshka"}, "prefixes", [0.5, 1]),
    (Steering, {}, "ranking", "mean"),
    (Steering, {"kind": "vs2++"}, "neighbours", 3),
    (Steering, {"kind": "vs2"}, "quantiles", [0.5]),
    (Pruning, {"strategies": ["none", "uniform"]}, "strengths", [2]),
    (Pruning, {"strategies": ["none", "logit-bias"]}, "bias_strengths", [2]),
]


@pytest.mark.parametrize(("cls", "about", "name", "value"), IGNORED)
def test_a_setting_that_nothing_reads_is_refused(cls: type, about: dict[str, Any], name: str, value: Any) -> None:
    section = {**REQUIRED[cls], **about}
    if about.get("weights"):
        section["epochs"] = 0
    schema.parse(cls, section, "section")
    with pytest.raises(
        SparsightError, match=rf"^section\.{name}: would be ignored, .* reads it; leave it out"
    ) as caught:
        schema.parse(cls, {**section, name: value}, "section")
    assert "\n" not in str(caught.value)
    default = {field.name: field.default for field in dataclasses.fields(cls)}[name]
    schema.parse(cls, {**section, name: default}, "section")


@pytest.mark.parametrize(("cls", "about", "name", "value"), READ)
def test_a_setting_that_something_reads_is_taken(cls: type, about: dict[str, Any], name: str, value: Any) -> None:
    section = {**REQUIRED[cls], **about} | ({"epochs": 0} if about.get("weights") else {})
    parsed: Any = schema.parse(cls, {**section, name: value}, "section")
    assert getattr(parsed, name) == (tuple(value) if isinstance(value, list) else value)


@pytest.mark.parametrize("cls", REQUIRED, ids=lambda cls: cls.__name__)
def test_every_field_that_is_only_for_some_settings_is_among_them(cls: type) -> None:
    only = {name for name, text in schema.field_docs(cls).items() if text.startswith("Only for")}
    assert only <= {name for section, _, name, _ in IGNORED if section is cls}


def test_several_ignored_settings_are_named_at_once() -> None:
    section = {**PROBE, "rotate": 9, "flip": True}
    with pytest.raises(SparsightError) as caught:
        schema.parse(Backbone, section, "backbones.vit")
    assert str(caught.value) == (
        "backbones.vit.rotate, flip: would be ignored, because only training of all weights (not a probe) reads it; "
        "leave it out, or set the default (rotate: 0.0, flip: false)"
    )


def test_the_strategies_that_read_strengths_and_numbers_of_latents_are_those_of_the_tables() -> None:
    assert set(AMPLIFYING) == {name for name, kind in KINDS.items() if kind.grid == "strengths"}
    assert set(CHOOSING) == {name for name, kind in KINDS.items() if kind.counts}
