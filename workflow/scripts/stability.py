"""How similar the SAEs of a section (--name) are over its seeds: <name>-stability.json."""

from sparsight.pipeline import stage


def main(job: stage.Stage) -> None:
    from sparsight.sae.metrics.stability import write_stability

    folders = [path.parent for path in job.inputs["saes"]]
    write_stability(folders, job.seed, job.work.out / f"{job.name}-stability.json", job.record())


if __name__ == "__main__":
    stage.run(main, __doc__, saes=["sae.safetensors of every seed, and of every site of a chain"])
