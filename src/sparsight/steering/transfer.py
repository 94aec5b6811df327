"""VS2 and its gate on another data set than the SAE's: the gate must not steer images that are reconstructed badly.

The strengths are those chosen on val of the original data set. Nothing is chosen on the other data set, and its test
split is used once. An open_clip model classifies its images by prompts with its class names. Another model knows the
classes of its own head alone: images of those have labels, of all others only the effect of steering is known.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsight.backbones.backbone import Backbone
from sparsight.backbones.prompts import templates_of
from sparsight.common import tables
from sparsight.common.errors import SparsightError
from sparsight.common.files import write_json
from sparsight.common.progress import log
from sparsight.common.work import Work
from sparsight.images.class_names import readable
from sparsight.images.manifest import Manifest
from sparsight.sae.base import SAE
from sparsight.steering import vs2
from sparsight.steering.evaluate import MEASURES, against_controls, gate_curve
from sparsight.steering.runner import NONE, RECONSTRUCT, Row, Runner, check_images


def steer_elsewhere(
    sae: SAE, backbone: Backbone, about: dict[str, Any], home: dict[str, Any], vectors: Path, manifest: Manifest,
    name: str, work: Work, record: dict[str, Any], layers: Sequence[SAE] = (),
) -> None:  # fmt: skip
    """Write ``<name>.parquet`` (the rows of test) and ``<name>.json`` (the gate's curve).

    Args:
        about: ``config.json`` of the backbone.
        home: ``<steering>.json`` of the original data set, of kind ``vs2``.
        vectors: ``<steering>.safetensors`` of the original data set, for the gate's thresholds.
        manifest: the manifest of the other images.
        layers: SAEs of later sites that steered in the same pass.

    Raises:
        SparsightError: a model without a classifier, an SAE of another model, or no strength chosen at home.
    """
    test = manifest.split("test")
    if backbone.has_text:
        names = [readable(label) for label in manifest.classes]
        backbone.use_prompts(names, templates_of(manifest.about["source"], tuple(about["template_choice"])))
        backbone.class_names = manifest.classes
    else:
        test = test.relabelled(backbone.class_names or [])
    check_images(backbone, test, "test")
    if not home["chosen_on_val"]:
        raise SparsightError(
            f"other_images.{name}: takes the strength that val of the run's own images chose, which needs labels and a "
            f"classifier; leave {name} out, or label the images"
        )
    chosen = [Row(**row) for row in home["chosen_on_val"]]
    runner = Runner([sae, *layers], backbone, home["tokens"])
    places = runner.where.places
    further = (None, *(at.site for at in places[1:]))
    calibration = [vs2.Calibration.load(vectors, sae.W_dec.device, site) for site in further]
    rows_run = [NONE, RECONSTRUCT, *chosen]
    outcomes, fvu = runner.run(rows_run, vs2.edits_by_site(places, calibration), test, calibration)
    original_gate = [line for line in home["gate"] if line["split"] == "test"]
    quantiles = [line["quantile"] for line in original_gate]
    curve, gated = gate_curve(quantiles, calibration, chosen[0], outcomes, fvu)
    (best,) = (line["quantile"] for line in original_gate if line["chosen"])
    outcomes[chosen[0]._replace(method=f"{chosen[0].method}-gated")] = gated[best]
    rows = [{**row._asdict(), "split": "test", **outcome.measures(outcomes[NONE])} for row, outcome in outcomes.items()]
    tables.write(work.out / f"{name}.parquet", rows, MEASURES)
    summary = {
        "format_version": 1,
        "source": manifest.about["source"],
        "classes": len(manifest.classes),
        "n_labelled": int((test.labels >= 0).sum()),
        "gate": [{**line, "split": "test", "chosen": line["quantile"] == best} for line in curve],
        "steered_at_home": {str(line["quantile"]): line["steered"] for line in original_gate},
        "against_controls": against_controls(chosen, outcomes) if outcomes[NONE].judged.any() else [],
        "record": record,
    }
    write_json(work.out / f"{name}.json", summary)
    for line in curve:
        log(f"{name}: gate at quantile {line['quantile']:g} steers {line['steered']:.4f} of the images")
