wildcard_constraints:
    split="train|val|test",
    part="[0-9]+",


# Several jobs may share a split. Each fills its own shards; a last job verifies all of them and writes the manifest.
# The store itself is a folder, <split>.zarr. Snakemake knows it by its manifest, which is written last.
rule extract:
    input:
        images=f"{R}/images/manifest.parquet",
        backbone=rules.backbone.output.weights,
        config=rules.backbone.output.config,
        mark=mark("extract-{backbone}-{split}-{part}", code("extract.py"), RUN.activations),
    output:
        part=temp(f"{R}/activations/{{backbone}}/{{split}}.part-{{part}}.json"),
        record=f"{R}/records/extract-{{backbone}}-{{split}}-{{part}}.json",
    log:
        f"{R}/logs/extract-{{backbone}}-{{split}}-{{part}}.log",
    benchmark:
        f"{R}/benchmarks/extract-{{backbone}}-{{split}}-{{part}}.jsonl"
    priority: 1
    threads: THREADS
    resources:
        **needs(),
        workers=RUN.compute.workers,  # not a parameter: it changes no result
    params:
        parts=RUN.activations.parts,
        out=subpath(output[0], parent=True),
        work=f"{R}/.work/extract-{{backbone}}-{{split}}-{{part}}",
        flags=flags(code("extract.py"), RUN.activations),
    shell:
        "python {SCRIPTS}/extract.py --from-images {input.images} --from-backbone {input.backbone}"
        " --name {wildcards.split}.part-{wildcards.part} --out {params.out} --work {params.work} --record {output.record}"
        " {params.flags} --parts {params.parts} --workers {resources.workers} > {log} 2>&1"


rule activations:
    input:
        parts=expand(rules.extract.output.part, part=range(RUN.activations.parts), allow_missing=True),
        mark=mark("activations-{backbone}-{split}", code("activations.py")),
    output:
        manifest=f"{R}/activations/{{backbone}}/{{split}}.json",
        record=f"{R}/records/activations-{{backbone}}-{{split}}.json",
    log:
        f"{R}/logs/activations-{{backbone}}-{{split}}.log",
    benchmark:
        f"{R}/benchmarks/activations-{{backbone}}-{{split}}.jsonl"
    resources:
        **needs(gpu=0),
    params:
        out=subpath(output[0], parent=True),
        work=f"{R}/.work/activations-{{backbone}}-{{split}}",
        flags=flags(code("activations.py")),
    shell:
        "python {SCRIPTS}/activations.py --from-parts {input.parts} --name {wildcards.split}"
        " --out {params.out} --work {params.work} --record {output.record}"
        " {params.flags} > {log} 2>&1"
