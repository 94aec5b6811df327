PRUNED = expand(rules.backbone.output.weights, backbone=sorted({p.backbone for p in RUN.policies.values()}))


rule timings:
    input:
        backbones=PRUNED,
        mark=mark("timings", code("timings.py"), reads=PRUNED),
    output:
        times=f"{R}/timings.json",
        record=f"{R}/records/timings.json",
    log:
        f"{R}/logs/timings.log",
    benchmark:
        f"{R}/benchmarks/timings.jsonl"
    # Snakemake cuts this to --cores, so nothing else runs while this stage measures.
    threads: 1024
    resources:
        **needs(),
        cpus_per_task=THREADS,  # SLURM uses these two instead
        slurm_extra="--exclusive",
    params:
        out=subpath(output[0], parent=True),
        work=f"{R}/.work/timings",
        flags=flags(code("timings.py")),
    shell:
        "python {SCRIPTS}/timings.py --from-backbones {input.backbones}"
        " --out {params.out} --work {params.work} --record {output.record}"
        " {params.flags} > {log} 2>&1"
