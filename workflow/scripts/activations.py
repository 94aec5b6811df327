"""Store a backbone's activations on one split (--name): images x backbone -> <split>.zarr, <split>.json."""

from sparsight import stage
from sparsight.config import Activations


def main(job: stage.Stage) -> None:
    from sparsight import backbones
    from sparsight.extract import extract
    from sparsight.images import Manifest

    manifest = Manifest(job.inputs["images"])
    device = job.device
    backbone, _ = backbones.open_folder(job.inputs["backbone"].parent)
    record = job.record()
    digests = {"images_digest": manifest.digest, "backbone_digest": record["inputs"]["backbone"]}
    about = {"backbone": job.inputs["backbone"].parent.name, **digests, "record": record}
    extract(backbone.to(device), manifest.split(job.name), job.config, job.work, job.name, about, job.compute.threads)


if __name__ == "__main__":
    stage.run(
        main,
        __doc__,
        Activations,
        images="manifest.parquet of the images stage",
        backbone="model.safetensors of the backbone stage",
    )
