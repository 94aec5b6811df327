# How much alike the SAEs of a section are over its seeds.
rule stability:
    input:
        saes=lambda wildcards: expand(SAE_WEIGHTS, sae=RUN.grids[wildcards.grid]),
        configs=lambda wildcards: expand(SAE_CONFIG, sae=RUN.grids[wildcards.grid]),
        trust=f"{R}/.trust/stability-{{grid}}",
        code=lambda wildcards: code("stability.py", f"src/sparsight/sae/{RUN.saes[wildcards.grid].kind}.py"),
    output:
        stability=f"{R}/saes/{{grid}}-stability.json",
        record=f"{R}/records/stability-{{grid}}.json",
    log:
        f"{R}/logs/stability-{{grid}}.log",
    benchmark:
        f"{R}/benchmarks/stability-{{grid}}.jsonl"
    wildcard_constraints:
        grid=one_of(RUN.grids),
    threads: THREADS
    resources:
        **needs(gpu=0),
    params:
        out=subpath(output[0], parent=True),
        work=f"{R}/.work/stability-{{grid}}",
        flags=flags(),
    shell:
        "python workflow/scripts/stability.py --from-saes {input.saes} --name {wildcards.grid}"
        " --out {params.out} --work {params.work} --record {output.record}"
        " {params.flags} > {log} 2>&1"
