"""What the page's script needs to show every latent of every SAE, and the test images, within a number of bytes.

The parts of an SAE are packed apart: ``facts`` of each latent, the images of its largest activation (``top``), the
latents of each image (``strengths``), images of all intervals (``samples``), and the latents of each patch
(``patches``). The space goes to all SAEs' facts first, then to all their top images, and so on; the run's main SAE
comes first, then the first seed of every section, then the others. The page says of every part that did not fit.

Shapes: N test images, n images in the page, F latents (d_sae), H heads.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open

from sparsight import config
from sparsight.activations.store import ActivationStore
from sparsight.common import tables
from sparsight.common.progress import log
from sparsight.images.manifest import Manifest
from sparsight.images.preprocess import Preprocess
from sparsight.report.latents import gather
from sparsight.report.latents.atlas import plane
from sparsight.report.latents.attributed import CLASSES, Attributed
from sparsight.report.latents.classifiers import EXTREMES, Classifiers
from sparsight.report.latents.gather import Shown
from sparsight.report.latents.neighbours import nearest_rows
from sparsight.report.latents.pack import Pack, pack, shares, smallest
from sparsight.report.latents.sprites import COLUMNS, PER_SHEET, Sprites
from sparsight.report.main_section import main_section
from sparsight.sae.base import SAE, load
from sparsight.sae.inputs import SaeInputs
from sparsight.sae.resae import load_chain

_PARTS = ("facts", "top", "strengths", "samples", "patches")
_OF_IMAGES = 0.4  # share of the space that thumbnails may take
_NEAREST = 5


class _Browsed:
    """One SAE of the run, and what is gathered about it."""

    def __init__(self, folder: Path, name: str, stores: Mapping[str, Path]) -> None:
        self.folder, self.name = folder, name
        self.rows = tables.read(folder / "latents.parquet")
        self.about = json.loads((folder / "config.json").read_text())
        self.store = stores[self.about["backbone"]]
        self.largest_F = np.array([row["max_activation"] for row in self.rows], np.float32)
        self.seed_of, _, self.place = name.partition("/")
        self.section, _, self.seed = self.seed_of.rpartition("-s")
        self.shown: Shown

    def opened(self, device: torch.device) -> tuple[SAE, SaeInputs]:
        """The SAE, and what it reads of the test split."""
        one, chain = load(self.folder).to(device), None
        if "chain" in self.about:
            chain = load_chain(self.folder.parent).to(device)
        return one, SaeInputs(ActivationStore.open(self.store), self.about["site"], device, chain, self.about["tokens"])


class _Run(NamedTuple):
    """What the weights of a run say of its latents."""

    saes: list[_Browsed]
    heads: Mapping[str, Mapping[str, np.ndarray]]
    """By policy and SAE, what each latent adds to each head's logit, (H, F)."""
    classifiers: Classifiers
    attributed: Attributed
    device: torch.device


