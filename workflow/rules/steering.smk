def steered_sae(wildcards):
    """Name of the SAE folder that a steering result uses."""
    return RUN.steering_names[f"{wildcards.steering}-s{wildcards.seed}"]


rule steering:
    input:
        images=rules.images.output,
        backbone=lambda w: rules.backbone.output.weights.format(backbone=RUN.sae_names[steered_sae(w)].backbone),
        store=lambda w: f"{R}/activations/{RUN.sae_names[steered_sae(w)].backbone}/train.json",
        sae=lambda w: rules.sae.output.weights.format(sae=steered_sae(w)),
        code=lambda w: sources("steering.py", f"src/sparsight/sae/{RUN.sae_names[steered_sae(w)].kind}.py"),
    output:
        vectors=f"{R}/steering/{{steering}}-s{{seed}}.safetensors",
        table=f"{R}/steering/{{steering}}-s{{seed}}.parquet",
        classes=f"{R}/steering/{{steering}}-s{{seed}}-classes.parquet",
        summary=f"{R}/steering/{{steering}}-s{{seed}}.json",
    wildcard_constraints:
        seed=r"\d+",
    params:
        section=lambda wildcards: to_flags(RUN.steering[wildcards.steering]),
    threads: THREADS
    log:
        f"{R}/logs/steering-{{steering}}-s{{seed}}.log",
    shell:
        "python workflow/scripts/steering.py --from-images {input.images} --from-backbone {input.backbone}"
        " --from-store {input.store} --from-sae {input.sae} --name {wildcards.steering}-s{wildcards.seed}"
        " --out {R}/steering --work {R}/.work/steering-{wildcards.steering}-s{wildcards.seed}"
        " {COMMON} {params.section} > {log} 2>&1"
