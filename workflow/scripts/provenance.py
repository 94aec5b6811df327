"""Record commit, versions, machine, digest of the configuration, and time and memory of each job: provenance.json."""

from sparsight.pipeline import stage


def main(job: stage.Stage) -> None:
    from sparsight.pipeline.provenance import write_provenance

    write_provenance(job.inputs["configuration"], job.out / "benchmarks", job.work.out / "provenance.json")


if __name__ == "__main__":
    stage.run(main, __doc__, configuration="configuration.json of the run")
