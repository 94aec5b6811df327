rule policy:
    input:
        images=f"{R}/images/manifest.parquet",
        backbone=backbone_of_policy,
        mark=mark("policy-{policy}", code("policy.py"), policy_section),
    output:
        weights=f"{R}/pruning/{{policy}}/policy.safetensors",
        config=f"{R}/pruning/{{policy}}/config.json",
        log=f"{R}/pruning/{{policy}}/training.jsonl",
        record=f"{R}/records/policy-{{policy}}.json",
    log:
        f"{R}/logs/policy-{{policy}}.log",
    benchmark:
        f"{R}/benchmarks/policy-{{policy}}.jsonl"
    priority: 3
    threads: lambda wildcards: side_by_side(RUN.policies[wildcards.policy].cores)
    resources:
        **needs(),
    params:
        out=subpath(output[0], parent=True),
        work=f"{R}/.work/policy-{{policy}}",
        flags=flags(code("policy.py"), policy_section),
    shell:
        "python {SCRIPTS}/policy.py --from-images {input.images} --from-backbone {input.backbone}"
        " --name {wildcards.policy} --cores {threads} --out {params.out} --work {params.work} --record {output.record}"
        " {params.flags} > {log} 2>&1"


CODE_OF_PRUNING = code("pruning.py", *(file for sae in RUN.steered for file in variants(RUN.sae_names[sae])))


rule pruning:
    input:
        images=f"{R}/images/manifest.parquet",
        backbone=backbone_of_policy,
        policy=rules.policy.output.weights,
        saes=expand(SAE_WEIGHTS, sae=RUN.steered),
        mark=mark("pruning-{policy}", CODE_OF_PRUNING, RUN.pruning, read_by_pruning),
    output:
        overall=f"{R}/pruning/{{policy}}/overall.parquet",
        per_class=f"{R}/pruning/{{policy}}/per_class.parquet",
        per_head=f"{R}/pruning/{{policy}}/per_head.parquet",
        frontier=f"{R}/pruning/{{policy}}/frontier.parquet",
        class_subsets=f"{R}/pruning/{{policy}}/class_subsets.parquet",
        false_positives=f"{R}/pruning/{{policy}}/false_positives.parquet",
        validation=f"{R}/pruning/{{policy}}/validation.parquet",
        targets=f"{R}/pruning/{{policy}}/targets.parquet",
        head_latents=f"{R}/pruning/{{policy}}/head_latents.safetensors",
        test_images=f"{R}/pruning/{{policy}}/test_images.safetensors",
        metrics=f"{R}/pruning/{{policy}}/metrics.json",
        record=f"{R}/records/pruning-{{policy}}.json",
    log:
        f"{R}/logs/pruning-{{policy}}.log",
    benchmark:
        f"{R}/benchmarks/pruning-{{policy}}.jsonl"
    priority: 3
    threads: lambda wildcards: side_by_side(1 if RUN.policies[wildcards.policy].couple_mlp else 2)
    resources:
        **needs(),
    params:
        out=subpath(output[0], parent=True),
        work=f"{R}/.work/pruning-{{policy}}",
        flags=flags(CODE_OF_PRUNING, RUN.pruning),
    shell:
        "python {SCRIPTS}/pruning.py --from-images {input.images} --from-backbone {input.backbone}"
        " --from-policy {input.policy} --from-saes {input.saes} --name {wildcards.policy} --cores {threads}"
        " --out {params.out} --work {params.work} --record {output.record}"
        " {params.flags} > {log} 2>&1"


include: "timings.smk"
include: "export.smk"
