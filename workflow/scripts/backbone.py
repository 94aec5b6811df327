"""Train a backbone or take its weights: images -> model.safetensors, config.json, training.jsonl."""

from sparsight import stage
from sparsight.config import Backbone


def main(job: stage.Stage) -> None:
    from sparsight.fit_backbone import fit
    from sparsight.images import Manifest

    fit(job.config, Manifest(job.inputs["images"]), job.name, job.seed, job.work, job.device, job.record())


if __name__ == "__main__":
    stage.run(main, __doc__, Backbone, images="manifest.parquet of the images stage")
