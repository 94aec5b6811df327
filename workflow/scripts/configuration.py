"""Write the run's whole configuration as Snakemake merged it, once the images have the labels that it needs."""

import json

from sparsight.pipeline import stage


def main(job: stage.Stage) -> None:
    from sparsight.images.manifest import Manifest
    from sparsight.pipeline.labels import check_labels
    from sparsight.pipeline.run import load_run

    merged = job.inputs["configuration"].read_text()
    check_labels(load_run(json.loads(merged)), Manifest(job.inputs["images"]))
    (job.work.out / "configuration.json").write_text(merged)


if __name__ == "__main__":
    stage.run(
        main,
        __doc__,
        images="manifest.parquet of the images stage",
        configuration="the merged configuration, which planning leaves in the run's folder",
    )