def browser(section: config.Report, inputs: dict[str, Any], manifest: Manifest, device: torch.device) -> dict[str, Any]:
    """The content of the page's JSON (``data``), by name the texts beside it (``texts``), and the images (``rows``).

    Args:
        section: how many images a latent gets, and how many megabytes there are.
        inputs: paths by name: configuration, stores, backbones, and lists of latents (latents.parquet of every SAE),
            head_latents and attributions.
        manifest: the images of the run.
        device: device for computing codes.
    """
    split, settings = manifest.split("test"), json.loads(inputs["configuration"].read_text())
    stores = {path.parent.name: path for path in inputs["stores"]}
    root = inputs["configuration"].parent / "saes"
    saes = [_Browsed(path.parent, path.parent.relative_to(root).as_posix(), stores) for path in inputs["latents"]]
    left = int(1e6 * section.megabytes)
    if not saes or not left:
        return {"saes": [], "rows": np.arange(0)}
    section_of_main = main_section(settings)
    main = next((one for one in saes if one.section == section_of_main), saes[0])
    for one in saes:
        one.shown = gather.images_of_latents(*one.opened(device), len(split), section.images, one.largest_F, 0)
        log(f"{one.name}: images of {len(one.rows)} latents")
    sprites = Sprites(split, _preprocess(inputs["backbones"], main.about["backbone"]))
    chosen = _chosen(saes, len(split), sprites, int(_OF_IMAGES * left))
    sheets = sprites.sheets(chosen)
    classifiers = Classifiers({path.parent.name: path.parent for path in inputs["backbones"]}, device)
    predicted = {name: classifiers.predictions(name, store, chosen) for name, store in stores.items()}
    predicted = {name: classes for name, classes in predicted.items() if classes is not None}
    columns = {"labels": split.labels[chosen], **{f"predicted-{name}": found for name, found in predicted.items()}}
    of_images = pack({"rows": chosen.astype(np.uint32), **{k: v.astype(np.int32) for k, v in columns.items()}})
    texts = {"images": of_images.text, **{f"sheet-{i}": sheet for i, sheet in enumerate(sheets)}}
    left -= sum(map(len, texts.values()))
    attributed = Attributed(inputs["attributions"])
    run = _Run(saes, _head_latents(inputs["head_latents"]), classifiers, attributed, device)
    packs = {one.name: _packs(one, run, chosen) for one in saes}
    first = {one.section: one.seed for one in reversed(saes)}
    order = sorted(saes, key=lambda one: (one.section != main.section, one.seed != first[one.section]))
    stored: dict[str, dict[str, Any]] = {one.name: {} for one in saes}
    for part in _PARTS:
        for one in order:
            made = packs[one.name].get(part)
            if made is None or (part != "facts" and "facts" not in stored[one.name]):
                continue
            if len(made.text) <= left:
                left -= len(made.text)
                stored[one.name][part] = made.directory
                texts[f"{one.name}:{part}"] = made.text
            else:
                log(f"{one.name}: {part} does not fit into report.megabytes")
    data = {
        "run": settings["run"],
        "classes": manifest.classes,
        "judged": saes[0].rows[0]["best_class"] is not None,
        "main": main.name,
        "megabytes": section.megabytes,
        "nTop": section.images,
        "intervals": gather.INTERVALS,
        "nSamples": gather.SAMPLES,
        "perPatch": gather.PER_PATCH,
        "nStrengths": gather.STRENGTHS,
        "nearest": _NEAREST,
        "nAttributed": CLASSES,
        "nEffects": 2 * min(EXTREMES, len(manifest.classes) // 2),
        "images": {
            "total": len(split), "count": len(chosen), "size": sprites.size, "columns": COLUMNS,
            "perSheet": PER_SHEET, "predicted": list(predicted), "directory": of_images.directory,
        },
        "saes": [_entry(one, run, stored[one.name], packs[one.name]) for one in saes],
    }  # fmt: skip
    return {"saes": data["saes"], "judged": data["judged"], "data": data, "texts": texts, "rows": chosen}


def _entry(one: _Browsed, run: _Run, parts: dict[str, Any], made: Mapping[str, Pack]) -> dict[str, Any]:
    """What the page's JSON says of one SAE; ``missing`` are the parts that did not fit."""
    sae, seen = one.opened(run.device)
    patches = gather.square_of_patches(seen)
    return {
        "name": one.name,
        "site": one.about["site"],
        "tokens": one.about["tokens"],
        "backbone": one.about["backbone"],
        "total": len(one.rows),
        "kept": round(plane(sae.W_dec).share, 4),
        "bins": len(one.rows[0]["histogram"]),
        "side": 0 if patches is None else round(len(patches) ** 0.5),
        "others": [other.name for other in _others(one, run.saes)],
        "heads": {policy: len(of_policy[one.name]) for policy, of_policy in run.heads.items() if one.name in of_policy},
        "parts": parts,
        "missing": [part for part in made if part not in parts],
    }


def _others(one: _Browsed, saes: list[_Browsed]) -> list[_Browsed]:
    """The SAEs of the same section and site of other seeds."""
    return [other for other in saes if (other.section, other.place) == (one.section, one.place) and other is not one]


def _preprocess(backbones: list[Path], name: str) -> Preprocess:
    metadata = json.loads(next(path for path in backbones if path.parent.name == name).read_text())
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in metadata["preprocess"].items()}
    return Preprocess(**values)


