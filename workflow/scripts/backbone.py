"""Train a backbone or take its weights: images -> model.safetensors, config.json, training.jsonl."""

from sparsight import stage
from sparsight.config import Backbone


def main(job: stage.Stage) -> None:
    from sparsight.fit_backbone import fit
    from sparsight.images import Manifest

    manifest, at_once = Manifest(job.inputs["images"]), job.cores // job.compute.threads
    fit(job.config, manifest, job.name, job.seed, job.work, job.device, at_once, job.record())


if __name__ == "__main__":
    stage.run(main, __doc__, Backbone, images="manifest.parquet of the images stage")
