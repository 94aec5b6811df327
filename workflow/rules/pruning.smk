STEERED = {
    name: sae for name, sae in RUN.steering_names.items() if name.rpartition("-s")[0] == RUN.pruning.steering
}


def backbone_of_policy(wildcards):
    return rules.backbone.output.weights.format(backbone=RUN.policies[wildcards.policy].backbone)


rule policy:
    input:
        images=rules.images.output,
        backbone=backbone_of_policy,
        code=sources("policy.py"),
    output:
        weights=f"{R}/pruning/{{policy}}/policy.safetensors",
        config=f"{R}/pruning/{{policy}}/config.json",
        log=f"{R}/pruning/{{policy}}/training.jsonl",
    params:
        section=lambda wildcards: to_flags(RUN.policies[wildcards.policy]),
    threads: THREADS
    log:
        f"{R}/logs/policy-{{policy}}.log",
    shell:
        "python workflow/scripts/policy.py --from-images {input.images} --from-backbone {input.backbone}"
        " --name {wildcards.policy} --out {R}/pruning/{wildcards.policy}"
        " --work {R}/.work/policy-{wildcards.policy}"
        " {COMMON} {params.section} > {log} 2>&1"


rule pruning:
    input:
        images=rules.images.output,
        backbone=backbone_of_policy,
        policy=rules.policy.output.weights,
        saes=expand(rules.sae.output.weights, sae=STEERED.values()),
        vectors=expand(f"{R}/steering/{{name}}.safetensors", name=STEERED),
        code=sources("pruning.py", f"src/sparsight/sae/{RUN.saes[RUN.steering[RUN.pruning.steering].sae].kind}.py"),
    output:
        overall=f"{R}/pruning/{{policy}}/overall.parquet",
        per_class=f"{R}/pruning/{{policy}}/per_class.parquet",
        per_head=f"{R}/pruning/{{policy}}/per_head.parquet",
        validation=f"{R}/pruning/{{policy}}/validation.parquet",
        metrics=f"{R}/pruning/{{policy}}/metrics.json",
    params:
        section=to_flags(RUN.pruning),
    threads: THREADS
    log:
        f"{R}/logs/pruning-{{policy}}.log",
    shell:
        "python workflow/scripts/pruning.py --from-images {input.images} --from-backbone {input.backbone}"
        " --from-policy {input.policy} --from-saes {input.saes} --from-vectors {input.vectors} --name {wildcards.policy}"
        " --out {R}/pruning/{wildcards.policy} --work {R}/.work/pruning-{wildcards.policy}"
        " {COMMON} {params.section} > {log} 2>&1"


rule timings:
    input:
        backbones=expand(rules.backbone.output.weights, backbone=RUN.backbones),
        code=sources("timings.py"),
    output:
        f"{R}/timings.json",
    # More than there are: Snakemake cuts it to --cores, so nothing else runs while this stage measures.
    threads: 1024
    log:
        f"{R}/logs/timings.log",
    shell:
        "python workflow/scripts/timings.py --from-backbones {input.backbones}"
        " --out {R} --work {R}/.work/timings"
        " {COMMON} > {log} 2>&1"
