"""Steer a head policy with every SAE and compare with controls: pruning tables and metrics.json."""

from sparsight.config import Pruning
from sparsight.pipeline import stage


def main(job: stage.Stage) -> None:
    from sparsight.backbones.loading import open_folder
    from sparsight.images.manifest import Manifest
    from sparsight.pruning.evaluate import evaluate
    from sparsight.pruning.policy import HeadPolicy
    from sparsight.sae.base import load

    device = job.device
    backbone, _ = open_folder(job.inputs["backbone"].parent)
    policy = HeadPolicy.load(job.inputs["policy"].parent).to(device)
    saes = {weights.parent.name: load(weights.parent).to(device) for weights in job.inputs["saes"]}
    manifest, n_parallel = Manifest(job.inputs["images"]), job.cores // job.compute.threads
    evaluate(job.config, backbone.to(device), policy, saes, manifest, job.seed, job.work, n_parallel, job.record())


if __name__ == "__main__":
    stage.run(
        main,
        __doc__,
        Pruning,
        images="manifest.parquet of the images stage",
        backbone="model.safetensors of the backbone stage",
        policy="policy.safetensors of the policy stage",
        saes=["sae.safetensors of every SAE"],
    )
