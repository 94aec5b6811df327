"""Sparse and alive? What the codes cost at equal error, and how many latents are silent or always on."""

from sparsight.common.verdicts import Measure
from sparsight.report.cards.questions import MainSae, Question, counted

BITS = Measure("bits per activation at equal error", "bits", 1, lower_is_better=True)


def ask(sae: MainSae) -> Question:
    """Bits of the quantised codes beside those of all principal components at the same error."""
    says = f"At equal error the codes of {sae.name} take {{}} bits per activation, those of PCA {{}}"
    n = counted(sae.metrics[0]["n"], "activation")
    groups = []
    if not sae.reconstruction_only:
        groups.append([sae.against(BITS, ("bits", "bits_pca"), "PCA (all components)", n, says)])
    test, dense = (sae.mean(key) for key in ("dead_test", "dense_test"))
    silent = f"{test:.0f} never fire on test"
    if not sae.reconstruction_only:
        silent = f"{sae.mean('dead_train'):.0f} never fire on train, {test:.0f} never on test"
    d_sae = sae.about["d_sae"]
    facts = [
        f"{sae.mean('l0'):.1f} of {d_sae:,} latents are active at a time.",
        f"{silent}, and {dense:.0f} fire on more than 10 % of test.",
    ]
    return Question("Sparse and alive?", "saes", groups, facts)
