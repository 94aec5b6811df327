"""Train the SAEs of a section (--name), one per seed: <name>-s<seed>/sae.safetensors, config.json, training.jsonl.

A section of several sites makes chains: <name>-s<seed>/affine.safetensors and a folder per site with the same files.
With weights of another tool, these are imported instead.
"""

import importlib

from sparsight.config import Sae
from sparsight.pipeline import stage


def main(job: stage.Stage) -> None:
    if job.runs_in(job.config.processes):
        return
    from sparsight.activations.store import ActivationStore
    from sparsight.sae.fit import fit

    device = job.device
    store = ActivationStore.open(job.inputs["store"])
    if job.config.weights is not None:  # loaded by name, so that a change of it does not train every SAE again
        importing = importlib.import_module("sparsight.sae.foreign.importing")
        importing.import_sae(job.config, store, job.name, job.work, device, job.record())
        return
    labels = None
    if job.config.prototype_weight:
        from sparsight.images.labels import need_labels, needs
        from sparsight.images.manifest import Manifest  # memory that SAEs without labels do not need

        manifest = Manifest(job.inputs["images"])
        need_labels(manifest, needs(f"saes.{job.name}", job.config))
        labels = manifest.split("train").labels
    backbone = None
    if job.config.loss != "local" and job.inputs["backbone"]:
        from sparsight.backbones.loading import open_folder

        backbone = open_folder(job.inputs["backbone"][0].parent)[0].to(device)
    fit(job.config, store, labels, job.name, job.seed, job.work, device, job.record(), job.member, backbone)


if __name__ == "__main__":
    stage.run(
        main,
        __doc__,
        Sae,
        images="manifest.parquet of the images stage; only the PASS term reads it, for labels",
        store="train.json, the manifest of the train split's store",
        weights=["weights of another tool, with the settings beside them; they are imported instead of training"],
        backbone=["model.safetensors of the backbone stage; only a loss other than local runs it"],
    )
