from itertools import chain

RESULTS = {
    "backbones": expand(rules.backbone.output.config, backbone=RUN.backbones),
    "saes": expand(f"{R}/saes/{{sae}}/metrics.json", sae=RUN.sae_names),
    "chains": expand(f"{R}/saes/{{chain}}/metrics.json", chain=RUN.chains),
    "stabilities": expand(rules.stability.output.stability, section=RUN.repeated),
    "steerings": expand(f"{R}/steering/{{name}}.parquet", name=RUN.steering_names),
    "transfers": expand(f"{R}/steering/{{name}}/{{other}}.json", name=RUN.transfers, other=RUN.other_images),
    "disentanglings": expand(rules.disentangle.output.table, disentangled=RUN.disentangle),
    "localisations": expand(rules.localisation.output.table, section=RUN.localised),
    "attributions": expand(rules.attribution.output.table, attributed=RUN.attribution),
    "spurious": expand(rules.spurious.output.table, biased=RUN.spurious),
    "policies": expand(rules.pruning.output.metrics, policy=RUN.policies),
}


rule summary:
    input:
        **RESULTS,
        images=f"{R}/images/manifest.parquet",
        mark=mark("summary", code("summary.py"), reads=[f"{R}/images/manifest.parquet", *chain(*RESULTS.values())]),
    output:
        metrics=f"{R}/metrics.json",
        curves=f"{R}/curves.json",
        record=f"{R}/records/summary.json",
    log:
        f"{R}/logs/summary.log",
    benchmark:
        f"{R}/benchmarks/summary.jsonl"
    localrule: True
    params:
        out=subpath(output[0], parent=True),
        work=f"{R}/.work/summary",
        flags=flags(code("summary.py")),
    shell:
        "python {SCRIPTS}/summary.py --from-images {input.images} --from-backbones {input.backbones}"
        " --from-saes {input.saes} --from-chains {input.chains} --from-stabilities {input.stabilities}"
        " --from-steerings {input.steerings} --from-transfers {input.transfers} --from-policies {input.policies}"
        " --from-disentanglings {input.disentanglings} --from-localisations {input.localisations}"
        " --from-attributions {input.attributions} --from-spurious {input.spurious}"
        " --out {params.out} --work {params.work} --record {output.record}"
        " {params.flags} > {log} 2>&1"


# What the report reads besides them.
OTHERS = {
    "images": [f"{R}/images/manifest.parquet"],
    "test_images": expand(rules.pruning.output.test_images, policy=RUN.policies),
    "configuration": [f"{R}/configuration.json"],
    "stores": expand(f"{R}/activations/{{backbone}}/test.json", backbone=RUN.backbones),
    "latents": expand(f"{R}/saes/{{sae}}/latents.parquet", sae=[sae for saes in RUN.grids.values() for sae in saes]),
    "head_latents": expand(f"{R}/pruning/{{policy}}/head_latents.safetensors", policy=RUN.policies),
}
READ_BY_REPORT = [*chain(*RESULTS.values(), *OTHERS.values())]
PARTS_OF_PAGE = Path(workflow.basedir, "src/sparsight/report")
FILES_OF_PAGE = sorted(
    path.relative_to(workflow.basedir).as_posix()
    for folder in ("templates", "scripts")
    for path in (PARTS_OF_PAGE / folder).iterdir()
)
CODE_OF_REPORT = code(
    "report.py",
    *FILES_OF_PAGE,
    *expand("src/sparsight/report/captions/{kind}.rst", kind=CATEGORIES),
    *dict.fromkeys(file for section in RUN.saes.values() for file in variants(section)),
)


rule report:
    input:
        **RESULTS,
        **OTHERS,
        mark=mark("report", CODE_OF_REPORT, RUN.report, READ_BY_REPORT),
    output:
        page=f"{R}/report/index.html",
        figures=[figure(kind, *name) for kind, *name in FIGURES],
        record=f"{R}/records/report.json",
    log:
        f"{R}/logs/report.log",
    benchmark:
        f"{R}/benchmarks/report.jsonl"
    threads: THREADS
    resources:
        **needs(),
    params:
        out=subpath(output[0], parent=True),
        work=f"{R}/.work/report",
        name=RUN.run,
        flags=flags(CODE_OF_REPORT, RUN.report),
    shell:
        "python {SCRIPTS}/report.py --from-backbones {input.backbones} --from-saes {input.saes}"
        " --from-chains {input.chains} --from-stabilities {input.stabilities}"
        " --from-steerings {input.steerings} --from-transfers {input.transfers} --from-policies {input.policies}"
        " --from-disentanglings {input.disentanglings} --from-localisations {input.localisations}"
        " --from-attributions {input.attributions} --from-spurious {input.spurious}"
        " --from-test_images {input.test_images}"
        " --from-images {input.images} --from-configuration {input.configuration} --from-stores {input.stores}"
        " --from-latents {input.latents} --from-head_latents {input.head_latents}"
        " --name {params.name}"
        " --out {params.out} --work {params.work} --record {output.record}"
        " {params.flags} > {log} 2>&1"
