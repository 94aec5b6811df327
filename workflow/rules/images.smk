rule images:
    input:
        mark=mark("images", code("images.py"), RUN.images),
    output:
        manifest=f"{R}/images/manifest.parquet",
        record=f"{R}/records/images.json",
    log:
        f"{R}/logs/images.log",
    benchmark:
        f"{R}/benchmarks/images.jsonl"
    threads: THREADS
    resources:
        **needs(gpu=0),
    params:
        out=subpath(output[0], parent=True),
        work=f"{R}/.work/images",
        flags=flags(code("images.py"), RUN.images),
    shell:
        "python {SCRIPTS}/images.py --out {params.out} --work {params.work} --record {output.record}"
        " {params.flags} > {log} 2>&1"


# Another data set, on which steering is evaluated as well.
rule other_images:
    input:
        mark=mark("images-{other}", code("images.py"), other_images_section),
    output:
        manifest=f"{R}/images/{{other}}/manifest.parquet",
        record=f"{R}/records/images-{{other}}.json",
    log:
        f"{R}/logs/images-{{other}}.log",
    benchmark:
        f"{R}/benchmarks/images-{{other}}.jsonl"
    threads: THREADS
    resources:
        **needs(gpu=0),
    params:
        out=subpath(output[0], parent=True),
        work=f"{R}/.work/images-{{other}}",
        flags=flags(code("images.py"), other_images_section),
    shell:
        "python {SCRIPTS}/images.py --out {params.out} --work {params.work} --record {output.record}"
        " {params.flags} > {log} 2>&1"
