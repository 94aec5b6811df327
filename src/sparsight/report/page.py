"""The report: one HTML file that opens from disk, without network."""

import json
from pathlib import Path
from typing import Any

import jinja2
import torch
import yaml

from sparsight import config
from sparsight.common.digests import file_digest
from sparsight.images.labels import unlabelled
from sparsight.images.manifest import Manifest
from sparsight.report.cards.first_screen import first_screen
from sparsight.report.chapters import (
    attribution,
    backbones,
    disentangling,
    localisation,
    pipeline,
    pruning,
    saes,
    spurious,
    steering,
)  # fmt: skip
from sparsight.report.figures.svg import inline
from sparsight.report.latents.browser import browser
from sparsight.report.steer import panels

_FOLDER = Path(__file__).parent
_USED_BY_OTHERS = ("dom", "data", "thumbnail", "route")
_CAPTIONS = _FOLDER / "captions"  # by kind of figure; Snakemake's own report uses them too


def write_page(section: config.Report, run: str, inputs: dict[str, Any], device: torch.device, out: Path) -> None:
    """Write ``index.html``, and each of its figures separately as ``figures/<name>.svg``.

    Args:
        run: name of the run.
        inputs: paths by name: images, configuration, and lists of backbones, saes, chains, stabilities, stores,
            steerings, transfers, disentanglings, localisations, attributions, spurious, policies, latents,
            head_latents, test_images.
    """
    manifest = Manifest(inputs["images"])
    splits = {part: manifest.split(part) for part in ("train", "val", "test")}
    about_saes = saes.chapter(
        [path.parent for path in inputs["saes"]], [path.parent for path in inputs["chains"]], inputs["stabilities"]
    )
    about_policies = [pruning.chapter(path.parent) for path in inputs["policies"]]
    about_backbones = [backbones.chapter(path.parent) for path in inputs["backbones"]]
    about_steering = [
        steering.chapter(name, paths, inputs["transfers"])
        for name, paths in steering.by_section(inputs["steerings"]).items()
    ]
    about_disentangling = [disentangling.chapter(path) for path in inputs["disentanglings"]]
    about_localisation = [localisation.chapter(path) for path in inputs["localisations"]]
    about_attribution = [attribution.chapter(path) for path in inputs["attributions"]]
    about_spurious = [spurious.chapter(path) for path in inputs["spurious"]]
    figures: dict[str, str] = {}
    evaluations = (*about_steering, *about_disentangling, *about_attribution, *about_spurious)
    for chapter in (*about_policies, about_saes, *evaluations, *about_backbones):
        figures |= chapter["figures"]
    latents = browser(section, inputs, manifest, device)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER / "templates"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template("page.html.j2").render(
        title=section.title or f"sparsight: {run} run",
        manifest=manifest,
        summary=first_screen(inputs, len(splits["test"])),
        pipeline=pipeline.stages(manifest, inputs),
        counts={part: len(split) for part, split in splits.items()},
        unlabelled=unlabelled(splits),
        backbones=about_backbones,
        saes=about_saes,
        steerings=about_steering,
        disentanglings=about_disentangling,
        localisations=about_localisation,
        attributions=about_attribution,
        spurious=about_spurious,
        policies=about_policies,
        figures={name: inline(name, svg) for name, svg in figures.items()},
        captions={path.stem: path.read_text() for path in _CAPTIONS.glob("*.rst")},
        latents=latents,
        steer=panels(inputs["test_images"], latents["rows"]),
        configuration=yaml.safe_dump(json.loads(inputs["configuration"].read_text()), sort_keys=False),
        files=_files(inputs),
        script=_script(),
    )
    (out / "index.html").write_text(page)
    (out / "figures").mkdir(exist_ok=True)
    for name, svg in figures.items():
        (out / "figures" / f"{name}.svg").write_text(svg)


def _files(inputs: dict[str, Any]) -> dict[str, str]:
    """sha256 of every input file of the page, by its path from the run's folder."""
    paths = [path for value in inputs.values() for path in (value if isinstance(value, list) else [value])]
    run = inputs["configuration"].parent
    return {path.relative_to(run).as_posix(): file_digest(path) for path in sorted(paths)}


def _script() -> str:
    """The page's script: the files of ``scripts``, those that others use first, in one scope, and its start."""
    paths = {path.stem: path for path in sorted((_FOLDER / "scripts").glob("*.js"))}
    parts = [path.read_text() for path in (*map(paths.pop, _USED_BY_OTHERS), *paths.values())]
    return "\n".join(['"use strict";', "(() => {", *parts, "start();", "})();"])
