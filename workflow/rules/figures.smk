# The figures of the report, for `snakemake --report` too.
CATEGORIES = {
    "frontier": "Head pruning",
    "heads": "Head pruning",
    "latents": "Head pruning",
    "saes": "SAEs",
    "chain": "SAEs",
    "steering": "Steering",
    "backbone": "Backbones",
}
FIGURES = [
    *((kind, name) for name in RUN.policies for kind in ("frontier", "heads", "latents")),
    ("saes",),
    *(("chain", name) for name in RUN.chains),
    *(("steering", name) for name in RUN.steering_names),
    *(("backbone", name) for name, b in RUN.backbones.items() if b.epochs and b.training != "none"),
]


def figure(kind, name=""):
    return report(
        f"{R}/report/figures/{kind}{name and '-'}{name}.svg",
        caption=f"../../src/sparsight/report/captions/{kind}.rst",
        category=CATEGORIES[kind],
        labels={"figure": kind, "of": name or "all"},
    )
