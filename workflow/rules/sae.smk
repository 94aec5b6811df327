SAE_WEIGHTS = f"{R}/saes/{{sae}}/sae.safetensors"
SAE_CONFIG = f"{R}/saes/{{sae}}/config.json"
RANDOM_SAE = "src/sparsight/sae/topk.py"  # the variant of the random dictionary that every SAE is compared with
OF_AN_SAE = ["metrics.json", "latents.parquet", "baselines.parquet", "probing.parquet"]
MAPS = f"{R}/saes/{{chain}}/affine.safetensors"

# One job trains the SAEs of a section, one per seed (and site of a chain), on one reading of the store.
for GRID in RUN.saes:

    rule:
        name:
            f"sae_{GRID}"
        input:
            images=f"{R}/images/manifest.parquet",
            store=f"{R}/activations/{RUN.saes[GRID].backbone}/train.json",
            trust=f"{R}/.trust/sae-{GRID}",
            code=code("sae.py", f"src/sparsight/sae/{RUN.saes[GRID].kind}.py"),
        output:
            weights=expand(SAE_WEIGHTS, sae=RUN.grids[GRID]),
            config=expand(SAE_CONFIG, sae=RUN.grids[GRID]),
            log=expand(f"{R}/saes/{{sae}}/training.jsonl", sae=RUN.grids[GRID]),
            maps=expand(MAPS, chain=[c for c in RUN.chains if c.rpartition("-s")[0] == GRID]),
            record=f"{R}/records/sae-{GRID}.json",
        log:
            f"{R}/logs/sae-{GRID}.log",
        benchmark:
            f"{R}/benchmarks/sae-{GRID}.jsonl"
        threads: THREADS
        resources:
            **needs(RUN.saes[GRID].memory_mb),
        params:
            name=GRID,
            out=subpath(output[0], ancestor=2 + RUN.grids[GRID][0].count("/")),
            work=f"{R}/.work/sae-{GRID}",
            flags=flags(RUN.saes[GRID]),
        shell:
            "python workflow/scripts/sae.py --from-images {input.images} --from-store {input.store}"
            " --name {params.name}"
            " --out {params.out} --work {params.work} --record {output.record}"
            " {params.flags} > {log} 2>&1"


# And one evaluates them, beside baselines that are the same for all.
for GRID, SECTION in RUN.saes.items():
    if SECTION.sites:
        continue  # chains, below

    rule:
        name:
            f"evaluate_{GRID}"
        input:
            images=f"{R}/images/manifest.parquet",
            backbone=f"{R}/backbones/{SECTION.backbone}/model.safetensors",
            train=f"{R}/activations/{SECTION.backbone}/train.json",
            test=f"{R}/activations/{SECTION.backbone}/test.json",
            saes=expand(SAE_WEIGHTS, sae=RUN.grids[GRID]),
            configs=expand(SAE_CONFIG, sae=RUN.grids[GRID]),
            trust=f"{R}/.trust/evaluate-{GRID}",
            code=code("evaluate_sae.py", f"src/sparsight/sae/{SECTION.kind}.py", RANDOM_SAE),
        output:
            expand(f"{R}/saes/{{sae}}/{{of}}", sae=RUN.grids[GRID], of=OF_AN_SAE),
            record=f"{R}/records/evaluate-{GRID}.json",
        log:
            f"{R}/logs/evaluate-{GRID}.log",
        benchmark:
            f"{R}/benchmarks/evaluate-{GRID}.jsonl"
        threads: THREADS
        resources:
            **needs(),
        params:
            name=GRID,
            out=subpath(output[0], ancestor=2),
            work=f"{R}/.work/evaluate-{GRID}",
            flags=flags(),
        shell:
            "python workflow/scripts/evaluate_sae.py --from-images {input.images} --from-backbone {input.backbone}"
            " --from-train {input.train} --from-test {input.test} --from-saes {input.saes} --name {params.name}"
            " --out {params.out} --work {params.work} --record {output.record}"
            " {params.flags} > {log} 2>&1"


for CHAIN, SECTION in RUN.chains.items():

    rule:
        name:
            f"evaluate_{CHAIN}"
        input:
            images=f"{R}/images/manifest.parquet",
            backbone=f"{R}/backbones/{SECTION.backbone}/model.safetensors",
            train=f"{R}/activations/{SECTION.backbone}/train.json",
            test=f"{R}/activations/{SECTION.backbone}/test.json",
            maps=expand(MAPS, chain=CHAIN),
            saes=expand(SAE_WEIGHTS, sae=[f"{CHAIN}/{site}" for site in SECTION.sites]),
            configs=expand(SAE_CONFIG, sae=[f"{CHAIN}/{site}" for site in SECTION.sites]),
            trust=f"{R}/.trust/evaluate-{CHAIN}",
            code=code("evaluate_chain.py", f"src/sparsight/sae/{SECTION.kind}.py", RANDOM_SAE),
        output:
            chain=f"{R}/saes/{CHAIN}/metrics.json",
            sites=expand(f"{R}/saes/{CHAIN}/{{site}}/{{of}}", site=SECTION.sites, of=OF_AN_SAE),
            record=f"{R}/records/evaluate-{CHAIN}.json",
        log:
            f"{R}/logs/evaluate-{CHAIN}.log",
        benchmark:
            f"{R}/benchmarks/evaluate-{CHAIN}.jsonl"
        threads: THREADS
        resources:
            **needs(),
        params:
            name=CHAIN,
            out=subpath(output[0], parent=True),
            work=f"{R}/.work/evaluate-{CHAIN}",
            flags=flags(),
        shell:
            "python workflow/scripts/evaluate_chain.py --from-images {input.images} --from-backbone {input.backbone}"
            " --from-train {input.train} --from-test {input.test} --from-maps {input.maps} --from-saes {input.saes}"
            " --name {params.name} --out {params.out} --work {params.work} --record {output.record}"
            " {params.flags} > {log} 2>&1"


include: "stability.smk"
