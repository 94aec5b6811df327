"""List, check and split the images: image source -> manifest.parquet."""

from sparsight.config import Images
from sparsight.pipeline import stage


def main(job: stage.Stage) -> None:
    from sparsight.images.manifest import write_manifest

    write_manifest(job.config, job.seed, job.record(), job.compute.threads, job.work.out / "manifest.parquet")


if __name__ == "__main__":
    stage.run(main, __doc__, Images)
