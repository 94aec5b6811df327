# What the evaluation of spurious features reads.


def spurious_section(wildcards):
    return RUN.spurious[wildcards.biased]


def biased_sae(wildcards):
    """The section of the SAEs whose latents are ablated."""
    return RUN.saes[spurious_section(wildcards).sae]


def code_of_spurious(wildcards):
    return code("spurious.py", *variants(biased_sae(wildcards)))


def biased_saes(wildcards):
    return expand(SAE_WEIGHTS, sae=RUN.grids[spurious_section(wildcards).sae])


def backbone_of_biased(wildcards):
    return f"{R}/backbones/{biased_sae(wildcards).backbone}/model.safetensors"


def stores_of_biased(wildcards):
    return stores_of(biased_sae(wildcards).backbone, ["train", "val", "test"])


def read_by_spurious(wildcards):
    """Every file that the stage reads; the SAEs and their seeds follow from the section that it names."""
    return [
        f"{R}/images/manifest.parquet",
        backbone_of_biased(wildcards),
        *stores_of_biased(wildcards),
        *biased_saes(wildcards),
    ]
