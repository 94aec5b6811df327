# What the comparison of latents with masks reads.


def stores_of_localisation(wildcards):
    return stores_of(sae_section(wildcards).backbone, ["train", "test"])


def read_by_localisation(wildcards):
    """Every file that the stage reads. Masks are not among them: their digests stand in the manifest."""
    return [
        f"{R}/images/manifest.parquet",
        backbone_of_sae(wildcards),
        *stores_of_localisation(wildcards),
        *saes_of_section(wildcards),
    ]
