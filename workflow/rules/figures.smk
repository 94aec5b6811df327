# The figures of the report; `snakemake --report` shows them, too.
from sparsight.report.comparisons import comparisons

CATEGORIES = {
    "frontier": "Head pruning",
    "heads": "Head pruning",
    "latents": "Head pruning",
    "saes": "SAEs",
    "chain": "SAEs",
    "tradeoff": "SAEs",
    "depth": "SAEs",
    "chains": "SAEs",
    "steering": "Steering",
    "disentangling": "Disentangling",
    "attribution": "Attribution",
    "spurious": "Spurious features",
    "backbone": "Backbones",
}
FIGURES = [
    *((kind, name) for name in RUN.policies for kind in ("frontier", "heads", "latents")),
    *([("saes",)] if RUN.sae_names else []),
    *(("chain", name) for name, section in RUN.saes.items() if section.sites),
    *((one.kind, one.name) for one in comparisons(RUN.saes)),
    *(("steering", name) for name in RUN.steering),
    *(("disentangling", name) for name in RUN.disentangle),
    *(("attribution", name) for name in RUN.attribution),
    *(("spurious", name) for name in RUN.spurious),
    *(("backbone", name) for name, b in RUN.backbones.items() if b.epochs and b.training != "none"),
]


def figure(kind, name=""):
    return report(
        f"{R}/report/figures/{kind}{name and '-'}{name}.svg",
        caption=f"../../src/sparsight/report/captions/{kind}.rst",
        category=CATEGORIES[kind],
        labels={"figure": kind, "of": name or "all"},
    )
