"""Steer the unpruned model with an SAE and with controls: steering vectors and accuracy tables."""

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
    one, *layers = (load(weights.parent).to(device) for weights in (job.inputs["sae"], *job.inputs["layers"]))
    stores, finder = (
        {path.stem: ActivationStore.open(path) for path in job.inputs[name]} for name in ("stores", "finder")
    )
    manifest = Manifest(job.inputs["images"])
    steer(
        job.config, one, backbone.to(device), stores, finder, manifest, job.name, job.seed, job.work, job.record(),
        layers,
    )  # fmt: skip


if __name__ == "__main__":
    stage.run(
        main,
        __doc__,
        Steering,
        images="manifest.parquet of the images stage",
        backbone="model.safetensors of the backbone stage",
        stores=["train.json of the backbone; for kind vs2++ also val.json and test.json"],
        finder=["for kind vs2++: train.json, val.json and test.json of the model that finds neighbours"],
        sae="sae.safetensors of the sae stage",
        layers=["sae.safetensors of every SAE that steers at a further site"],
    )
