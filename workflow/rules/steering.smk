rule steering:
    input:
        images=rules.images.output,
        backbone=backbone_of_sae,
        store=store_of("train"),
        sae=lambda wildcards: f"{R}/saes/{sae_name(wildcards)}/sae.safetensors",
        code=lambda wildcards: sources("steering.py", sae_code(sae_name(wildcards))),
    output:
        vectors=f"{R}/steering/{{steering}}-s{{seed}}.safetensors",
        table=f"{R}/steering/{{steering}}-s{{seed}}.parquet",
        classes=f"{R}/steering/{{steering}}-s{{seed}}-classes.parquet",
        summary=f"{R}/steering/{{steering}}-s{{seed}}.json",
    log:
        f"{R}/logs/steering-{{steering}}-s{{seed}}.log",
    wildcard_constraints:
        seed=r"\d+",
    threads: THREADS
    params:
        out=subpath(output[0], parent=True),
        work=f"{R}/.work/steering-{{steering}}-s{{seed}}",
        flags=lambda wildcards: flags(RUN.steering[wildcards.steering]),
    shell:
        "python workflow/scripts/steering.py --from-images {input.images} --from-backbone {input.backbone}"
        " --from-store {input.store} --from-sae {input.sae} --name {wildcards.steering}-s{wildcards.seed}"
        " --out {params.out} --work {params.work}"
        " {params.flags} > {log} 2>&1"
