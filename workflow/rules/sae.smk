rule sae:
    input:
        store=store_of("train"),
        code=lambda wildcards: sources("sae.py", sae_code(wildcards.sae)),
    output:
        weights=f"{R}/saes/{{sae}}/sae.safetensors",
        config=f"{R}/saes/{{sae}}/config.json",
        log=f"{R}/saes/{{sae}}/training.jsonl",
    log:
        f"{R}/logs/sae-{{sae}}.log",
    threads: THREADS
    params:
        out=subpath(output[0], parent=True),
        work=f"{R}/.work/sae-{{sae}}",
        flags=lambda wildcards: flags(sae_section(wildcards)),
    shell:
        "python workflow/scripts/sae.py --from-store {input.store} --name {wildcards.sae}"
        " --out {params.out} --work {params.work}"
        " {params.flags} > {log} 2>&1"


rule evaluate_sae:
    input:
        images=rules.images.output,
        backbone=backbone_of_sae,
        train=store_of("train"),
        test=store_of("test"),
        sae=rules.sae.output.weights,
        config=rules.sae.output.config,
        code=lambda wildcards: sources("evaluate_sae.py", sae_code(wildcards.sae)),
    output:
        f"{R}/saes/{{sae}}/metrics.json",
    log:
        f"{R}/logs/evaluate-sae-{{sae}}.log",
    threads: THREADS
    params:
        out=subpath(output[0], parent=True),
        work=f"{R}/.work/evaluate-sae-{{sae}}",
        flags=flags(),
    shell:
        "python workflow/scripts/evaluate_sae.py --from-images {input.images} --from-backbone {input.backbone}"
        " --from-train {input.train} --from-test {input.test} --from-sae {input.sae} --name {wildcards.sae}"
        " --out {params.out} --work {params.work}"
        " {params.flags} > {log} 2>&1"
