"""What the sections of a run ask of each other."""

import itertools
from collections.abc import Iterable
from typing import TYPE_CHECKING

from sparsight import sae
from sparsight.common import sites
from sparsight.common.errors import SparsightError
from sparsight.config import Pruning, Steering
from sparsight.config.steering import steerable

if TYPE_CHECKING:
    from sparsight.pipeline.run import Run


def check_links(run: "Run") -> None:
    """Check every name by which a section refers to another, and what it needs of that section.

    Raises:
        SparsightError: a section that does not exist, or does not fit.
    """
    names = [run.run, *run.other_images, *run.backbones, *run.saes, *run.policies, *run.steering, *run.disentangle]
    for name in (*names, *run.attribution, *run.spurious):
        if not name or not all(c.isalnum() or c in "-_." for c in name) or name.startswith("."):
            raise SparsightError(
                f"configuration: the name {name!r} becomes a folder; use letters, digits, '-', '_', '.'"
            )
    for name, backbone in run.backbones.items():
        for site in run.activations.tokens_by_site:
            if backbone.depth is not None:
                sites.check(site, backbone.depth, f"activations.sites (backbone {name!r})")
    _check_saes(run)
    for name, policy in run.policies.items():
        _known(policy.backbone, run.backbones, f"policies.{name}.backbone")
    _check_steering(run)
    for name, disentangle in run.disentangle.items():
        _known(disentangle.sae, run.saes, f"disentangle.{name}.sae")
        disentangle.check(f"disentangle.{name}", run.saes[disentangle.sae], run.activations.tokens_by_site)
    for name, images in run.other_images.items():
        if images.masks is not None:
            raise SparsightError(f"other_images.{name}.masks: would be ignored, only images has masks; leave it out")
    for name, attribution in run.attribution.items():
        _known(attribution.sae, run.saes, f"attribution.{name}.sae")
        read = run.saes[attribution.sae]
        attribution.check(f"attribution.{name}", read, run.backbones[read.backbone])
    for name, spurious in run.spurious.items():
        _known(spurious.sae, run.saes, f"spurious.{name}.sae")
        read = run.saes[spurious.sae]
        spurious.check(f"spurious.{name}", read, run.backbones[read.backbone], run.activations.tokens_by_site)
    if run.other_images and not run.transfers:
        raise SparsightError(
            "other_images: only steering of kind vs2 on a model that classifies is tried on them; add one, or set "
            "other_images to {}"
        )
    if run.report.words is not None and not any(map(run.namer_of, run.backbones)):
        raise SparsightError(
            "report.words: names of latents need an open_clip backbone, and embedding in activations.sites; add them, "
            "or set words to null"
        )
    if run.pruning is not None:
        _check_pruning(run, run.pruning)
    for name in run.policies if run.pruning is None else ():
        raise SparsightError(f"pruning: says how the policy {name!r} is evaluated; set policies.{name} to null too")


def _known(value: str, names: Iterable[str], where: str) -> None:
    if value not in names:
        raise SparsightError(f"{where}: there is no {value!r}; known: {', '.join(names) or 'none'}")


def _check_saes(run: "Run") -> None:
    variants = sae.names()
    for name, section in run.saes.items():
        if section.kind not in variants:
            raise SparsightError(f"saes.{name}.kind: there is no SAE {section.kind!r}; known: {', '.join(variants)}")
        if section.mutual and section.kind == "archetypal":
            raise SparsightError(
                f"saes.{name}.mutual: is for kinds that train decoder rows directly, not archetypal; leave it out"
            )
        _known(section.backbone, run.backbones, f"saes.{name}.backbone")
        for site in section.places:
            if site not in run.activations.tokens_by_site:
                raise SparsightError(
                    f"saes.{name}: activations.sites has no {site!r}; add it there, or set saes.{name} to null"
                )
        run.tokens_of(name)
        _check_rest(run, name)
        if section.judge is not None:
            _check_judge(run, f"saes.{name}.judge", section.judge, section.backbone)
        try:
            section.check_files()
        except SparsightError as error:
            raise SparsightError(f"saes.{name}.{error}") from None


def _check_judge(run: "Run", where: str, judge: str, own: str) -> None:
    _known(judge, run.backbones, where)
    if judge == own:
        raise SparsightError(f"{where}: {judge!r} is the SAE's own backbone; name another one, or null")
    if "embedding" not in run.activations.tokens_by_site:
        raise SparsightError(f"{where}: compares embeddings of images; add embedding to activations.sites, or set null")


