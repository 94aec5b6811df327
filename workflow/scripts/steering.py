"""Steer the unpruned model with the SAEs of a section and with controls: steering vectors and accuracy tables."""

from sparsight.config import Steering
from sparsight.pipeline import stage


def main(job: stage.Stage) -> None:
    from sparsight.activations.store import ActivationStore
    from sparsight.backbones.loading import open_folder
    from sparsight.images.manifest import Manifest
    from sparsight.sae.base import load
    from sparsight.steering.evaluate import steer

    device = job.device
    backbone, _ = open_folder(job.inputs["backbone"].parent)
    loaded = [load(weights.parent).to(device) for weights in (*job.inputs["saes"], *job.inputs["layers"])]
    names = [f"{job.name}-s{path.parent.name.rpartition('-s')[2]}" for path in job.inputs["saes"]]
    saes = {name: loaded[i :: len(names)] for i, name in enumerate(names)}  # every layer has as many seeds
    stores, finder = (
        {path.stem: ActivationStore.open(path) for path in job.inputs[name]} for name in ("stores", "finder")
    )
    manifest = Manifest(job.inputs["images"])
    steer(job.config, saes, backbone.to(device), stores, finder, manifest, job.seed, job.work, job.record())


if __name__ == "__main__":
    stage.run(
        main,
        __doc__,
        Steering,
        images="manifest.parquet of the images stage",
        backbone="model.safetensors of the backbone stage",
        stores=["train.json of the backbone; for kind vs2++ also val.json and test.json"],
        finder=["for kind vs2++: train.json, val.json and test.json of the model that finds neighbours"],
        saes=["sae.safetensors of every seed"],
        layers=["sae.safetensors of the same seeds of every section that steers at a further site"],
    )
