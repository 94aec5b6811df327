"""Find each class's latents and steer the unpruned model with them: steering vectors and accuracy tables."""

from sparsight import stage
from sparsight.config import Steering


def main(job: stage.Stage) -> None:
    from sparsight import backbones, sae
    from sparsight.images import Manifest
    from sparsight.steering.evaluate import steer
    from sparsight.store import ActivationStore

    device = job.device
    backbone, _ = backbones.open_folder(job.inputs["backbone"].parent)
    one = sae.load(job.inputs["sae"].parent).to(device)
    store, manifest = ActivationStore.open(job.inputs["store"]), Manifest(job.inputs["images"])
    steer(job.config, one, backbone.to(device), store, manifest, job.name, job.seed, job.work, job.record())


if __name__ == "__main__":
    stage.run(
        main,
        __doc__,
        Steering,
        images="manifest.parquet of the images stage",
        backbone="model.safetensors of the backbone stage",
        store="train.json, the manifest of the train split's store",
        sae="sae.safetensors of the sae stage",
    )
