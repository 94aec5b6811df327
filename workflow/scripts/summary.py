"""Collect the headline numbers of the run: metrics.json."""

from sparsight.pipeline import stage


def main(job: stage.Stage) -> None:
    from sparsight.report.summary import write_curves, write_metrics

    write_metrics(job.inputs, job.work.out / "metrics.json")
    write_curves(job.inputs["saes"], job.work.out / "curves.json")


if __name__ == "__main__":
    stage.run(
        main,
        __doc__,
        images="manifest.parquet of the images stage",
        backbones=["config.json of every backbone"],
        saes=["metrics.json of every SAE"],
        chains=["metrics.json of every ReSAE chain"],
        stabilities=["<section>-stability.json of every section of several seeds"],
        steerings=["<name>.parquet of every steering result"],
        transfers=["<data set>.json of every steering result on other images"],
        disentanglings=["<name>.parquet of every result on attributes, beside its other files"],
        localisations=["<section>.parquet of every section compared with masks, beside its other file"],
        attributions=["<name>.parquet of every attribution of class logits, beside its other files"],
        spurious=["<name>.parquet of every result on a spurious feature, beside its other files"],
        policies=["metrics.json of every policy"],
    )
