"""The report: one HTML file that opens from disk, without network."""

import json
from pathlib import Path
from typing import Any

import jinja2
import torch
import yaml

from sparsight import config, tables
from sparsight.images import Manifest
from sparsight.report import figures, graph, pruning
from sparsight.report import saes as sae_chapter
from sparsight.report.latents import Browser
from sparsight.sae.residual import ReSAE, load_chain
from sparsight.schema import file_digest
from sparsight.store import ActivationStore

_CAPTIONS = Path(__file__).parent / "captions"  # by kind of figure; Snakemake's own report reads them too


def write_page(section: config.Report, run: str, inputs: dict[str, Any], device: torch.device, out: Path) -> None:
    """Write ``index.html`` and, for use elsewhere, each of its figures as ``figures/<name>.svg``.

    Args:
        run: name of the run.
        inputs: paths by name: images, configuration, and lists of backbones, saes, chains, stabilities, stores,
            steerings, transfers, policies.
    """
    manifest = Manifest(inputs["images"])
    chapter = sae_chapter.chapter(
        [path.parent for path in inputs["saes"]], [path.parent for path in inputs["chains"]], inputs["stabilities"]
    )
    policies = [pruning.policy(path.parent) for path in inputs["policies"]]
    backbones = [_backbone(path.parent) for path in inputs["backbones"]]
    steerings = [_steering(path, inputs["transfers"]) for path in inputs["steerings"]]
    drawn: dict[str, str] = {}
    for part in (*policies, chapter, *steerings, *backbones):
        drawn |= part["figures"]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sparsight.report", "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template("page.html.j2").render(
        title=section.title or f"sparsight: {run} run",
        manifest=manifest,
        pipeline=graph.stages(manifest, inputs),
        counts={part: len(manifest.split(part)) for part in ("train", "val", "test")},
        backbones=backbones,
        saes=chapter,
        steerings=steerings,
        policies=policies,
        figures=drawn,
        captions={path.stem: path.read_text() for path in _CAPTIONS.glob("*.rst")},
        latents=_latents(section, inputs, manifest, device),
        configuration=yaml.safe_dump(json.loads(inputs["configuration"].read_text()), sort_keys=False),
        files=_files(inputs),
        script=(Path(__file__).parent / "browser.js").read_text(),
    )
    (out / "index.html").write_text(page)
    (out / "figures").mkdir(exist_ok=True)
    for name, svg in drawn.items():
        (out / "figures" / f"{name}.svg").write_text(svg)


def _files(inputs: dict[str, Any]) -> dict[str, str]:
    """sha256 of every file that the page is drawn from, by its path from the run's folder."""
    paths = [path for value in inputs.values() for path in (value if isinstance(value, list) else [value])]
    run = inputs["configuration"].parent
    return {path.relative_to(run).as_posix(): file_digest(path) for path in sorted(paths)}


def _backbone(folder: Path) -> dict[str, Any]:
    about = json.loads((folder / "config.json").read_text())
    svg = figures.backbone_training(folder)
    return {"name": folder.name, "about": about, "figures": {f"backbone-{folder.name}": svg} if svg else {}}


def _steering(path: Path, transfers: list[Path]) -> dict[str, Any]:
    rows, summary = tables.read(path), json.loads(path.with_suffix(".json").read_text())
    classes = tables.read(path.with_name(f"{path.stem}-classes.parquet"))
    return {
        "name": path.stem,
        "rows": [row for row in rows if row["split"] == "test"],
        "summary": summary,
        "figures": {f"steering-{path.stem}": figures.steering(rows, classes, summary["gate"])},
        "elsewhere": {file.stem: _elsewhere(file) for file in transfers if file.parent.name == path.stem},
    }


def _elsewhere(path: Path) -> dict[str, Any]:
    """VS2 on another data set: its rows with and without steering, and the gate's curve."""
    rows = {row["method"]: row for row in tables.read(path.with_suffix(".parquet"))}
    steered = rows.get("vs2") or rows["vs2-pass"]
    return {"unsteered": rows["none"], "steered": steered, **json.loads(path.read_text())}


def _latents(
    section: config.Report, inputs: dict[str, Any], manifest: Manifest, device: torch.device
) -> dict[str, Any]:
    """The browser's content: of each section the SAE, or the SAEs of the chain, of its first seed."""
    shown: dict[Path, ReSAE | None] = dict.fromkeys(_firsts(inputs["saes"]))
    for folder in _firsts(inputs["chains"]):
        chain = load_chain(folder).to(device)
        shown |= {folder / site: chain for site in chain.sites}
    stores = {path.parent.name: path for path in inputs["stores"]}
    browser = Browser(manifest, section.latents, section.images)
    for folder, of in shown.items():
        about = json.loads((folder / "config.json").read_text())
        name = folder.relative_to(inputs["configuration"].parent / "saes").as_posix()
        with ActivationStore.open(stores[about["backbone"]]) as store:
            browser.add(name, folder, of, store, device, 1 / len(shown))
    return browser.data()


def _firsts(metrics: list[Path]) -> list[Path]:
    """Of each section the folder of its first seed."""
    firsts: dict[str, Path] = {}
    for path in metrics:
        firsts.setdefault(path.parent.name.rpartition("-s")[0], path.parent)
    return list(firsts.values())
