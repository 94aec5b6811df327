rule images:
    input:
        code=sources("images.py"),
    output:
        f"{R}/images/manifest.parquet",
    params:
        section=to_flags(RUN.images),
    threads: THREADS
    log:
        f"{R}/logs/images.log",
    shell:
        "python workflow/scripts/images.py --out {R}/images --work {R}/.work/images"
        " {COMMON} {params.section} > {log} 2>&1"