def _check_steering(run: "Run") -> None:
    for name, steering in run.steering.items():
        _known(steering.sae, run.saes, f"steering.{name}.sae")
        for layer in steering.layers:
            _known(layer, run.saes, f"steering.{name}.layers")
        for key, layer in (("sae", steering.sae), *(("layers", layer) for layer in steering.layers)):
            _check_steered(run, f"steering.{name}.{key}", steering, layer)
        _check_layers(run, f"steering.{name}.layers", steering)
        if steering.neighbour_backbone is not None:
            _known(steering.neighbour_backbone, run.backbones, f"steering.{name}.neighbour_backbone")
        if steering.kind == "vs2++" and "embedding" not in run.activations.tokens_by_site:
            raise SparsightError(f"steering.{name}: kind vs2++ compares embeddings; add embedding to activations.sites")


def _check_pruning(run: "Run", pruning: Pruning) -> None:
    _known(pruning.steering, run.steering, "pruning.steering")
    steering = run.steering[pruning.steering]
    about = (steering.kind, steering.edit, steering.ranking)
    if about != ("class-latents", "amplify", "mean-difference"):
        raise SparsightError(
            f"pruning.steering: {pruning.steering!r} is of {', '.join(about)}; heads need "
            "class-latents, amplify, mean-difference; name such a section"
        )
    read = run.saes[steering.sae]
    if steering.layers:
        raise SparsightError(
            f"pruning.steering: {pruning.steering!r} has layers, but heads are steered at the last block's input "
            "alone; name a section without layers"
        )
    if (own := run.tokens_of(steering.sae)) not in ("cls", "mean"):
        raise SparsightError(
            f"pruning.steering: its SAE reads tokens {own}; head policies read cls, or mean in a model without a "
            "class token; name a section of such an SAE"
        )
    steered, depth = read.backbone, run.backbones[read.backbone].depth
    if depth is not None and read.site != f"blocks.{depth - 1}.input":
        raise SparsightError(
            f"pruning.steering: its SAE reads {read.site!r}, but heads are steered at the last block's input, "
            f"blocks.{depth - 1}.input"
        )
    if read.weights is None and 2 * pruning.latents[-1] > read.d_sae:  # of weights, the stage checks it
        raise SparsightError(
            f"pruning.latents: {pruning.latents[-1]} latents and as many random others do not fit into "
            f"d_sae = {read.d_sae}; lower it"
        )
    for name, policy in run.policies.items():
        if policy.backbone != steered:
            raise SparsightError(
                f"policies.{name}.backbone: {policy.backbone!r} is not {steered!r}, whose SAE pruning.steering uses"
            )


def _check_rest(run: "Run", name: str) -> None:
    """Check that a section's loss gets what it needs of the site and of the backbone."""
    section = run.saes[name]
    backbone = run.backbones[section.backbone]
    stored = run.activations.tokens_by_site[section.places[0]]
    try:
        section.check_rest(stored, backbone.depth, backbone.training != "none")
    except SparsightError as error:
        raise SparsightError(f"saes.{name}.{error}") from None


def _check_steered(run: "Run", where: str, steering: Steering, name: str) -> None:
    """Check that the SAEs of a section can steer."""
    section = run.saes[name]
    if section.site is None:
        raise SparsightError(f"{where}: {name!r} is a chain; steering takes an SAE of one site")
    if sites.parse(section.site)[1] not in ("input", "output"):
        raise SparsightError(
            f"{where}: {name!r} reads {section.site!r}; steering edits the residual stream, blocks.<i>.input or .output"
        )
    own = run.tokens_of(name)
    if (steering.tokens or own) not in steerable(own):
        raise SparsightError(
            f"{where}: {name!r} reads tokens {own} and cannot steer tokens {steering.tokens}; name an SAE that reads "
            f"{steering.tokens} or all, or set tokens to null"
        )
    if steering.kind == "class-latents" and section.weights is None and 2 * steering.latents > section.d_sae:
        raise SparsightError(
            f"{where.rpartition('.')[0]}.latents: {steering.latents} latents and as many random others do not fit into "
            f"d_sae = {section.d_sae} of {name!r}; lower latents"
        )


def _check_layers(run: "Run", where: str, steering: Steering) -> None:
    """Check that SAEs which steer in the same pass fit together."""
    first, *others = (run.saes[name] for name in (steering.sae, *steering.layers))
    for name, section in zip(steering.layers, others, strict=True):
        if section.backbone != first.backbone:
            raise SparsightError(f"{where}: {name!r} is of backbone {section.backbone!r}, not of {first.backbone!r}")
        if missing := sorted(set(first.seeds) - set(section.seeds)):
            raise SparsightError(f"{where}: {name!r} has no seed {missing[0]}, which {steering.sae!r} has; add it")
    order = [str(section.site) for section in (first, *others)]
    if any(sites.depth(a) >= sites.depth(b) for a, b in itertools.pairwise(order)):
        raise SparsightError(f"{where}: the sites are {', '.join(order)}; give each once, in the order of the model")
