"""Evaluate VS2 and its gate on another data set (--name), with the strengths and thresholds of the run's own."""

from sparsight.pipeline import stage


def main(job: stage.Stage) -> None:
    from sparsight.backbones.loading import open_folder
    from sparsight.images.manifest import Manifest
    from sparsight.sae.base import load
    from sparsight.steering.transfer import steer_elsewhere

    device = job.device
    backbone, about = open_folder(job.inputs["backbone"].parent)
    loaded = [load(weights.parent).to(device) for weights in (*job.inputs["saes"], *job.inputs["layers"])]
    homes = {path.stem: path for path in job.inputs["homes"]}
    saes = {result: loaded[i :: len(homes)] for i, result in enumerate(homes)}  # every layer has as many seeds
    manifest = Manifest(job.inputs["images"])
    steer_elsewhere(saes, backbone.to(device), about, homes, manifest, job.name, job.work, job.record())


if __name__ == "__main__":
    stage.run(
        main,
        __doc__,
        images="manifest.parquet of the other images",
        backbone="model.safetensors of the backbone stage",
        saes=["sae.safetensors of every seed"],
        layers=["sae.safetensors of the same seeds of every section that steers at a further site"],
        homes=["json of the steering stage, of kind vs2, of every seed; its vectors are beside it"],
    )
