"""Evaluate VS2 and its gate on another data set (--name), with the strengths and thresholds of the run's own."""

import json

from sparsight.pipeline import stage


def main(job: stage.Stage) -> None:
    from sparsight.backbones.loading import open_folder
    from sparsight.images.manifest import Manifest
    from sparsight.sae.base import load
    from sparsight.steering.transfer import steer_elsewhere

    device = job.device
    backbone, about = open_folder(job.inputs["backbone"].parent)
    one, *layers = (load(weights.parent).to(device) for weights in (job.inputs["sae"], *job.inputs["layers"]))
    home, manifest = json.loads(job.inputs["home"].read_text()), Manifest(job.inputs["images"])
    steer_elsewhere(
        one, backbone.to(device), about, home, job.inputs["vectors"], manifest, job.name, job.work, job.record(),
        layers,
    )  # fmt: skip


if __name__ == "__main__":
    stage.run(
        main,
        __doc__,
        images="manifest.parquet of the other images",
        backbone="model.safetensors of the backbone stage",
        sae="sae.safetensors of the sae stage",
        layers=["sae.safetensors of every SAE that steers at a further site"],
        vectors="safetensors of the steering stage, of kind vs2",
        home="json of the steering stage",
    )
