"""Evaluate one SAE on the test split, by itself and put into the backbone: metrics.json."""

from sparsight import stage


def main(job: stage.Stage) -> None:
    from sparsight import backbones, sae
    from sparsight.images import Manifest
    from sparsight.sae.evaluate import evaluate
    from sparsight.store import ActivationStore

    device = job.device
    one = sae.load(job.inputs["sae"].parent).to(device)
    backbone, _ = backbones.open_folder(job.inputs["backbone"].parent)
    train, test = (ActivationStore.open(job.inputs[name]) for name in ("train", "test"))
    images = Manifest(job.inputs["images"]).split("test")
    evaluate(one, backbone.to(device), train, test, images, job.work, job.record())


if __name__ == "__main__":
    stage.run(
        main,
        __doc__,
        images="manifest.parquet of the images stage",
        backbone="model.safetensors of the backbone stage",
        train="train.json, the manifest of the train split's store",
        test="test.json, the manifest of the test split's store",
        sae="sae.safetensors of the sae stage",
    )
