include: "biased.smk"


# One job ablates the latents of the SAEs of a section, because the other methods are the same for all of them.
rule spurious:
    input:
        images=f"{R}/images/manifest.parquet",
        backbone=backbone_of_biased,
        stores=stores_of_biased,
        saes=biased_saes,
        configs=lambda wildcards: expand(SAE_CONFIG, sae=RUN.grids[spurious_section(wildcards).sae]),
        mark=mark("spurious-{biased}", code_of_spurious, spurious_section, read_by_spurious),
    output:
        table=f"{R}/spurious/{{biased}}.parquet",
        groups=f"{R}/spurious/{{biased}}-groups.parquet",
        summary=f"{R}/spurious/{{biased}}.json",
        record=f"{R}/records/spurious-{{biased}}.json",
    log:
        f"{R}/logs/spurious-{{biased}}.log",
    benchmark:
        f"{R}/benchmarks/spurious-{{biased}}.jsonl"
    wildcard_constraints:
        biased=one_of(RUN.spurious),
    threads: THREADS
    resources:
        **needs(),
    params:
        out=subpath(output[0], parent=True),
        work=f"{R}/.work/spurious-{{biased}}",
        flags=flags(code_of_spurious, spurious_section),
    shell:
        "python {SCRIPTS}/spurious.py --from-images {input.images} --from-backbone {input.backbone}"
        " --from-stores {input.stores} --from-saes {input.saes} --name {wildcards.biased}"
        " --out {params.out} --work {params.work} --record {output.record}"
        " {params.flags} > {log} 2>&1"
