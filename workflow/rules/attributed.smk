# What the attribution of class logits reads.


def attribution_section(wildcards):
    return RUN.attribution[wildcards.attributed]


def attributed_sae(wildcards):
    """The section of the SAEs whose latents are judged."""
    return RUN.saes[attribution_section(wildcards).sae]


def code_of_attribution(wildcards):
    """The random dictionary is a TopK SAE, loaded by name."""
    return code("attribution.py", *dict.fromkeys([*variants(attributed_sae(wildcards)), RANDOM_SAE]))


def attributed_saes(wildcards):
    return expand(SAE_WEIGHTS, sae=RUN.grids[attribution_section(wildcards).sae])


def backbone_of_attributed(wildcards):
    return f"{R}/backbones/{attributed_sae(wildcards).backbone}/model.safetensors"


def stores_of_attributed(wildcards):
    return stores_of(attributed_sae(wildcards).backbone, ["train", "test"])


def read_by_attribution(wildcards):
    """Every file that the stage reads; the SAEs and their seeds follow from the section that it names."""
    return [
        f"{R}/images/manifest.parquet",
        backbone_of_attributed(wildcards),
        *stores_of_attributed(wildcards),
        *attributed_saes(wildcards),
    ]
