SAE_WEIGHTS = f"{R}/saes/{{sae}}/sae.safetensors"
SAE_CONFIG = f"{R}/saes/{{sae}}/config.json"
MAPS = f"{R}/saes/{{chain}}/affine.safetensors"


def processes(wildcards):
    """The number of processes that train a section."""
    return RUN.saes[wildcards.section].processes


def memory_of_training(wildcards):
    """MB for the activations that every process holds, and for every process but the first itself."""
    return processes(wildcards) * RUN.saes[wildcards.section].memory_mb + 1000 * (processes(wildcards) - 1)


def code_of_training(wildcards):
    """As :func:`code_of_sae`, with what is loaded by name: for a Switch SAE split over processes, or other tools' files."""
    section, names = sae_section(wildcards), []
    if section.kind == "switch":
        names = ["sharded/switch.py"]
    if section.format:
        names = ["foreign/importing.py", f"foreign/{section.format}.py"]
    return code_of_sae("sae.py", *(f"src/sparsight/sae/{name}" for name in names))(wildcards)


def files_of_tool(wildcards):
    """Weights of another tool, with the settings beside them; none for SAEs that are trained here."""
    return sae_section(wildcards).files


def backbone_of_training(wildcards):
    """The model, if the loss runs it."""
    return [] if sae_section(wildcards).loss == "local" else backbone_of_sae(wildcards)


# Sections with the same seeds and sites share their rules. Snakemake checks every rule for every file, so with rules for
# each section a sweep of hundreds would take a third longer to plan.
for NUMBER, (ENDINGS, SECTIONS) in enumerate(RUN.shapes.items(), 1):
    SAES = expand("{{section}}{ending}", ending=ENDINGS)
    SHAPE = RUN.saes[SECTIONS[0]]
    CHAINS = expand("{{section}}-s{seed}", seed=SHAPE.seeds if SHAPE.sites else [])

    # One job trains all SAEs of a section, one per seed (and site of a chain), and reads the store once.
    rule:
        name:
            f"sae_{NUMBER}"
        input:
            images=f"{R}/images/manifest.parquet",
            store=train_store,
            backbone=backbone_of_training,
            weights=files_of_tool,
            mark=mark("sae-{section}", code_of_training, sae_section),
        output:
            weights=expand(SAE_WEIGHTS, sae=SAES),
            config=expand(SAE_CONFIG, sae=SAES),
            log=expand(f"{R}/saes/{{sae}}/training.jsonl", sae=SAES),
            maps=expand(MAPS, chain=CHAINS),
            record=f"{R}/records/sae-{{section}}.json",
        log:
            f"{R}/logs/sae-{{section}}.log",
        benchmark:
            f"{R}/benchmarks/sae-{{section}}.jsonl"
        wildcard_constraints:
            section=one_of(SECTIONS),
        priority: int(not STEERED.isdisjoint(SECTIONS))
        threads: lambda wildcards: THREADS * processes(wildcards)
        resources:
            **needs(memory_of_training, lambda wildcards: int(ON_GPU) * processes(wildcards)),
            nodes=1,
        params:
            out=subpath(output[0], ancestor=2 + bool(CHAINS)),
            work=f"{R}/.work/sae-{{section}}",
            flags=flags(code_of_training, sae_section),
        shell:
            "python {SCRIPTS}/sae.py --from-images {input.images} --from-store {input.store}"
            " --from-backbone {input.backbone} --from-weights {input.weights:q} --name {wildcards.section}"
            " --out {params.out} --work {params.work} --record {output.record}"
            " {params.flags} > {log} 2>&1"


include: "evaluate.smk"
include: "stability.smk"
include: "localisation.smk"
