"""Draw the run as one offline page: index.html and the figures in it."""

from sparsight.config import Report
from sparsight.pipeline import stage


def main(job: stage.Stage) -> None:
    from sparsight.report.page import write_page

    write_page(job.config, job.name, job.inputs, job.device, job.work.out)


if __name__ == "__main__":
    stage.run(
        main,
        __doc__,
        Report,
        images="manifest.parquet of the images stage",
        configuration="configuration.json of the run",
        backbones=["config.json of every backbone"],
        saes=["metrics.json of every SAE"],
        chains=["metrics.json of every ReSAE chain"],
        stabilities=["<section>-stability.json of every section of several seeds"],
        stores=["test.json of every backbone"],
        steerings=["<name>.parquet of every steering result"],
        transfers=["<data set>.json of every steering result on other images"],
        disentanglings=["<name>.parquet of every result on attributes, beside its other files"],
        localisations=["<section>.parquet of every section compared with masks, beside its other file"],
        attributions=["<name>.parquet of every attribution of class logits, beside its other files"],
        spurious=["<name>.parquet of every result on a spurious feature, beside its other files"],
        policies=["metrics.json of every policy"],
        latents=["latents.parquet of every SAE, in the order of the configuration"],
        head_latents=["head_latents.safetensors of every policy"],
        test_images=["test_images.safetensors of every policy"],
    )
