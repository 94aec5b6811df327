"""Interpretable? How alike the images of a latent are, and how well few latents tell the class."""

from sparsight.common.verdicts import Comparison, Measure
from sparsight.report.cards.questions import MainSae, Question, counted, of_probes, probes

MONOSEMANTICITY = Measure("monosemanticity")
PROBE = Measure("accuracy of five features a class", "points", 1, 100)
FEATURES = 5


def ask(sae: MainSae, n_test: int) -> Question:
    """Monosemanticity and sparse probes beside those of random features, k-means, neurons and components."""
    if sae.reconstruction_only:
        why = f"Of {sae.name} only the reconstruction was measured (metrics: reconstruction)."
        return Question("Interpretable?", "saes", [], [], why)
    comparisons = []
    if sae.has("monosemanticity"):
        for key, name in {"kmeans": "k-means", "random": "a random dictionary", "neurons": "neurons"}.items():
            if sae.has(f"monosemanticity_{key}"):
                says = f"The monosemanticity of {sae.name} is {{}}, that of {name} {{}}"
                keys = "monosemanticity", f"monosemanticity_{key}"
                comparisons.append(sae.against(MONOSEMANTICITY, keys, name, counted(n_test, "image"), says))
    comparisons += _probed(sae)
    facts = []
    if sae.has("monosemanticity_of_all_images"):
        facts.append(
            "Monosemanticity: how alike the images are on which a latent fires; pairs of any images have "
            f"{MONOSEMANTICITY.level(sae.mean('monosemanticity_of_all_images'))}."
        )
    if not any(sae.has(f"probing_{method}_{FEATURES}") for method in ("sae", "random")):
        facts.append("The images have no labels, so nothing says whether its latents stand for what they show.")
    unanswered = "" if comparisons else "No latent fires on two test images, so no score is defined."
    return Question("Interpretable?", "saes", [comparisons], facts, unanswered)


def _probed(sae: MainSae) -> list[Comparison]:
    controls = {"neurons": "neurons", "pca": "principal components", "random": "random features"}
    by_seed = [probes(folder) for folder in sae.folders]
    comparisons = []
    for key, name in controls.items():
        one, other = ("sae", FEATURES), (key, FEATURES)
        if all(one in rows and other in rows for rows in by_seed):
            says = (
                f"Five latents a class of {sae.name} are right on {{}} of the test images, five {name} a class on {{}}"
            )
            keys = f"probing_sae_{FEATURES}", f"probing_{key}_{FEATURES}"
            images = [of_probes(rows[one], rows[other]) for rows in by_seed]
            n = counted(by_seed[0][one]["n"], "image")
            comparisons.append(sae.against(PROBE, keys, f"five {name}", n, says, images))
    return comparisons
