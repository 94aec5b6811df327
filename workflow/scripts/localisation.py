"""Score where the latents of a section's SAEs fire against masks of the images: a table and a summary."""

from sparsight.pipeline import stage


def main(job: stage.Stage) -> None:
    from sparsight.activations.store import ActivationStore
    from sparsight.backbones.loading import open_folder
    from sparsight.bench.localisation.evaluate import evaluate
    from sparsight.images.manifest import Manifest
    from sparsight.sae.base import load

    saes = {path.parent.name: load(path.parent).to(job.device).requires_grad_(False) for path in job.inputs["saes"]}
    backbone, _ = open_folder(job.inputs["backbone"].parent)
    stores = {path.stem: ActivationStore.open(path) for path in job.inputs["stores"]}
    manifest = Manifest(job.inputs["images"])
    evaluate(saes, backbone, stores, manifest, job.name, job.seed, job.compute.threads, job.work, job.record())


if __name__ == "__main__":
    stage.run(
        main,
        __doc__,
        images="manifest.parquet of the images stage",
        backbone="model.safetensors of the backbone stage",
        stores=["train.json and test.json, the manifests of the stores"],
        saes=["sae.safetensors of every SAE of the section"],
    )
