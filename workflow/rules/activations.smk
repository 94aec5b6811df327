# The store itself is a folder, <split>.zarr; its manifest, written last, stands for it here.
rule activations:
    input:
        images=rules.images.output,
        backbone=rules.backbone.output.weights,
        config=rules.backbone.output.config,
        code=sources("activations.py"),
    output:
        f"{R}/activations/{{backbone}}/{{split}}.json",
    params:
        section=to_flags(RUN.activations),
    threads: THREADS
    log:
        f"{R}/logs/activations-{{backbone}}-{{split}}.log",
    shell:
        "python workflow/scripts/activations.py --from-images {input.images} --from-backbone {input.backbone}"
        " --name {wildcards.split} --out {R}/activations/{wildcards.backbone}"
        " --work {R}/.work/activations-{wildcards.backbone}-{wildcards.split}"
        " {COMMON} {params.section} > {log} 2>&1"
