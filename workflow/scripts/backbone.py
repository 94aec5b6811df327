"""Train a backbone, or use its weights as they are: images -> model.safetensors, config.json, training.jsonl."""

from sparsight.config import Backbone
from sparsight.pipeline import stage


def main(job: stage.Stage) -> None:
    from sparsight.backbones.fit import fit
    from sparsight.images.manifest import Manifest

    manifest, n_parallel = Manifest(job.inputs["images"]), job.cores // job.compute.threads
    fit(job.config, manifest, job.name, job.seed, job.work, job.device, n_parallel, job.record())


if __name__ == "__main__":
    stage.run(main, __doc__, Backbone, images="manifest.parquet of the images stage")
