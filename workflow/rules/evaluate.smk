include: "names.smk"


RANDOM_SAE = "src/sparsight/sae/variants/topk.py"  # the random dictionary, a baseline of every SAE
OF_AN_SAE = ["metrics.json", "latents.parquet", "baselines.parquet", "probing.parquet"]

# Sections of one shape share their rules, as in sae.smk.
for NUMBER, (ENDINGS, SECTIONS) in enumerate(RUN.shapes.items(), 1):
    SAES = expand("{{section}}{ending}", ending=ENDINGS)
    SHAPE = RUN.saes[SECTIONS[0]]

    if not SHAPE.sites:

        # One job evaluates the SAEs of a section, because their baselines are the same.
        rule:
            name:
                f"evaluate_{NUMBER}"
            input:
                images=f"{R}/images/manifest.parquet",
                backbone=backbone_of_sae,
                stores=evaluation_stores,
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
                out=subpath(output[0], ancestor=2),
                work=f"{R}/.work/evaluate-{{section}}",
                flags=flags(code_of_sae("evaluate_sae.py", RANDOM_SAE), evaluation_section),
            shell:
                "python {SCRIPTS}/evaluate_sae.py --from-images {input.images} --from-backbone {input.backbone}"
                " --from-stores {input.stores} --from-saes {input.saes} --name {wildcards.section}"
                " --from-namer {input.namer} --from-embeddings {input.embeddings}"
                " --from-judge {input.judge} --from-words {input.words}"
                " --out {params.out} --work {params.work} --record {output.record}"
                " {params.flags} > {log} 2>&1"

    else:
        SITES = expand("{{section}}-s{{seed}}/{site}", site=SHAPE.sites)

        rule:
            name:
                f"evaluate_chain_{NUMBER}"
            input:
                images=f"{R}/images/manifest.parquet",
                backbone=backbone_of_sae,
                stores=evaluation_stores,
                maps=expand(MAPS, chain="{section}-s{seed}"),
                saes=expand(SAE_WEIGHTS, sae=SITES),
                configs=expand(SAE_CONFIG, sae=SITES),
                namer=namer,
                embeddings=embeddings,
                judge=judge,
                words=WORDS,
                mark=mark(
                    "evaluate-{section}-s{seed}",
                    code_of_sae("evaluate_chain.py", RANDOM_SAE),
                    evaluation_section,
                    reads=read_by_evaluation,
                ),
            output:
                chain=f"{R}/saes/{{section}}-s{{seed}}/metrics.json",
                sites=expand(f"{R}/saes/{{site}}/{{of}}", site=SITES, of=OF_AN_SAE),
                record=f"{R}/records/evaluate-{{section}}-s{{seed}}.json",
            log:
                f"{R}/logs/evaluate-{{section}}-s{{seed}}.log",
            benchmark:
                f"{R}/benchmarks/evaluate-{{section}}-s{{seed}}.jsonl"
            wildcard_constraints:
                section=one_of(SECTIONS),
                seed=r"\d+",
            threads: THREADS
            resources:
                **needs(),
            params:
                out=subpath(output[0], parent=True),
                work=f"{R}/.work/evaluate-{{section}}-s{{seed}}",
                flags=flags(code_of_sae("evaluate_chain.py", RANDOM_SAE), evaluation_section),
            shell:
                "python {SCRIPTS}/evaluate_chain.py --from-images {input.images}"
                " --from-backbone {input.backbone} --from-stores {input.stores}"
                " --from-maps {input.maps} --from-saes {input.saes} --name {wildcards.section}-s{wildcards.seed}"
                " --from-namer {input.namer} --from-embeddings {input.embeddings}"
                " --from-judge {input.judge} --from-words {input.words}"
                " --out {params.out} --work {params.work} --record {output.record}"
                " {params.flags} > {log} 2>&1"
