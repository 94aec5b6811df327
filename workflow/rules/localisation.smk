include: "localised.smk"


# One job scores the SAEs of a section, because they share the masks and most controls.
rule localisation:
    input:
        images=f"{R}/images/manifest.parquet",
        backbone=backbone_of_sae,
        stores=stores_of_localisation,
        saes=saes_of_section,
        configs=lambda wildcards: expand(SAE_CONFIG, sae=RUN.grids[wildcards.section]),
        mark=mark("localisation-{section}", code_of_sae("localisation.py", RANDOM_SAE), reads=read_by_localisation),
    output:
        table=f"{R}/localisation/{{section}}.parquet",
        summary=f"{R}/localisation/{{section}}.json",
        record=f"{R}/records/localisation-{{section}}.json",
    log:
        f"{R}/logs/localisation-{{section}}.log",
    benchmark:
        f"{R}/benchmarks/localisation-{{section}}.jsonl"
    wildcard_constraints:
        section=one_of(RUN.localised),
    threads: THREADS
    resources:
        **needs(),
    params:
        out=subpath(output[0], parent=True),
        work=f"{R}/.work/localisation-{{section}}",
        flags=flags(code_of_sae("localisation.py", RANDOM_SAE)),
    shell:
        "python {SCRIPTS}/localisation.py --from-images {input.images} --from-backbone {input.backbone}"
        " --from-stores {input.stores} --from-saes {input.saes} --name {wildcards.section}"
        " --out {params.out} --work {params.work} --record {output.record}"
        " {params.flags} > {log} 2>&1"
