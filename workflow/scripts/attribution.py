"""Attribute class logits to an SAE's latents, remove and add them beside other features: tables and a summary."""

from sparsight.config import Attribution
from sparsight.pipeline import stage


def main(job: stage.Stage) -> None:
    from sparsight.activations.store import ActivationStore
    from sparsight.backbones.loading import open_folder
    from sparsight.bench.attribution.evaluate import evaluate
    from sparsight.images.manifest import Manifest
    from sparsight.sae.base import load

    device = job.device
    saes = {path.parent.name: load(path.parent).to(device).requires_grad_(False) for path in job.inputs["saes"]}
    backbone, _ = open_folder(job.inputs["backbone"].parent)
    stores = {path.stem: ActivationStore.open(path) for path in job.inputs["stores"]}
    test = Manifest(job.inputs["images"]).split("test")
    evaluate(
        job.config, saes, backbone.to(device), stores, test, job.name, job.seed, job.work, job.record()
    )  # fmt: skip


if __name__ == "__main__":
    stage.run(
        main,
        __doc__,
        Attribution,
        images="manifest.parquet of the images stage",
        backbone="model.safetensors of the backbone stage",
        stores=["train.json and test.json, the manifests of the stores"],
        saes=["sae.safetensors of every seed of the section's SAE"],
    )
