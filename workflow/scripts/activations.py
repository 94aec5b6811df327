"""Verify the shards that the parts of an activation store left, and write its manifest: <split>.json (--name)."""

from sparsight.pipeline import stage


def main(job: stage.Stage) -> None:
    from sparsight.activations.writer import finish_store

    finish_store(job.out / f"{job.name}.zarr", job.inputs["parts"], job.work.out / f"{job.name}.json")


if __name__ == "__main__":
    stage.run(main, __doc__, parts=["<split>.part-<i>.json of every part"])
