# The store itself is a folder, <split>.zarr; its manifest, written last, stands for it here.
rule activations:
    input:
        images=rules.images.output,
        backbone=rules.backbone.output.weights,
        config=rules.backbone.output.config,
        code=sources("activations.py"),
    output:
        f"{R}/activations/{{backbone}}/{{split}}.json",
    log:
        f"{R}/logs/activations-{{backbone}}-{{split}}.log",
    threads: THREADS
    params:
        out=subpath(output[0], parent=True),
        work=f"{R}/.work/activations-{{backbone}}-{{split}}",
        flags=flags(RUN.activations),
    shell:
        "python workflow/scripts/activations.py --from-images {input.images} --from-backbone {input.backbone}"
        " --name {wildcards.split} --out {params.out} --work {params.work}"
        " {params.flags} > {log} 2>&1"
