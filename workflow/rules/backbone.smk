rule backbone:
    input:
        images=f"{R}/images/manifest.parquet",
        mark=mark("backbone-{backbone}", code("backbone.py"), backbone_section),
    output:
        weights=f"{R}/backbones/{{backbone}}/model.safetensors",
        config=f"{R}/backbones/{{backbone}}/config.json",
        prompts=f"{R}/backbones/{{backbone}}/prompts.safetensors",
        log=f"{R}/backbones/{{backbone}}/training.jsonl",
        record=f"{R}/records/backbone-{{backbone}}.json",
    log:
        f"{R}/logs/backbone-{{backbone}}.log",
    benchmark:
        f"{R}/benchmarks/backbone-{{backbone}}.jsonl"
    priority: 5
    threads: lambda wildcards: side_by_side(RUN.backbones[wildcards.backbone].cores)
    resources:
        **needs(),
    params:
        out=subpath(output[0], parent=True),
        work=f"{R}/.work/backbone-{{backbone}}",
        flags=flags(code("backbone.py"), backbone_section),
    shell:
        "python {SCRIPTS}/backbone.py --from-images {input.images} --name {wildcards.backbone}"
        " --cores {threads} --out {params.out} --work {params.work} --record {output.record}"
        " {params.flags} > {log} 2>&1"
