include: "attributed.smk"


# One job judges the SAEs of a section, because principal components and neurons are the same for all of them.
rule attribution:
    input:
        images=f"{R}/images/manifest.parquet",
        backbone=backbone_of_attributed,
        stores=stores_of_attributed,
        saes=attributed_saes,
        configs=lambda wildcards: expand(SAE_CONFIG, sae=RUN.grids[attribution_section(wildcards).sae]),
        mark=mark("attribution-{attributed}", code_of_attribution, attribution_section, read_by_attribution),
    output:
        table=f"{R}/attribution/{{attributed}}.parquet",
        latents=f"{R}/attribution/{{attributed}}-latents.parquet",
        summary=f"{R}/attribution/{{attributed}}.json",
        record=f"{R}/records/attribution-{{attributed}}.json",
    log:
        f"{R}/logs/attribution-{{attributed}}.log",
    benchmark:
        f"{R}/benchmarks/attribution-{{attributed}}.jsonl"
    wildcard_constraints:
        attributed=one_of(RUN.attribution),
    threads: THREADS
    resources:
        **needs(),
    params:
        out=subpath(output[0], parent=True),
        work=f"{R}/.work/attribution-{{attributed}}",
        flags=flags(code_of_attribution, attribution_section),
    shell:
        "python {SCRIPTS}/attribution.py --from-images {input.images} --from-backbone {input.backbone}"
        " --from-stores {input.stores} --from-saes {input.saes} --name {wildcards.attributed}"
        " --out {params.out} --work {params.work} --record {output.record}"
        " {params.flags} > {log} 2>&1"