def _chosen(saes: list[_Browsed], n: int, sprites: Sprites, n_bytes: int) -> np.ndarray:
    """Rows of the images in the page, ascending: all, or those that most latents show."""
    times = np.zeros(n, np.int64)
    for one in saes:
        for shown in (one.shown.top, one.shown.samples):
            times += np.bincount(shown[shown >= 0], minlength=n)
    order = np.argsort(-times, kind="stable")
    return np.sort(order[: sprites.affordable(order, n_bytes)])


def _head_latents(paths: list[Path]) -> dict[str, dict[str, np.ndarray]]:
    """By policy and SAE, what each latent adds to each head's logit, (H, F)."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for path in paths:
        with safe_open(path, "numpy") as file:
            found[path.parent.name] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def _packs(one: _Browsed, run: _Run, chosen: np.ndarray) -> dict[str, Pack]:
    """All parts of one SAE."""
    shown, largest, n_latents = one.shown, one.largest_F, len(one.rows)
    sae, seen = one.opened(run.device)
    found = gather.details(sae, seen, shown, largest, chosen)
    n_images = len(seen.rows) // seen.tokens

    def of_latents(images: np.ndarray, values: np.ndarray, heats: np.ndarray | None) -> Pack:
        plain = {"images": smallest(images, n_images), "values": shares(values, largest[:, None], np.uint16)}
        return pack(plain if heats is None else {**plain, "heats": heats})

    def of_images(latents: np.ndarray, values: np.ndarray, dtype: type[np.unsignedinteger[Any]]) -> Pack:
        return pack({"latents": smallest(latents, n_latents), "values": shares(values, largest[latents], dtype)})

    parts = {
        "facts": pack(_facts(one, sae, run)),
        "top": of_latents(shown.top, shown.top_values, found.top_heats),
        "strengths": of_images(*found.strengths, np.uint16),
        "samples": of_latents(shown.samples, shown.sample_values, found.sample_heats),
    }
    return parts if found.patches is None else {**parts, "patches": of_images(*found.patches, np.uint8)}


def _facts(one: _Browsed, sae: SAE, run: _Run) -> dict[str, np.ndarray]:
    """Columns of ``latents.parquet``, and what the weights say. Missing numbers are NaN, missing classes -1."""

    def column(name: str) -> np.ndarray:
        return np.array([np.nan if row.get(name) is None else row[name] for row in one.rows], np.float32)

    nearest, cosines = nearest_rows(sae.W_dec, sae.W_dec, _NEAREST)
    missing = _NEAREST - nearest.shape[1]  # of an SAE of few latents
    columns = (
        "frequency", "mean_activation", "max_activation", "class_precision", "selectivity", "monosemanticity",
        "name_auroc", "name_null",
    )  # fmt: skip
    facts = {
        **{name: column(name) for name in columns if name in one.rows[0]},
        "best_class": np.array([-1 if row["best_class"] is None else row["best_class"] for row in one.rows], np.int32),
        "histogram": np.array([row["histogram"] for row in one.rows], np.uint32),
        "intervals": one.shown.counts.astype(np.uint32),
        "nearest": np.pad(nearest, ((0, 0), (0, missing)), constant_values=-1).astype(np.int32),
        "cosines": np.pad(cosines, ((0, 0), (0, missing))),
        "plane": plane(sae.W_dec).places_F2,
    }
    if "name" in one.rows[0]:
        names = sorted({row["name"] for row in one.rows if row["name"] is not None})
        place = {name: i for i, name in enumerate(names)}
        facts["name"] = np.array([place.get(row["name"], -1) for row in one.rows], np.int32)
        facts["names"] = np.frombuffer(json.dumps(names).encode(), np.uint8)
    for i, other in enumerate(_others(one, run.saes)):
        match, cosine = nearest_rows(sae.W_dec, load(other.folder).to(run.device).W_dec, 1)
        facts |= {f"match-{i}": match[:, 0].astype(np.int32), f"match-cosine-{i}": cosine[:, 0]}
    for policy, of_policy in run.heads.items():
        if one.name in of_policy:
            facts[f"heads-{policy}"] = of_policy[one.name].T.astype(np.float32)
    if (extremes := run.classifiers.extremes(one.about, one.store, sae.W_dec)) is not None:
        facts |= {"classes": extremes[0].astype(np.int32), "effects": extremes[1].astype(np.float32)}
    return facts | run.attributed.facts(one.name, len(one.rows))
