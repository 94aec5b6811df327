"""Train the SAEs of a section (--name), one per seed: <name>-s<seed>/sae.safetensors, config.json, training.jsonl."""

from sparsight import stage
from sparsight.config import Sae


def main(job: stage.Stage) -> None:
    from sparsight.sae.fit import fit
    from sparsight.store import ActivationStore

    device = job.device
    fit(job.config, ActivationStore.open(job.inputs["store"]), job.name, job.seed, job.work, device, job.record())


if __name__ == "__main__":
    stage.run(main, __doc__, Sae, store="train.json, the manifest of the train split's store")
