# How similar the SAEs of a section are over its seeds.
rule stability:
    input:
        saes=saes_of_section,
        configs=lambda wildcards: expand(SAE_CONFIG, sae=RUN.grids[wildcards.section]),
        mark=mark("stability-{section}", code_of_sae("stability.py"), reads=saes_of_section),
    output:
        stability=f"{R}/saes/{{section}}-stability.json",
        record=f"{R}/records/stability-{{section}}.json",
    log:
        f"{R}/logs/stability-{{section}}.log",
    benchmark:
        f"{R}/benchmarks/stability-{{section}}.jsonl"
    wildcard_constraints:
        section=one_of(RUN.grids),
    threads: THREADS
    resources:
        **needs(gpu=0),
    params:
        out=subpath(output[0], parent=True),
        work=f"{R}/.work/stability-{{section}}",
        flags=flags(code_of_sae("stability.py")),
    shell:
        "python {SCRIPTS}/stability.py --from-saes {input.saes} --name {wildcards.section}"
        " --out {params.out} --work {params.work} --record {output.record}"
        " {params.flags} > {log} 2>&1"
