# The run's whole configuration: defaults, params.yaml and overlays in one file. It waits for the images. Otherwise it would
# hold a core when a backbone needs all of them, and Snakemake would start a smaller backbone first.
rule configuration:
    input:
        images=f"{R}/images/manifest.parquet",
        trust=f"{R}/.trust/configuration",
        code=code("configuration.py"),
    output:
        f"{R}/configuration.json",
    log:
        f"{R}/logs/configuration.log",
    localrule: True
    params:
        out=subpath(output[0], parent=True),
        work=f"{R}/.work/configuration",
        flags=flags(),
    shell:
        "python {SCRIPTS}/configuration.py --from-configuration {input.trust}"
        " --out {params.out} --work {params.work}"
        " {params.flags} > {log} 2>&1"


FINISHED = [
    *rules.report.output,
    *rules.summary.output,
    *rules.timings.output,
    *expand(f"{R}/activations/{{b}}/{{split}}.json", b=RUN.backbones, split=["train", "val", "test"]),
]


# The last job: by now every other stage has left its benchmark.
rule provenance:
    input:
        configuration=rules.configuration.output,
        finished=FINISHED,
        code=code("provenance.py"),
    output:
        f"{R}/provenance.json",
    log:
        f"{R}/logs/provenance.log",
    threads: 1
    resources:
        **needs(),
    params:
        out=subpath(output[0], parent=True),
        work=f"{R}/.work/provenance",
        flags=flags(),
    shell:
        "python {SCRIPTS}/provenance.py --from-configuration {input.configuration}"
        " --out {params.out} --work {params.work}"
        " {params.flags} > {log} 2>&1"
