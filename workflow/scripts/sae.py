"""Train the SAEs of a section (--name), one per seed: <name>-s<seed>/sae.safetensors, config.json, training.jsonl.

A section of several sites makes chains: <name>-s<seed>/affine.safetensors and a folder per site with the same files.
"""

from sparsight.config import Sae
from sparsight.pipeline import stage


def main(job: stage.Stage) -> None:
    from sparsight.activations.store import ActivationStore
    from sparsight.images.manifest import Manifest
    from sparsight.sae.fit import fit

    device = job.device
    store = ActivationStore.open(job.inputs["store"])
    labels = Manifest(job.inputs["images"]).split("train").labels if job.config.prototype_weight else None
    fit(job.config, store, labels, job.name, job.seed, job.work, device, job.record())


if __name__ == "__main__":
    stage.run(
        main,
        __doc__,
        Sae,
        images="manifest.parquet of the images stage; only the PASS term reads it, for labels",
        store="train.json, the manifest of the train split's store",
    )
