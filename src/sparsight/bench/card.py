"""The card of an SAE: every measure beside its strongest control, with a verdict.

The strongest control of a measure is the one with the best mean over seeds. It is found on the numbers that it is then
compared on, which favours the control. Intervals are over seeds. All verdicts of a card are one family, corrected by
Holm (:func:`sparsight.common.verdicts.judge`).
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sparsight.bench.sections import Metrics, SaeSection, sections_of
from sparsight.common.verdicts import Comparison, Difference, Measure, judge, over_pairs, over_seeds

Values = dict[int, float]
"""A measure by seed."""


@dataclass(frozen=True)
class _Asked:
    """A measure and where its numbers stand."""

    measure: Measure
    key: str
    """That of the SAE."""
    controls: Mapping[str, str]
    """Name and key of every control that is measured with the SAE."""
    trained: bool = True
    """Whether controls that were trained like the SAE are compared too."""
    any_backbone: bool = True
    """Whether numbers of SAEs of another backbone mean the same: not if they are relative to its activations' variance,
    or compare images by its own embeddings."""


def _points(name: str, lower_is_better: bool = False) -> Measure:
    return Measure(name, "points", 1, 100, lower_is_better)


_FOUR = {"pca": "principal components", "random": "random dictionary", "kmeans": "k-means", "neurons": "neurons"}


def _keys(prefix: str, *methods: str) -> dict[str, str]:
    return {_FOUR[method]: f"{prefix}_{method}" for method in methods}


_METRICS = (
    _Asked(
        _points("unexplained variance", lower_is_better=True), "fvu",
        {_FOUR["pca"]: "fvu_pca_k", **_keys("fvu", "random", "kmeans", "neurons")}, any_backbone=False,
    ),
    _Asked(_points("KL recovered in the model"), "kl_recovered", {}),
    _Asked(
        Measure("bits per activation at equal error", digits=1, lower_is_better=True), "bits",
        {_FOUR["pca"]: "bits_pca"}, trained=False,
    ),
    _Asked(
        _points("probe on five features a class"), "probing_sae_5",
        {_FOUR[method]: f"probing_{method}_5" for method in ("pca", "random", "neurons")},
    ),
    _Asked(
        Measure("monosemanticity, own model"), "monosemanticity",
        _keys("monosemanticity", "random", "kmeans", "neurons"), any_backbone=False,
    ),
    _Asked(
        Measure("monosemanticity, other model"), "monosemanticity_judge",
        _keys("monosemanticity_judge", "random", "kmeans", "neurons"),
    ),
)  # fmt: skip
_MATCHED = _points("decoder rows found by another seed")
_LOCALISATION = tuple(
    _Asked(Measure(name), f"{key}_sae", {**_keys(key, *_FOUR), "shuffled patches": f"{key}_shuffled"})
    for key, name in {
        "ap": "average precision on masks",
        "purity": "purity on masks",
        "moran": "Moran's I of the maps",
    }.items()
)
_ORDERS = {"random order": "random_order", "order of activation": "activation_order"}
_ATTRIBUTION = tuple(
    _Asked(
        Measure(f"area under {key}", lower_is_better=key == "deletion"), f"{key}_sae",
        {**{name: f"{key}_{order}" for name, order in _ORDERS.items()}, **_keys(key, "pca", "random", "neurons")},
    )
    for key in ("deletion", "insertion")
)  # fmt: skip
_REMOVALS = {
    "nothing removed": "none",
    "random latents": "random_latents",
    "mean difference": "mean_difference",
    "LEACE": "leace",
}
_SPURIOUS = _Asked(
    _points("accuracy in the worst group"), "worst_sae", {name: f"worst_{key}" for name, key in _REMOVALS.items()}
)


def cards(run: Path) -> Iterator[str]:
    """The card of every section of a finished run as text, in Markdown.

    Raises:
        SparsightError: no such folder, or no evaluated SAE in it.
    """
    sections, chains = sections_of(run)
    for section in sections:
        yield f"{_heading(section)}\n\n{_table(section)}"
    if chains:
        yield f"Chains have no card; the report of {run} compares them: {', '.join(chains)}."


def compared(section: SaeSection) -> list[Comparison]:
    """Every measure that the run has of a section, beside its strongest control."""
    comparisons = [_asked(section, asked, "metrics") for asked in _METRICS]
    comparisons.append(_stability(section))
    comparisons += [_asked(section, asked, "localisation") for asked in _LOCALISATION]
    comparisons += [_asked(section, asked, "attribution") for asked in _ATTRIBUTION]
    comparisons.append(_asked(section, _SPURIOUS, "spurious"))
    return [comparison for comparison in comparisons if comparison]


def _asked(section: SaeSection, asked: _Asked, place: str) -> Comparison | None:
    """A measure beside its strongest control; None if the run has no such numbers."""
    numbers: Metrics = getattr(section, place)
    own = _values(numbers, asked.key)
    controls = {name: _values(numbers, key) for name, key in asked.controls.items()}
    if asked.trained:
        controls |= {
            name: _values(getattr(other, place), asked.key)
            for name, other in section.controls.items()
            if asked.any_backbone or other.about["backbone"] == section.about["backbone"]
        }
    controls = {name: values for name, values in controls.items() if values.keys() & own.keys()}
    if not own or not controls:
        return None
    best = min if asked.measure.lower_is_better else max
    name = best(controls, key=lambda name: np.mean(list(controls[name].values())))
    strongest = controls[name]
    pairs = [(own[seed], strongest[seed]) for seed in own if seed in strongest]
    difference = over_seeds([value - other for value, other in pairs])
    value, other = (float(np.mean(side)) for side in zip(*pairs, strict=True))
    return _comparison(section, name, len(controls), asked.measure, (value, other), difference)


def _stability(section: SaeSection) -> Comparison | None:
    """The share of decoder rows with a partner in another seed."""
    found = section.stability
    if found is None:
        return None
    controls = {"random dictionary": found["over_0.7_random"]}
    for name, other in section.controls.items():
        if other.stability is not None:
            controls[name] = other.stability["over_0.7"]
    strongest = max(controls, key=lambda name: controls[name])
    pairs = found["over_0.7_min"], found["over_0.7"], found["over_0.7_max"]
    difference = over_pairs(pairs, found["saes"], controls[strongest])
    values = found["over_0.7"], controls[strongest]
    return _comparison(section, strongest, len(controls), _MATCHED, values, difference)


def _values(numbers: Metrics, key: str) -> Values:
    return {seed: row[key] for seed, row in numbers.items() if row.get(key) is not None}


def _comparison(
    section: SaeSection, control: str, controls: int, measure: Measure, values: tuple[float, float],
    difference: Difference | None,
) -> Comparison:  # fmt: skip
    why = "" if difference else "too few seeds"
    return Comparison(section.name, control, measure, *values, difference, f"{controls}", "", why)


def _heading(section: SaeSection) -> str:
    """What the SAEs are, and facts that no control is compared with."""
    about, seeds = section.about, f"{len(section.metrics)} seed{'' if len(section.metrics) == 1 else 's'}"
    l0, silent, dense = (
        np.mean([row[key] for row in section.metrics.values()]) for key in ("l0", "dead_test", "dense_test")
    )
    return (
        f"### {section.name} of {section.run}\n\n"
        f"{about['kind']}, {about['d_sae']:,} latents, {seeds}, on {about['tokens']} of {about['site']} of "
        f"{about['backbone']}. Of the latents {l0:.1f} are active at a time, {silent:.0f} never fire on test, and "
        f"{dense:.0f} fire on more than 10 % of it."
    )


def _table(section: SaeSection) -> str:
    head = ("measure", "SAE", "strongest control", "", "controls", "SAE minus control (95 %)", "verdict")
    rows = [head, ("---",) * len(head)]
    for judged in judge(compared(section)):
        c = judged.comparison
        better = f"{c.measure.name} ({'lower' if c.measure.lower_is_better else 'higher'} is better)"
        verdict = f"{judged.verdict}: {c.open}" if c.open else judged.verdict
        values = (c.measure.level(value) for value in (c.value, c.control_value))
        rows.append((better, next(values), c.control, next(values), c.n, judged.interval, verdict))
    return _aligned(rows)


def _aligned(rows: Iterable[tuple[str, ...]]) -> str:
    """Rows as a Markdown table that is also readable as text."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        fill = "-" if row[0] == "---" else " "
        cells = (cell.ljust(width, fill) for cell, width in zip(row, widths, strict=True))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
