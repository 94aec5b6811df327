def sae_section(wildcards):
    return RUN.sae_names[wildcards.sae]


def store_of(split):
    """The manifest of the store that an SAE belongs to."""
    return lambda wildcards: f"{R}/activations/{sae_section(wildcards).backbone}/{split}.json"


def backbone_of_sae(wildcards):
    return rules.backbone.output.weights.format(backbone=sae_section(wildcards).backbone)


rule sae:
    input:
        store=store_of("train"),
        code=lambda wildcards: sources("sae.py", f"src/sparsight/sae/{sae_section(wildcards).kind}.py"),
    output:
        weights=f"{R}/saes/{{sae}}/sae.safetensors",
        config=f"{R}/saes/{{sae}}/config.json",
        log=f"{R}/saes/{{sae}}/training.jsonl",
    params:
        section=lambda wildcards: to_flags(sae_section(wildcards)),
    threads: THREADS
    log:
        f"{R}/logs/sae-{{sae}}.log",
    shell:
        "python workflow/scripts/sae.py --from-store {input.store} --name {wildcards.sae}"
        " --out {R}/saes/{wildcards.sae} --work {R}/.work/sae-{wildcards.sae}"
        " {COMMON} {params.section} > {log} 2>&1"


rule evaluate_sae:
    input:
        images=rules.images.output,
        backbone=backbone_of_sae,
        train=store_of("train"),
        test=store_of("test"),
        sae=rules.sae.output.weights,
        config=rules.sae.output.config,
        code=lambda wildcards: sources("evaluate_sae.py", f"src/sparsight/sae/{sae_section(wildcards).kind}.py"),
    output:
        f"{R}/saes/{{sae}}/metrics.json",
    threads: THREADS
    log:
        f"{R}/logs/evaluate-sae-{{sae}}.log",
    shell:
        "python workflow/scripts/evaluate_sae.py --from-images {input.images} --from-backbone {input.backbone}"
        " --from-train {input.train} --from-test {input.test} --from-sae {input.sae} --name {wildcards.sae}"
        " --out {R}/saes/{wildcards.sae} --work {R}/.work/evaluate-sae-{wildcards.sae}"
        " {COMMON} > {log} 2>&1"
