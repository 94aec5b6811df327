rule backbone:
    input:
        images=rules.images.output,
        code=sources("backbone.py"),
    output:
        weights=f"{R}/backbones/{{backbone}}/model.safetensors",
        config=f"{R}/backbones/{{backbone}}/config.json",
        log=f"{R}/backbones/{{backbone}}/training.jsonl",
    params:
        section=lambda wildcards: to_flags(RUN.backbones[wildcards.backbone]),
    threads: THREADS
    log:
        f"{R}/logs/backbone-{{backbone}}.log",
    shell:
        "python workflow/scripts/backbone.py --from-images {input.images} --name {wildcards.backbone}"
        " --out {R}/backbones/{wildcards.backbone} --work {R}/.work/backbone-{wildcards.backbone}"
        " {COMMON} {params.section} > {log} 2>&1"
