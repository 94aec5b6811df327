# What an SAE's evaluation reads for the names of its latents, and for a foreign judge of their images.


def evaluation_section(wildcards):
    """How much is measured."""
    return sae_section(wildcards).evaluation


def namer(wildcards):
    """The image-text model that names latents, if there is one."""
    return [f"{R}/backbones/{name}/model.safetensors" for name in RUN.namer_of(sae_section(wildcards).backbone)]


def embeddings(wildcards):
    """The stores of its embeddings, which are compared with words."""
    return stores_of(RUN.namer_of(sae_section(wildcards).backbone), ["train", "test"])


def judge(wildcards):
    """The store of the backbone by whose embeddings images are also compared, if a section names one.

    A judge may also be the namer, whose store is read anyway; its config.json tells that it judges.
    """
    own = sae_section(wildcards).judge
    return [f"{R}/backbones/{own}/config.json", *stores_of(own, ["test"])] if own else []


WORDS = [RUN.report.words] if RUN.report.words else []


def read_by_evaluation(wildcards):
    """Every file that the stage reads; whether latents get names follows from other sections than its own."""
    seeds = sae_section(wildcards).seeds if sae_section(wildcards).sites else []
    return [
        f"{R}/images/manifest.parquet",
        backbone_of_sae(wildcards),
        *evaluation_stores(wildcards),
        *expand(SAE_WEIGHTS, sae=RUN.grids[wildcards.section]),
        *expand(MAPS, chain=expand(f"{wildcards.section}-s{{seed}}", seed=seeds)),
        *namer(wildcards),
        *embeddings(wildcards),
        *judge(wildcards),
        *WORDS,
    ]
