SAE_WEIGHTS = f"{R}/saes/{{sae}}/sae.safetensors"
SAE_CONFIG = f"{R}/saes/{{sae}}/config.json"

# One job trains the SAEs of a section, one per seed, on one reading of the store.
for GRID in RUN.saes:

    rule:
        name:
            f"sae_{GRID}"
        input:
            store=f"{R}/activations/{RUN.saes[GRID].backbone}/train.json",
            code=sources("sae.py", f"src/sparsight/sae/{RUN.saes[GRID].kind}.py"),
        output:
            weights=expand(SAE_WEIGHTS, sae=RUN.grids[GRID]),
            config=expand(SAE_CONFIG, sae=RUN.grids[GRID]),
            log=expand(f"{R}/saes/{{sae}}/training.jsonl", sae=RUN.grids[GRID]),
        log:
            f"{R}/logs/sae-{GRID}.log",
        threads: THREADS
        params:
            name=GRID,
            out=subpath(output[0], ancestor=2),
            work=f"{R}/.work/sae-{GRID}",
            flags=flags(RUN.saes[GRID]),
        shell:
            "python workflow/scripts/sae.py --from-store {input.store} --name {params.name}"
            " --out {params.out} --work {params.work}"
            " {params.flags} > {log} 2>&1"


rule evaluate_sae:
    input:
        images=rules.images.output,
        backbone=backbone_of_sae,
        train=store_of("train"),
        test=store_of("test"),
        sae=SAE_WEIGHTS,
        config=SAE_CONFIG,
        code=lambda wildcards: sources("evaluate_sae.py", sae_code(wildcards.sae)),
    output:
        f"{R}/saes/{{sae}}/metrics.json",
    log:
        f"{R}/logs/evaluate-sae-{{sae}}.log",
    threads: THREADS
    params:
        out=subpath(output[0], parent=True),
        work=f"{R}/.work/evaluate-sae-{{sae}}",
        flags=flags(),
    shell:
        "python workflow/scripts/evaluate_sae.py --from-images {input.images} --from-backbone {input.backbone}"
        " --from-train {input.train} --from-test {input.test} --from-sae {input.sae} --name {wildcards.sae}"
        " --out {params.out} --work {params.work}"
        " {params.flags} > {log} 2>&1"
