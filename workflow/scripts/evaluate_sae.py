"""Evaluate the SAEs of a section on the test split: alone, beside baselines, and inside the backbone.

Writes metrics.json, latents.parquet, baselines.parquet and probing.parquet into the folder of each.
"""

from sparsight.pipeline import stage


def main(job: stage.Stage) -> None:
    from sparsight.activations.store import ActivationStore
    from sparsight.backbones.loading import open_folder
    from sparsight.images.manifest import Manifest
    from sparsight.sae.base import load
    from sparsight.sae.evaluate import evaluate

    device = job.device
    saes = {path.parent.name: load(path.parent).to(device) for path in job.inputs["saes"]}
    backbone, _ = open_folder(job.inputs["backbone"].parent)
    train, test = (ActivationStore.open(job.inputs[name]) for name in ("train", "test"))
    manifest = Manifest(job.inputs["images"])
    labels, images = manifest.split("train").labels, manifest.split("test")
    evaluate(saes, backbone.to(device), train, test, labels, images, job.seed, job.work, job.record())


if __name__ == "__main__":
    stage.run(
        main,
        __doc__,
        images="manifest.parquet of the images stage",
        backbone="model.safetensors of the backbone stage",
        train="train.json, the manifest of the train split's store",
        test="test.json, the manifest of the test split's store",
        saes=["sae.safetensors of every SAE"],
    )
