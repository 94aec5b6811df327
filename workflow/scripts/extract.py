"""Fill one part (--name <split>.part-<i>) of an activation store: images x backbone -> shards of <split>.zarr."""

from sparsight.config import Activations
from sparsight.pipeline import stage


def main(job: stage.Stage) -> None:
    from sparsight.activations.extract import extract
    from sparsight.backbones.loading import open_folder
    from sparsight.images.manifest import Manifest

    split, _, part = job.name.partition(".part-")
    manifest = Manifest(job.inputs["images"])
    device = job.device
    backbone, _ = open_folder(job.inputs["backbone"].parent)
    record = job.record()
    digests = {"images_digest": manifest.digest, "backbone_digest": record["inputs"]["backbone"]}
    about = {"split": split, "backbone": job.inputs["backbone"].parent.name, **digests, "record": record}
    store = job.out / f"{split}.zarr"
    extract(backbone.to(device), manifest.split(split), job.config, job.compute, job.work, store, int(part), about)


if __name__ == "__main__":
    stage.run(
        main,
        __doc__,
        Activations,
        images="manifest.parquet of the images stage",
        backbone="model.safetensors of the backbone stage",
    )
