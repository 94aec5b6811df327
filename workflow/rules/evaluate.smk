include: "names.smk"


RANDOM_SAE = "src/sparsight/sae/variants/topk.py"  # the random dictionary, a baseline of every SAE
OF_AN_SAE = ["metrics.json", "latents.parquet", "baselines.parquet", "probing.parquet"]

# Sections of one shape share their rules, as in sae.smk.
for NUMBER, (ENDINGS, SECTIONS) in enumerate(RUN.shapes.items(), 1):
    SAES = expand("{{section}}{ending}", ending=ENDINGS)
    SHAPE = RUN.saes[SECTIONS[0]]
    CHAINS = expand("{{section}}-s{seed}", seed=SHAPE.seeds if SHAPE.sites else [])

    # One job evaluates the SAEs of a section, because their baselines are the same.
    rule:
        name:
            f"evaluate_{NUMBER}"
        input:
            images=f"{R}/images/manifest.parquet",
            backbone=backbone_of_sae,
            stores=evaluation_stores,
            maps=expand(MAPS, chain=CHAINS),
            saes=expand(SAE_WEIGHTS, sae=SAES),
            configs=expand(SAE_CONFIG, sae=SAES),
            namer=namer,
            embeddings=embeddings,
            judge=judge,
            words=WORDS,
            mark=mark(
                "evaluate-{section}",
                code_of_sae("evaluate_sae.py", RANDOM_SAE),
                evaluation_section,
                reads=read_by_evaluation,
            ),
        output:
            expand(f"{R}/saes/{{sae}}/{{of}}", sae=SAES, of=OF_AN_SAE),
            chains=expand(f"{R}/saes/{{chain}}/metrics.json", chain=CHAINS),
            record=f"{R}/records/evaluate-{{section}}.json",
        log:
            f"{R}/logs/evaluate-{{section}}.log",
        benchmark:
            f"{R}/benchmarks/evaluate-{{section}}.jsonl"
        wildcard_constraints:
            section=one_of(SECTIONS),
        threads: THREADS
        resources:
            **needs(),
        params:
            out=subpath(output[0], ancestor=2 + bool(CHAINS)),
            work=f"{R}/.work/evaluate-{{section}}",
            flags=flags(code_of_sae("evaluate_sae.py", RANDOM_SAE), evaluation_section),
        shell:
            "python {SCRIPTS}/evaluate_sae.py --from-images {input.images} --from-backbone {input.backbone}"
            " --from-stores {input.stores} --from-maps {input.maps} --from-saes {input.saes} --name {wildcards.section}"
            " --from-namer {input.namer} --from-embeddings {input.embeddings}"
            " --from-judge {input.judge} --from-words {input.words}"
            " --out {params.out} --work {params.work} --record {output.record}"
            " {params.flags} > {log} 2>&1"
