"""Frontiers of accuracy against usage, and comparisons of strategies at equal usage."""

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
    """Rows of ``frontier.parquet``: on val every point, on test the points of val's frontier and the chosen one."""
    rows, hits = [], []
    for key, candidates in groups.items():
        for split, split_outcomes in outcomes.items():
            for point in candidates:
                if all(row in split_outcomes for row in point.rows) and (
                    split == "val" or point in (*lines[key], chosen[key])
                ):
                    point_hits = point.hits(split_outcomes)
                    hits.append((split, point_hits))
                    rows.append(
                        {**named(point), "split": split, "n": len(point_hits),
                         "usage": float(point.usage(split_outcomes).mean()), "on_frontier": point in lines[key],
                         "chosen": point == chosen[key]}
                    )  # fmt: skip
    result: list[dict[str, Any]] = [{}] * len(rows)
    for split in outcomes:
        places = [i for i, (name, _) in enumerate(hits) if name == split]
        for i, interval in zip(places, bootstrap([hits[i][1] for i in places], seed), strict=True):
            result[i] = {**rows[i], "accuracy": interval["mean"], "lo": interval["lo"], "hi": interval["hi"]}
    return result


def matched(
    chosen: dict[Key, Point], lines: dict[Key, list[Point]], on_test: dict[Row, Outcome], seed: int
) -> list[dict[str, Any]]:
    """Class latents against every control at the usage of class latents, on test, means over SAEs.

    A control is taken from its frontier at that usage. If the frontier does not reach it, its nearest end is used;
    ``usage_control`` shows the usage.
    """
    compared, differences = [], []
    for (strategy, labels), point in chosen.items():
        if strategy != MAIN:
            continue
        usage = float(point.usage(on_test).mean())
        for (control, control_labels), frontier in lines.items():
            if control in (MAIN, IN_STREAM, "none", "reconstruct", *BOUNDS) or control_labels not in ("none", labels):
                continue
            mixture = at_usage(frontier, on_test, usage)
            differences.append(point.hits(on_test) - mixture.hits)
            compared.append(
                {"strategy": MAIN, "labels": labels, "usage": usage, "control": control, "usage_control": mixture.usage,
                 "accuracy": float(point.hits(on_test).mean()), "accuracy_control": float(mixture.hits.mean()),
                 "lower": named(mixture.lower), "upper": named(mixture.upper), "weight_upper": mixture.weight}
            )  # fmt: skip
    intervals = bootstrap(differences, seed) if compared else []
    return [
        {**row, "delta": interval["mean"], "delta_lo": interval["lo"], "delta_hi": interval["hi"]}
        for row, interval in zip(compared, intervals, strict=True)
    ]


def against_none(
    chosen: dict[Key, Point], on_test: dict[Row, Outcome], margin: float, seed: int
) -> list[dict[str, Any]]:
    """Each chosen point against the unsteered policy on test, means over SAEs: difference and bound of the loss."""
    none = on_test[NONE].hits.astype(np.float64)
    steered = [point for (strategy, _), point in chosen.items() if strategy != "none"]
    intervals = bootstrap([point.hits(on_test) - none for point in steered], seed) if steered else []
    return [
        {**named(point), "usage_last": float(point.usage(on_test).mean()), "delta": interval["mean"],
         "delta_lo": interval["lo"], "delta_hi": interval["hi"], "loss_bound": 0 - interval["low"],
         "non_inferior": 0 - interval["low"] < margin}
        for point, interval in zip(steered, intervals, strict=True)
    ]  # fmt: skip


def named(point: Point) -> dict[str, Any]:
    """The point's key as columns."""
    keys = ("strategy", "strength", "labels", "latents")
    return {key: getattr(point, key) for key in keys}
