# Not part of the run: request it by name, e.g. results/default/exports/vit/b5-h2-h5/model.safetensors
rule export_pruned:
    input:
        backbone=rules.backbone.output.weights,
        config=rules.backbone.output.config,
    output:
        weights=f"{R}/exports/{{backbone}}/{{heads}}/model.safetensors",
        config=f"{R}/exports/{{backbone}}/{{heads}}/config.json",
    log:
        f"{R}/logs/export-{{backbone}}-{{heads}}.log",
    threads: THREADS
    params:
        out=subpath(output[0], parent=True),
        work=f"{R}/.work/export-{{backbone}}-{{heads}}",
        flags=flags(code("export_pruned.py")),
    shell:
        "python {SCRIPTS}/export_pruned.py --from-backbone {input.backbone} --name {wildcards.heads}"
        " --out {params.out} --work {params.work}"
        " {params.flags} > {log} 2>&1"
