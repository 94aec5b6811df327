include: "steered.smk"


wildcard_constraints:
    steering=one_of(RUN.steering),
    seed=r"\d+",
    other=one_of(RUN.other_images),


OF_A_STEERING = [".safetensors", ".parquet", "-classes.parquet", ".json"]

# Sections with the same seeds share their rule. One job steers with all SAEs of a section, because the model runs once for
# them up to their site.
for NUMBER, (SEEDS, SECTIONS) in enumerate(RUN.steering_seeds.items(), 1):

    rule:
        name:
            f"steering_{NUMBER}"
        input:
            images=f"{R}/images/manifest.parquet",
            backbone=backbone_of_sae,
            stores=stores_of_steering,
            finder=stores_of_finder,
            saes=steering_saes,
            layers=layers_of_steering,
            mark=mark("steering-{steering}", code_of_steering("steering.py"), steering_section, read_by_steering),
        output:
            expand(f"{R}/steering/{{{{steering}}}}-s{{seed}}{{of}}", seed=SEEDS, of=OF_A_STEERING),
            record=f"{R}/records/steering-{{steering}}.json",
        log:
            f"{R}/logs/steering-{{steering}}.log",
        benchmark:
            f"{R}/benchmarks/steering-{{steering}}.jsonl"
        wildcard_constraints:
            steering=one_of(SECTIONS),
        priority: 2
        threads: THREADS
        resources:
            **needs(),
        params:
            out=subpath(output[0], parent=True),
            work=f"{R}/.work/steering-{{steering}}",
            flags=flags(code_of_steering("steering.py"), steering_section),
        shell:
            "python {SCRIPTS}/steering.py --from-images {input.images} --from-backbone {input.backbone}"
            " --from-stores {input.stores} --from-finder {input.finder} --from-saes {input.saes}"
            " --from-layers {input.layers} --name {wildcards.steering}"
            " --out {params.out} --work {params.work} --record {output.record}"
            " {params.flags} > {log} 2>&1"

    # The same vectors, strengths and thresholds on a data set that the SAEs were not trained on.
    rule:
        name:
            f"steering_elsewhere_{NUMBER}"
        input:
            images=rules.other_images.output.manifest,
            backbone=backbone_of_sae,
            saes=steering_saes,
            layers=layers_of_steering,
            vectors=expand(f"{R}/steering/{{{{steering}}}}-s{{seed}}.safetensors", seed=SEEDS),
            homes=expand(f"{R}/steering/{{{{steering}}}}-s{{seed}}.json", seed=SEEDS),
            mark=mark(
                "steering-{steering}@{other}",
                code_of_steering("steering_elsewhere.py"),
                reads=read_by_steering_elsewhere,
            ),
        output:
            expand(f"{R}/steering/{{{{steering}}}}-s{{seed}}/{{{{other}}}}.{{of}}", seed=SEEDS, of=["parquet", "json"]),
            record=f"{R}/records/steering-{{steering}}@{{other}}.json",
        log:
            f"{R}/logs/steering-{{steering}}@{{other}}.log",
        benchmark:
            f"{R}/benchmarks/steering-{{steering}}@{{other}}.jsonl"
        wildcard_constraints:
            steering=one_of(SECTIONS),
        threads: THREADS
        resources:
            **needs(),
        params:
            out=subpath(output[0], ancestor=2),
            work=f"{R}/.work/steering-{{steering}}@{{other}}",
            flags=flags(code_of_steering("steering_elsewhere.py")),
        shell:
            "python {SCRIPTS}/steering_elsewhere.py --from-images {input.images} --from-backbone {input.backbone}"
            " --from-saes {input.saes} --from-layers {input.layers} --from-homes {input.homes} --name {wildcards.other}"
            " --out {params.out} --work {params.work} --record {output.record}"
            " {params.flags} > {log} 2>&1"


include: "disentangle.smk"
