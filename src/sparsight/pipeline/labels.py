"""Whether the images have the labels that the sections of a run need."""

from sparsight.common.errors import SparsightError
from sparsight.images.labels import need_labels, needs, unlabelled
from sparsight.images.manifest import Manifest
from sparsight.pipeline.run import Run


def check_labels(run: Run, manifest: Manifest) -> None:
    """Raise SparsightError, one line for all sections, if a section needs labels that the images do not have."""
    sections: list[tuple[str, object]] = [
        *((f"backbones.{name}", section) for name, section in run.backbones.items()),
        *((f"saes.{name}", section) for name, section in run.saes.items()),
        *((f"steering.{name}", section) for name, section in run.steering.items()),
        *((f"policies.{name}", section) for name, section in run.policies.items()),
        ("pruning", run.pruning),
    ]
    need_labels(manifest, [need for place, section in sections for need in needs(place, section)])
    columns = manifest.split("train").table.label_columns
    for name, disentangle in run.disentangle.items():
        if missing := [attribute for attribute in disentangle.attributes if attribute not in columns]:
            raise SparsightError(
                f"disentangle.{name}.attributes: the images have no label column {missing[0]!r}; use "
                f"{', '.join(columns)}"
            )
    for name, spurious in run.spurious.items():
        if spurious.group not in columns:
            raise SparsightError(
                f"spurious.{name}.group: the images have no label column {spurious.group!r}; use "
                f"{', '.join(column for column in columns if column != 'label_name') or 'images that have one'}"
            )
    val = {"val": manifest.split("val")}
    if run.other_images and not (val["val"].labels >= 0).any():
        raise SparsightError(
            f"images: {unlabelled(val)} have no label, which other_images needs for the strength of vs2; "
            "set other_images to {}; or label the images"
        )
