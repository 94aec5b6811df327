"""The cards of a run, judged together."""

import json
from dataclasses import dataclass
from typing import Any

from sparsight.common.verdicts import Judged, judge
from sparsight.report.cards import faithful, heads, interpretable, sparse, stable, steering
from sparsight.report.cards.questions import Question, main_sae
from sparsight.report.main_section import main_steering


@dataclass(frozen=True)
class Card:
    """A question with its answer."""

    question: Question
    headline: Judged | None
    """The least favourable comparison of the card's own subject; None if the run has no answer."""
    others: list[Judged]
    """That of its other measures, and of every further subject."""
    judged: list[Judged]
    """All comparisons, the least favourable of each subject first."""

    @property
    def ends(self) -> list[str]:
        """Choices at an end of their grid, of what the card shows."""
        shown = [one for one in (self.headline, *self.others) if one]
        return list(dict.fromkeys(end for one in shown for end in one.comparison.ends))


def first_screen(inputs: dict[str, Any], n_test: int) -> dict[str, Any]:
    """The cards in order, the SAE that they are about, and the number of comparisons that were corrected together.

    Args:
        inputs: paths by name, as for :func:`sparsight.report.page.write_page`.
        n_test: number of test images.
    """
    run = json.loads(inputs["configuration"].read_text())
    sae = main_sae(inputs)
    questions = []
    if sae is None:
        titles = ("Faithful?", "Sparse and alive?", "Interpretable?", "Stable?")
        questions = [Question(title, "saes", [], unanswered="This run has no SAE.") for title in titles]
    else:
        questions = [
            faithful.ask(sae, inputs["chains"], n_test),
            sparse.ask(sae),
            interpretable.ask(sae, n_test),
            stable.ask(sae, inputs["stabilities"]),
        ]
    main = main_steering(run)
    questions += [steering.ask(inputs["steerings"], main), heads.ask(inputs["policies"])]
    judged = judge([one for question in questions for group in question.groups for one in group])
    left = iter(judged)
    cards = []
    for question in questions:
        groups = [sorted((next(left) for _ in group), key=lambda one: one.rank) for group in question.groups]
        shown = [one for group in groups for one in _first_of_each_measure(group)]
        every = [one for group in groups for one in group]
        cards.append(Card(question, shown[0] if shown else None, shown[1:], every))
    return {
        "cards": cards,
        "sae": sae,
        "steering": main if sae and main and run["steering"][main]["sae"] == sae.name else None,
        "compared": sum(one.p is not None for one in judged),
    }


def _first_of_each_measure(group: list[Judged]) -> list[Judged]:
    """By measure the first of a sorted group."""
    firsts: dict[str, Judged] = {}
    for one in group:
        firsts.setdefault(one.comparison.measure.name, one)
    return list(firsts.values())
