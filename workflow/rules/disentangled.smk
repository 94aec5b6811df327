# What the interchange of attributes reads.


def disentangle_section(wildcards):
    return RUN.disentangle[wildcards.disentangled]


def disentangled_sae(wildcards):
    """The section of the SAEs whose latents are interchanged."""
    return RUN.saes[disentangle_section(wildcards).sae]


def code_of_disentangling(wildcards):
    """The random dictionary is a TopK SAE, loaded by name."""
    return code("disentangle.py", *dict.fromkeys([*variants(disentangled_sae(wildcards)), RANDOM_SAE]))


def disentangled_saes(wildcards):
    return expand(SAE_WEIGHTS, sae=RUN.grids[disentangle_section(wildcards).sae])


def backbone_of_disentangled(wildcards):
    return f"{R}/backbones/{disentangled_sae(wildcards).backbone}/model.safetensors"


def stores_of_disentangled(wildcards):
    return stores_of(disentangled_sae(wildcards).backbone, ["train", "val", "test"])


def read_by_disentangling(wildcards):
    """Every file that the stage reads; the SAEs and their seeds follow from the section that it names."""
    return [
        f"{R}/images/manifest.parquet",
        backbone_of_disentangled(wildcards),
        *stores_of_disentangled(wildcards),
        *disentangled_saes(wildcards),
    ]
