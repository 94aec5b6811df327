"""Evaluate a ReSAE chain on the test split: each SAE alone, and all of them together in the backbone."""

from sparsight.pipeline import stage


def main(job: stage.Stage) -> None:
    from sparsight.activations.store import ActivationStore
    from sparsight.backbones.loading import open_folder
    from sparsight.images.manifest import Manifest
    from sparsight.sae.evaluate import evaluate_chain
    from sparsight.sae.resae import load_chain

    device = job.device
    chain = load_chain(job.inputs["maps"].parent).to(device)
    backbone, _ = open_folder(job.inputs["backbone"].parent)
    train, test = (ActivationStore.open(job.inputs[name]) for name in ("train", "test"))
    images = Manifest(job.inputs["images"])
    train_labels, split = images.split("train").labels, images.split("test")
    evaluate_chain(chain, backbone.to(device), train, test, train_labels, split, job.seed, job.work, job.record())


if __name__ == "__main__":
    stage.run(
        main,
        __doc__,
        images="manifest.parquet of the images stage",
        backbone="model.safetensors of the backbone stage",
        train="train.json, the manifest of the train split's store",
        test="test.json, the manifest of the test split's store",
        maps="affine.safetensors of the sae stage",
        saes=["sae.safetensors of every site"],
    )
