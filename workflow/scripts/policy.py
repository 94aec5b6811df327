"""Train a head policy (--name) on a frozen backbone: policy.safetensors, config.json, training.jsonl."""

from sparsight.config import Policy
from sparsight.pipeline import stage


def main(job: stage.Stage) -> None:
    from sparsight.backbones.loading import open_folder
    from sparsight.images.manifest import Manifest
    from sparsight.pruning.train import fit

    device = job.device
    backbone, _ = open_folder(job.inputs["backbone"].parent)
    manifest, n_parallel = Manifest(job.inputs["images"]), job.cores // job.compute.threads
    fit(job.config, backbone.to(device), manifest, job.name, job.seed, job.work, n_parallel, job.record())


if __name__ == "__main__":
    stage.run(
        main,
        __doc__,
        Policy,
        images="manifest.parquet of the images stage",
        backbone="model.safetensors of the backbone stage",
    )
