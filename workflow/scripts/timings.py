"""Measure the whole model's milliseconds against the number of heads kept: timings.json."""

from sparsight import stage


def main(job: stage.Stage) -> None:
    from sparsight import backbones
    from sparsight.pruning.timing import measure

    device = job.device
    models = {path.parent.name: backbones.open_folder(path.parent)[0].to(device) for path in job.inputs["backbones"]}
    measure(models, job.seed, job.work.out / "timings.json")


if __name__ == "__main__":
    stage.run(main, __doc__, backbones=["model.safetensors of every backbone whose heads a policy switches"])
