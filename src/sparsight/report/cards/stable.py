"""Stable? Whether another seed finds the same features."""

import json
from pathlib import Path

from sparsight.common.verdicts import Comparison, Measure, over_pairs
from sparsight.report.cards.questions import MainSae, Question, counted

MATCHED = Measure("decoder rows with a partner in another seed", "points", 1, 100)


def ask(sae: MainSae, stabilities: list[Path]) -> Question:
    """Share of matched decoder rows whose cosine is above 0.7, beside that of random dictionaries."""
    files = [path for path in stabilities if path.stem == f"{sae.name}-stability"]
    if not files:
        why = f"{sae.name} has one seed in this run, so nothing says whether another finds the same latents."
        return Question("Stable?", "saes", [], unanswered=why)
    of_site = json.loads(files[0].read_text())["sites"][sae.about["site"]]
    value, control = of_site["over_0.7"], of_site["over_0.7_random"]
    least, most = of_site["over_0.7_min"], of_site["over_0.7_max"]
    found = over_pairs((least, value, most), of_site["saes"], control)
    says = (
        f"{MATCHED.level(value)} of the decoder rows of {sae.name} have a partner in another seed (cosine above 0.7), "
        f"{MATCHED.level(control)} of those of random dictionaries"
    )
    n = f"{counted(of_site['saes'], 'seed')}, {counted(of_site['pairs'], 'pair')}"
    why = "" if found else "two seeds are a single pair; give the section a third"
    comparison = Comparison(sae.name, "random dictionaries", MATCHED, value, control, found, n, says, why)
    fact = f"Mean cosine of the matched rows: {of_site['cosine']:.2f}, of random ones {of_site['cosine_random']:.2f}."
    return Question("Stable?", "saes", [[comparison]], [fact])
