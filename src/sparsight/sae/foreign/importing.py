"""The stage that imports an SAE of another tool, in place of training one.

Shapes: N rows, D width (d_in), F latents (d_sae).
"""

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import torch

from sparsight import config
from sparsight.activations.store import ActivationStore
from sparsight.common import sites
from sparsight.common.digests import file_digest
from sparsight.common.errors import SparsightError
from sparsight.common.progress import log
from sparsight.common.tokens import chosen
from sparsight.common.work import Work
from sparsight.config.foreign import FORMATS
from sparsight.config.sae import OF_WEIGHTS
from sparsight.sae.foreign import causes
from sparsight.sae.foreign.hub import fetch
from sparsight.sae.foreign.source import Foreign, fold_inputs

_ROWS = 4096  # of random images, on which the import is checked
_POOR = 0.5  # an FVU for which other readings of the file are tried
_SCALE_ROWS = 2**14  # from which ``normalized`` takes its numbers


@torch.no_grad()
def import_sae(
    section: config.Sae, store: ActivationStore, name: str, work: Work, device: torch.device, record: dict[str, Any]
) -> None:
    """Write ``<name>-s<seed>`` with the weights of another tool: ``sae.safetensors``, ``config.json``, an empty log.

    The codes are the tool's own, in its units. Where a kind has no fixed number of active latents, ``k`` is their mean
    number on activations of the train split. ``imported`` in config.json has the file, its digest and this check's FVU.

    Raises:
        SparsightError: a file that is not of the format or cannot be expressed here, a width or place that is not the
            site's, or an FVU above 1 on the train split, with the likely cause.
    """
    assert section.site is not None and section.weights is not None and section.format is not None
    hub, form = section.in_hub, FORMATS[section.format]
    path = Path(section.weights) if hub is None else fetch(*hub, form.beside)
    if not path.is_file():
        raise SparsightError(f"{path}: there is no such file; give a path or hf:<owner>/<repository>/<file>")
    found: Foreign = importlib.import_module(f"sparsight.sae.foreign.{section.format}").load(path)
    tokens = chosen(section.tokens, {section.site: store.tokens_of(section.site)})
    _check_place(path, section.site, found, store, tokens)
    x_ND = causes.rows(store, section.site, tokens, _ROWS, device)
    sae = found.sae.to(device)
    if section.normalized:
        many = causes.rows(store, section.site, tokens, _SCALE_ROWS, device)
        fold_inputs(sae, *causes.normalization(many, form.rms))
    fvu, l0_N = causes.fit(sae, x_ND)
    log(f"{name}: FVU {fvu:.3g} on {len(x_ND):,} train activations at {section.site}")
    others = causes.elsewhere(sae, store, section.site, tokens, len(x_ND))
    if not fvu <= _POOR:
        others |= causes.misread(sae, x_ND, section.normalized, form.rms)
    better = "; ".join(f"{what} it would be {value:.2g}" for what, value in causes.better(others, min(fvu / 2, 1)))
    if not fvu <= 1:
        raise SparsightError(
            f"{path}: FVU {fvu:.3g} at {section.site}, worse than the mean activation; "
            + (better or "no other site, scaling or orientation explains it; check backbone, images and weights")
        )
    if better:
        log(f"{name}: is this right? {better}")
    few = int((l0_N < sae.k).sum())
    if found.signed and few:
        raise SparsightError(
            f"{path}: {few} of {len(x_ND)} activations have fewer than k = {sae.k} positive pre-activations; the tool "
            "then keeps negative ones, which TopK here cannot do, so this SAE cannot be imported"
        )
    if sae.kind != "topk":
        sae.k = max(1, round(float(l0_N.double().mean())))
    folder = f"{name}-s{section.seeds[0]}"
    used = {key: value for key, value in dataclasses.asdict(section).items() if key in OF_WEIGHTS}
    sae.save(
        work.out / folder,
        backbone=section.backbone,
        tokens=tokens,
        training=used | {"sites": [], "kind": sae.kind, "d_sae": sae.d_sae, "k": sae.k},
        imported={"sha256": file_digest(path), "place": found.named, "fvu": fvu, "rows": len(x_ND)},
        store_digest=store.manifest["digest"],
        record=record,
        name=folder,
        site=section.site,
    )
    (work.out / folder / "training.jsonl").write_text("")


def _check_place(path: Path, site: str, found: Foreign, store: ActivationStore, tokens: str) -> None:
    """Raise SparsightError if the file names another place than the site, or has another width."""
    if found.site is not None and sites.depth(found.site) != sites.depth(site):
        called = f"{found.named} ({found.site} here)" if found.named != found.site else found.site
        raise SparsightError(f"{path}: says that it reads {called}, but site is {site}; set site to {found.site}")
    width = store.rows(site, tokens).shape[1]
    if found.sae.d_in != width:
        others = [other for other in store.sites if store.rows(other).shape[1] == found.sae.d_in]
        raise SparsightError(
            f"{path}: is for activations of {found.sae.d_in} dimensions, but {site} has {width}; "
            + (f"stored sites of that width: {', '.join(others)}" if others else "it is of another model or transposed")
        )
