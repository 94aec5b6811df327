"""VS2 and its gate on another data set than the SAE's: the gate must not steer images that are reconstructed badly.

The strengths are those chosen on val of the original data set. Nothing is chosen on the other data set, and its test
split is used once. An open_clip model classifies its images by prompts with its class names. Another model knows the
classes of its own head alone: images of those have labels, of all others only the effect of steering is known.
"""

import json
from collections.abc import Mapping, Sequence
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
from sparsight.steering.runner import NONE, RECONSTRUCT, Planned, Ran, Row, Runner, check_images, run_together


def steer_elsewhere(
    saes: Mapping[str, Sequence[SAE]], backbone: Backbone, about: dict[str, Any], at_home: Mapping[str, Path],
    manifest: Manifest, name: str, work: Work, record: dict[str, Any],
) -> None:  # fmt: skip
    """Write ``<result>/<name>.parquet`` (the rows of test) and ``<result>/<name>.json`` (the gate's curve).

    Args:
        saes: by result, <section>-s<seed>, the SAE, and SAEs of later sites that steer in the same pass.
        about: ``config.json`` of the backbone.
        at_home: by result, ``<result>.json`` of the original data set, of kind ``vs2``, beside its vectors.
        manifest: the manifest of the other images.
        name: name of the other images.

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
    homes = {result: json.loads(path.read_text()) for result, path in at_home.items()}
    if not all(home["chosen_on_val"] for home in homes.values()):
        raise SparsightError(
            f"other_images.{name}: takes the strength that val of the run's own images chose, which needs labels and a "
            f"classifier; leave {name} out, or label the images"
        )
    plans = {}
    for result, one in saes.items():
        runner = Runner(one, backbone, homes[result]["tokens"])
        places, vectors = runner.where.places, at_home[result].with_suffix(".safetensors")
        further = (None, *(at.site for at in places[1:]))
        gates = [vs2.Calibration.load(vectors, one[0].W_dec.device, site) for site in further]
        chosen = [Row(**row) for row in homes[result]["chosen_on_val"]]
        plans[result] = Planned(runner, [NONE, RECONSTRUCT, *chosen], vs2.edits_by_site(places, gates), gates)
    for (result, plan), ran in zip(plans.items(), run_together(list(plans.values()), test), strict=True):
        (work.out / result).mkdir(exist_ok=True)
        summary = {
            "format_version": 1,
            "source": manifest.about["source"],
            "classes": len(manifest.classes),
            "n_labelled": int((test.labels >= 0).sum()),
            **_written(work.out / result / f"{name}.parquet", homes[result]["gate"], plan, ran),
            "record": record,
        }
        write_json(work.out / result / f"{name}.json", summary)
        for line in summary["gate"]:
            log(f"{result}, {name}: gate at quantile {line['quantile']:g} steers {line['steered']:.4f} of the images")


def _written(path: Path, gate: list[dict[str, Any]], plan: Planned, ran: Ran) -> dict[str, Any]:
    """Write the rows of a result; returns what its summary says of them. ``gate`` is the curve at home."""
    chosen, outcomes = list(plan.rows[2:]), ran.outcomes
    original = [line for line in gate if line["split"] == "test"]
    quantiles = [line["quantile"] for line in original]
    curve, gated = gate_curve(quantiles, plan.gates, chosen[0], outcomes, ran.fvu)
    (best,) = (line["quantile"] for line in original if line["chosen"])
    outcomes[chosen[0]._replace(method=f"{chosen[0].method}-gated")] = gated[best]
    rows = [{**row._asdict(), "split": "test", **outcome.measures(outcomes[NONE])} for row, outcome in outcomes.items()]
    tables.write(path, rows, MEASURES)
    return {
        "gate": [{**line, "split": "test", "chosen": line["quantile"] == best} for line in curve],
        "steered_at_home": {str(line["quantile"]): line["steered"] for line in original},
        "against_controls": against_controls(chosen, outcomes) if outcomes[NONE].judged.any() else [],
    }
