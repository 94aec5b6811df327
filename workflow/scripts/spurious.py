"""Ablate the latents of a spurious feature, beside other methods: accuracy by group, tables and a summary."""

from sparsight.config import Spurious
from sparsight.pipeline import stage


def main(job: stage.Stage) -> None:
    from sparsight.activations.store import ActivationStore
    from sparsight.backbones.loading import open_folder
    from sparsight.bench.spurious.evaluate import evaluate
    from sparsight.images.manifest import Manifest
    from sparsight.sae.base import load

    device = job.device
    saes = {path.parent.name: load(path.parent).to(device).requires_grad_(False) for path in job.inputs["saes"]}
    backbone, _ = open_folder(job.inputs["backbone"].parent)
    stores = {path.stem: ActivationStore.open(path) for path in job.inputs["stores"]}
    manifest = Manifest(job.inputs["images"])
    images = {split: manifest.split(split) for split in stores}
    evaluate(
        job.config, saes, backbone.to(device), stores, images, job.name, job.seed, job.work, job.record()
    )  # fmt: skip


if __name__ == "__main__":
    stage.run(
        main,
        __doc__,
        Spurious,
        images="manifest.parquet of the images stage",
        backbone="model.safetensors of the backbone stage",
        stores=["train.json, val.json and test.json, the manifests of the stores"],
        saes=["sae.safetensors of every seed of the section's SAE"],
    )
