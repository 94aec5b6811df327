"""Write the run's whole configuration as Snakemake merged it: configuration.json."""

from sparsight.pipeline import stage


def main(job: stage.Stage) -> None:
    (job.work.out / "configuration.json").write_text(job.inputs["configuration"].read_text())


if __name__ == "__main__":
    stage.run(main, __doc__, configuration="the merged configuration, which planning leaves in the run's folder")
