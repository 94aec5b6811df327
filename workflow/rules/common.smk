import re


include: "marks.smk"


def one_of(names):
    """The constraint of a wildcard that takes one of these names; there may be none."""
    return "|".join(map(re.escape, names)) or "(?!)"


def backbone_section(wildcards):
    return RUN.backbones[wildcards.backbone]


def other_images_section(wildcards):
    return RUN.other_images[wildcards.other]


def steering_section(wildcards):
    return RUN.steering[wildcards.steering]


def policy_section(wildcards):
    return RUN.policies[wildcards.policy]


# Sections of SAEs that steering and pruning depend on: they run first, so that fewer cores are idle at the end.
STEERED = {name for section in RUN.steering.values() for name in (section.sae, *section.layers)}


def sae_section(wildcards):
    """The section of SAEs of a job: its own, or that of the SAEs which its steering section uses."""
    return RUN.saes[getattr(wildcards, "section", None) or steering_section(wildcards).sae]


def train_store(wildcards):
    """The manifest of the store on which SAEs are trained."""
    return f"{R}/activations/{sae_section(wildcards).backbone}/train.json"


def evaluation_stores(wildcards):
    """Evaluation fits on train, chooses on val and measures on test."""
    return stores_of(sae_section(wildcards).backbone, ["train", "val", "test"])


def stores_of(backbone, splits):
    return expand(f"{R}/activations/{{backbone}}/{{split}}.json", backbone=backbone, split=splits)


def backbone_of_sae(wildcards):
    return f"{R}/backbones/{sae_section(wildcards).backbone}/model.safetensors"


def backbone_of_policy(wildcards):
    return f"{R}/backbones/{RUN.policies[wildcards.policy].backbone}/model.safetensors"


def saes_of_section(wildcards):
    return expand(f"{R}/saes/{{sae}}/sae.safetensors", sae=RUN.grids[wildcards.section])


def read_by_pruning(wildcards):
    """Every file that the stage reads; the SAEs and their seeds follow from the steering section that it names."""
    return [
        f"{R}/images/manifest.parquet",
        backbone_of_policy(wildcards),
        f"{R}/pruning/{wildcards.policy}/policy.safetensors",
        *expand(f"{R}/saes/{{sae}}/sae.safetensors", sae=RUN.steered),
    ]


def variants(section):
    """The files of the variants of which a section's SAEs can be. Scripts load them by name."""
    return [f"src/sparsight/sae/variants/{kind}.py" for kind in section.kinds]


def code_of_sae(script, *extra):
    return lambda wildcards: code(script, *variants(sae_section(wildcards)), *extra)
