rule images:
    input:
        code=sources("images.py"),
    output:
        f"{R}/images/manifest.parquet",
    log:
        f"{R}/logs/images.log",
    threads: THREADS
    params:
        out=subpath(output[0], parent=True),
        work=f"{R}/.work/images",
        flags=flags(RUN.images),
    shell:
        "python workflow/scripts/images.py --out {params.out} --work {params.work}" " {params.flags} > {log} 2>&1"
