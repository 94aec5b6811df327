import dataclasses

from sparsight.common.digests import digest
from sparsight.common.files import json_text, write_shared

# Named after its content, so the plan of another configuration cannot replace it.
MERGED = MARKS.folder / f"configuration-{digest(dataclasses.asdict(RUN))[:16]}.json"
if workflow.is_main_process and not MERGED.exists():
    write_shared(MERGED, json_text(dataclasses.asdict(RUN)))
    os.utime(MERGED, (0, 0))  # older than any result


# The run's whole configuration: defaults, params.yaml and overlays in one file. It waits for the images, and fails
# if they lack labels that a section needs. Only backbones, which check this by themselves, come before it.
rule configuration:
    input:
        images=f"{R}/images/manifest.parquet",
        merged=MERGED,
        mark=mark("configuration", code("configuration.py"), reads=[f"{R}/images/manifest.parquet", MERGED]),
    output:
        configuration=f"{R}/configuration.json",
        record=f"{R}/records/configuration.json",
    log:
        f"{R}/logs/configuration.log",
    priority: 4
    localrule: True
    params:
        out=subpath(output[0], parent=True),
        work=f"{R}/.work/configuration",
        flags=flags(code("configuration.py")),
    shell:
        "python {SCRIPTS}/configuration.py --from-images {input.images} --from-configuration {input.merged}"
        " --out {params.out} --work {params.work} --record {output.record}"
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
        configuration=rules.configuration.output.configuration,
        finished=FINISHED,
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
        flags=flags(code("provenance.py")),
    shell:
        "python {SCRIPTS}/provenance.py --from-configuration {input.configuration}"
        " --out {params.out} --work {params.work}"
        " {params.flags} > {log} 2>&1"
