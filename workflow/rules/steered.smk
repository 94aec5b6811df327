# What steering reads.


def seeds_of_steering(wildcards):
    """The seeds of the SAEs that steer."""
    return RUN.saes[steering_section(wildcards).sae].seeds


def steering_saes(wildcards):
    """The weights of the SAEs of a steering section."""
    seeds = seeds_of_steering(wildcards)
    return expand(f"{R}/saes/{{sae}}-s{{seed}}/sae.safetensors", sae=steering_section(wildcards).sae, seed=seeds)


def layers_of_steering(wildcards):
    """The weights of the SAEs that steer at further sites, layer by layer."""
    layers, seeds = steering_section(wildcards).layers, seeds_of_steering(wildcards)
    return expand(f"{R}/saes/{{layer}}-s{{seed}}/sae.safetensors", layer=layers, seed=seeds)


def stores_of_steering(wildcards):
    """VS2++ reads the embeddings of all splits; the other kinds read only the train split."""
    splits = ["train", "val", "test"] if RUN.steering[wildcards.steering].kind == "vs2++" else ["train"]
    return stores_of(sae_section(wildcards).backbone, splits)


def stores_of_finder(wildcards):
    """The stores in which VS2++ finds neighbours; none for other kinds."""
    section = RUN.steering[wildcards.steering]
    backbone = section.neighbour_backbone or sae_section(wildcards).backbone
    return stores_of(backbone, ["train", "val", "test"]) if section.kind == "vs2++" else []


def code_of_steering(script):
    """As :func:`code_of_sae`, with the variants of a steering section's layers."""

    def files(wildcards):
        layers = {file for name in steering_section(wildcards).layers for file in variants(RUN.saes[name])}
        return code_of_sae(script, *sorted(layers - {*variants(sae_section(wildcards))}))(wildcards)

    return files


def read_by_steering(wildcards):
    """Every file that the stage reads; the SAEs and their seeds follow from the sections that it names."""
    return [
        f"{R}/images/manifest.parquet",
        backbone_of_sae(wildcards),
        *stores_of_steering(wildcards),
        *stores_of_finder(wildcards),
        *steering_saes(wildcards),
        *layers_of_steering(wildcards),
    ]


def read_by_steering_elsewhere(wildcards):
    """As :func:`read_by_steering`, for other images."""
    homes = expand(f"{R}/steering/{wildcards.steering}-s{{seed}}.json", seed=seeds_of_steering(wildcards))
    return [
        f"{R}/images/{wildcards.other}/manifest.parquet",
        backbone_of_sae(wildcards),
        *steering_saes(wildcards),
        *layers_of_steering(wildcards),
        *homes,
    ]
