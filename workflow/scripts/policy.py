"""Train a head policy (--name) on a frozen backbone: policy.safetensors, config.json, training.jsonl."""

from sparsight import stage
from sparsight.config import Policy


def main(job: stage.Stage) -> None:
    from sparsight import backbones
    from sparsight.images import Manifest
    from sparsight.pruning.train import fit

    device = job.device
    backbone, _ = backbones.open_folder(job.inputs["backbone"].parent)
    manifest, at_once = Manifest(job.inputs["images"]), job.cores // job.compute.threads
    fit(job.config, backbone.to(device), manifest, job.name, job.seed, job.work, at_once, job.record())


if __name__ == "__main__":
    stage.run(
        main,
        __doc__,
        Policy,
        images="manifest.parquet of the images stage",
        backbone="model.safetensors of the backbone stage",
    )
