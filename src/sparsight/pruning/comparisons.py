"""Accuracy against usage as whole frontiers, and strategies compared where they use the same share of heads."""

from typing import Any

import numpy as np

from sparsight.common.intervals import bootstrap
from sparsight.pruning.outcomes import Outcome
from sparsight.pruning.selection import Point, at_usage
from sparsight.pruning.strategies import BOUNDS, IN_STREAM, NONE, Row

Key = tuple[str, str]
MAIN = "class-latents"


def table(
    groups: dict[Key, list[Point]], lines: dict[Key, list[Point]], chosen: dict[Key, Point],
    outcomes: dict[str, dict[Row, Outcome]], seed: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """``frontier.parquet``: every point on val; on test those of val's frontier and the chosen one."""
    rows, hits = [], []
    for key, candidates in groups.items():
        for split, found in outcomes.items():
            for point in candidates:
                if all(row in found for row in point.rows) and (split == "val" or point in (*lines[key], chosen[key])):
                    own = point.hits(found)
                    hits.append((split, own))
                    rows.append(
                        {**named(point), "split": split, "n": len(own), "usage": float(point.usage(found).mean()),
                         "on_frontier": point in lines[key], "chosen": point == chosen[key]}
                    )  # fmt: skip
    done: list[dict[str, Any]] = [{}] * len(rows)
    for split in outcomes:
        places = [i for i, (name, _) in enumerate(hits) if name == split]
        for i, interval in zip(places, bootstrap([hits[i][1] for i in places], seed), strict=True):
            done[i] = {**rows[i], "accuracy": interval["mean"], "lo": interval["lo"], "hi": interval["hi"]}
    return done


def matched(
    chosen: dict[Key, Point], lines: dict[Key, list[Point]], on_test: dict[Row, Outcome], seed: int
) -> list[dict[str, Any]]:
    """Class latents against every control at the usage of class latents, on test, means over SAEs.

    The control is taken from its frontier at that usage; where the frontier does not reach so low (or so high),
    its end is taken, and ``usage_control`` says so.
    """
    found, differences = [], []
    for (strategy, labels), point in chosen.items():
        if strategy != MAIN:
            continue
        usage = float(point.usage(on_test).mean())
        for (control, other), line in lines.items():
            if control in (MAIN, IN_STREAM, "none", "reconstruct", *BOUNDS) or other not in ("none", labels):
                continue
            at = at_usage(line, on_test, usage)
            differences.append(point.hits(on_test) - at.hits)
            found.append(
                {"strategy": MAIN, "labels": labels, "usage": usage, "control": control, "usage_control": at.usage,
                 "accuracy": float(point.hits(on_test).mean()), "accuracy_control": float(at.hits.mean()),
                 "lower": named(at.lower), "upper": named(at.upper), "weight_upper": at.weight}
            )  # fmt: skip
    intervals = bootstrap(differences, seed) if found else []
    return [
        {**line, "delta": own["mean"], "delta_lo": own["lo"], "delta_hi": own["hi"]}
        for line, own in zip(found, intervals, strict=True)
    ]


def against_none(
    chosen: dict[Key, Point], on_test: dict[Row, Outcome], margin: float, seed: int
) -> list[dict[str, Any]]:
    """Each chosen point against the unsteered policy on test, means over SAEs: what is lost, and at most."""
    none = on_test[NONE].hits.astype(np.float64)
    steered = [point for (strategy, _), point in chosen.items() if strategy != "none"]
    intervals = bootstrap([point.hits(on_test) - none for point in steered], seed) if steered else []
    return [
        {**named(point), "usage_last": float(point.usage(on_test).mean()), "delta": own["mean"], "delta_lo": own["lo"],
         "delta_hi": own["hi"], "loss_bound": 0 - own["low"], "non_inferior": 0 - own["low"] < margin}
        for point, own in zip(steered, intervals, strict=True)
    ]  # fmt: skip


def named(point: Point) -> dict[str, Any]:
    """The point's key as columns."""
    keys = ("strategy", "strength", "labels", "latents")
    return {key: getattr(point, key) for key in keys}
