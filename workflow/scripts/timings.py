"""Measure the whole model's milliseconds against the number of heads kept: timings.json."""

from sparsight.pipeline import stage


def main(job: stage.Stage) -> None:
    from sparsight.backbones.loading import open_folder
    from sparsight.pruning.timing import measure

    device = job.device
    models = {path.parent.name: open_folder(path.parent)[0].to(device) for path in job.inputs["backbones"]}
    measure(models, job.seed, job.work.out / "timings.json")


if __name__ == "__main__":
    stage.run(main, __doc__, backbones=["model.safetensors of every backbone whose heads a policy switches"])
