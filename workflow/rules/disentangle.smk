include: "disentangled.smk"
include: "attribution.smk"
include: "spurious.smk"


# One job interchanges the attributes by the SAEs of a section, because the other methods are the same for all of them.
rule disentangle:
    input:
        images=f"{R}/images/manifest.parquet",
        backbone=backbone_of_disentangled,
        stores=stores_of_disentangled,
        saes=disentangled_saes,
        configs=lambda wildcards: expand(SAE_CONFIG, sae=RUN.grids[disentangle_section(wildcards).sae]),
        mark=mark("disentangle-{disentangled}", code_of_disentangling, disentangle_section, read_by_disentangling),
    output:
        table=f"{R}/disentangling/{{disentangled}}.parquet",
        absorption=f"{R}/disentangling/{{disentangled}}-absorption.parquet",
        summary=f"{R}/disentangling/{{disentangled}}.json",
        record=f"{R}/records/disentangle-{{disentangled}}.json",
    log:
        f"{R}/logs/disentangle-{{disentangled}}.log",
    benchmark:
        f"{R}/benchmarks/disentangle-{{disentangled}}.jsonl"
    wildcard_constraints:
        disentangled=one_of(RUN.disentangle),
    threads: THREADS
    resources:
        **needs(),
    params:
        out=subpath(output[0], parent=True),
        work=f"{R}/.work/disentangle-{{disentangled}}",
        flags=flags(code_of_disentangling, disentangle_section),
    shell:
        "python {SCRIPTS}/disentangle.py --from-images {input.images} --from-backbone {input.backbone}"
        " --from-stores {input.stores} --from-saes {input.saes} --name {wildcards.disentangled}"
        " --out {params.out} --work {params.work} --record {output.record}"
        " {params.flags} > {log} 2>&1"
