"""Evaluate the SAEs or ReSAE chains of a section on the test split: alone, beside baselines, and inside the backbone.

Writes metrics.json, latents.parquet, baselines.parquet and probing.parquet into the folder of each SAE, and
metrics.json into that of each chain.
"""

from sparsight import config
from sparsight.pipeline import stage


def main(job: stage.Stage) -> None:
    from sparsight.activations.store import ActivationStore
    from sparsight.backbones.loading import open_folder
    from sparsight.images.manifest import Manifest
    from sparsight.sae.base import load
    from sparsight.sae.evaluate import evaluate, evaluate_chains
    from sparsight.sae.metrics.names import words_from
    from sparsight.sae.resae import load_chain

    device = job.device
    backbone, _ = open_folder(job.inputs["backbone"].parent)
    stores = {path.stem: ActivationStore.open(path) for path in job.inputs["stores"]}
    manifest = Manifest(job.inputs["images"])
    images = {split: manifest.split(split) for split in stores}
    alone = job.config.metrics == "reconstruction"
    judge = next(map(ActivationStore.open, job.inputs["judge"][1:]), None)
    words = words_from(job.inputs["namer"], job.inputs["embeddings"], job.inputs["words"], device)
    common = backbone.to(device), stores, images, job.seed, job.work, job.record(), words, judge, alone
    if job.inputs["maps"]:
        evaluate_chains({at.parent.name: load_chain(at.parent).to(device) for at in job.inputs["maps"]}, *common)
    else:
        evaluate({at.parent.name: load(at.parent).to(device) for at in job.inputs["saes"]}, *common)


if __name__ == "__main__":
    stage.run(
        main,
        __doc__,
        config.Evaluation,
        images="manifest.parquet of the images stage",
        backbone="model.safetensors of the backbone stage",
        stores=["train.json, val.json and test.json, the manifests of the stores"],
        maps=["affine.safetensors of every chain, if they are chains"],
        saes=["sae.safetensors of every SAE"],
        namer=["model.safetensors of the image-text model that names latents, if there is one"],
        embeddings=["train.json and test.json, the manifests of its stores"],
        judge=["config.json of another backbone by which images are compared too, and test.json of its store"],
        words=["words that may be names, one a line; without a file the class names"],
    )
