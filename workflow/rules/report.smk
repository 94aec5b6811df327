RESULTS = {
    "backbones": expand(rules.backbone.output.config, backbone=RUN.backbones),
    "saes": expand(rules.evaluate_sae.output, sae=RUN.sae_names),
    "steerings": expand(f"{R}/steering/{{name}}.parquet", name=RUN.steering_names),
    "policies": expand(rules.pruning.output.metrics, policy=RUN.policies),
}


rule summary:
    input:
        **RESULTS,
        code=sources("summary.py"),
    output:
        metrics=f"{R}/metrics.json",
        provenance=f"{R}/provenance.json",
    threads: 1
    log:
        f"{R}/logs/summary.log",
    shell:
        "python workflow/scripts/summary.py --from-backbones {input.backbones} --from-saes {input.saes}"
        " --from-steerings {input.steerings} --from-policies {input.policies}"
        " --out {R} --work {R}/.work/summary"
        " {COMMON} > {log} 2>&1"


rule report:
    input:
        **RESULTS,
        metrics=rules.summary.output.metrics,
        images=rules.images.output,
        stores=expand(f"{R}/activations/{{backbone}}/test.json", backbone=RUN.backbones),
        code=sources("report.py", "src/sparsight/report/page.html.j2"),
    output:
        f"{R}/report/index.html",
    params:
        section=to_flags(RUN.report),
    threads: THREADS
    log:
        f"{R}/logs/report.log",
    shell:
        "python workflow/scripts/report.py --from-backbones {input.backbones} --from-saes {input.saes}"
        " --from-steerings {input.steerings} --from-policies {input.policies} --from-metrics {input.metrics}"
        " --from-images {input.images} --from-stores {input.stores}"
        " --out {R}/report --work {R}/.work/report"
        " {COMMON} {params.section} > {log} 2>&1"
