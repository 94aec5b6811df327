"""Loads backbones: timm and open_clip models by name, or a folder that the backbone stage wrote."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sparsight.backbones.backbone import Backbone, BlockPolicy
from sparsight.backbones.weights import read_weights
from sparsight.common.digests import digest, file_digest
from sparsight.common.errors import SparsightError, reason
from sparsight.config.backbone import RANDOM
from sparsight.images.preprocess import Preprocess

__all__ = ["Backbone", "BlockPolicy", "keep_prompts", "load", "open_folder"]

_PROMPTS = "prompts.safetensors"


def load(name: str, weights: str | None = None, num_classes: int | None = None, **architecture: Any) -> Backbone:
    """Create a backbone by name.

    Args:
        name: ``timm/<architecture>``, or ``open_clip/<model>[@<tag>]``, ``open_clip/hf-hub:<org>/<repo>``,
            ``open_clip/local-dir:<folder>``.
        weights: None or ``"random"``, ``"pretrained"`` (downloaded by the library) or the path of a safetensors
            file or a checkpoint, read without running code.
        num_classes: outputs of the classifier; None keeps the architecture's. If the classifier in the weights
            has another number of outputs, it is left out and starts at random. Not for open_clip.
        architecture: overrides by the library's names, e.g. ``img_size=28, patch_size=7, in_chans=1`` (timm)
            or ``**{"vision.width": 192, "text.layers": 4}`` (open_clip).

    Raises:
        SparsightError: unknown model, or weights that do not fit it.
    """
    library, _, model_name = name.partition("/")
    if library == "open_clip":
        from sparsight.backbones import open_clip

        if num_classes is not None:
            raise SparsightError(f"backbone {name!r} has no classifier of its own; it classifies by prompts")
        return Backbone(open_clip.create(model_name, weights, **architecture), name)
    if library != "timm" or not timm.is_model(model_name.partition(".")[0]):
        raise SparsightError(
            f"backbone {name!r} is unknown; use timm/<architecture> or open_clip/<model>, "
            "e.g. timm/vit_small_patch16_224"
        )
    options = dict(architecture)
    if num_classes is not None:
        options["num_classes"] = num_classes
    try:
        model = timm.create_model(model_name, pretrained=weights == "pretrained", **options)
    except (TypeError, AssertionError, ZeroDivisionError) as error:
        raise SparsightError(f"backbone {name!r} refuses its architecture options: {error}") from None
    except (OSError, RuntimeError) as error:
        raise SparsightError(f"backbone {name!r} cannot be made ({reason(error)})") from None
    backbone = Backbone(model, name)
    if weights not in (None, "pretrained", RANDOM):
        backbone.random_classifier = not _load_weights(model, model_name, Path(str(weights)))
    return backbone


def load_configured(
    name: str, weights: str | None, num_classes: int | None, architecture: Mapping[str, Any]
) -> Backbone:
    """As :func:`load`; the architecture's own ``num_classes`` counts if the argument is None."""
    options = dict(architecture)
    own = options.pop("num_classes", None)
    return load(name, weights, own if num_classes is None else num_classes, **options)


def _load_weights(model: nn.Module, name: str, path: Path) -> bool:
    """Load weights under timm's names, or names that timm's filter of the family translates (DINOv2, CLIP, ...).

    Returns:
        Whether they hold all of the model's classifier.
    """
    state = {key: value.float() if value.is_floating_point() else value for key, value in read_weights(path).items()}
    module = sys.modules[timm.model_entrypoint(name.partition(".")[0]).__module__]
    translate = getattr(module, "checkpoint_filter_fn", lambda state, model: state)
    try:
        state = translate(state, model)
    except (KeyError, RuntimeError, AssertionError, ValueError) as error:
        raise SparsightError(f"{path}: does not fit the architecture ({error})") from None
    expected = model.state_dict()
    heads = ("head.", "head_dist.")
    ignored = {k for k in state if k.startswith(heads) and (k not in expected or state[k].shape != expected[k].shape)}
    wrong = sorted(k for k in state.keys() - ignored if k not in expected or state[k].shape != expected[k].shape)
    missing = sorted(k for k in expected.keys() - state.keys() if not k.startswith(heads))
    if wrong or missing:
        raise SparsightError(f"{path}: does not fit the architecture, see e.g. {(wrong + missing)[0]!r}")
    model.load_state_dict({k: v for k, v in state.items() if k not in ignored}, strict=False)
    return not any(k.startswith(heads) and (k not in state or k in ignored) for k in expected)


def open_folder(folder: Path) -> tuple[Backbone, dict[str, Any]]:
    """The backbone that the backbone stage wrote, and its config.json.

    Raises:
        SparsightError: the folder holds no backbone.
    """
    try:
        metadata = json.loads((folder / "config.json").read_text())
    except OSError as error:
        raise SparsightError(f"{folder}: no backbone here ({reason(error)}: config.json)") from None
    classifies = metadata["training"] != "none"
    n_classes = len(metadata["classes"]) or None if classifies else 0
    if metadata["model"].startswith("open_clip/"):
        n_classes = None
    weights = str(folder / "model.safetensors")
    backbone = load_configured(metadata["model"], weights, n_classes, metadata["architecture"])
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in metadata["preprocess"].items()}
    backbone.preprocess = Preprocess(**values)
    backbone.class_names = metadata["classes"] or None if classifies else None
    if metadata["templates"]:
        names, templates = metadata["prompt_names"], metadata["templates"]
        backbone.prompts_CE = _kept_prompts(folder, names, templates)
        if backbone.prompts_CE is None:
            backbone.use_prompts(names, templates)
    return backbone, metadata


def keep_prompts(backbone: Backbone, folder: Path, names: list[str], templates: list[str]) -> None:
    """Write ``prompts.safetensors``: the text feature of every class, which takes minutes to compute for many classes.

    The file holds ``prompts`` (classes, E) and a digest of the texts and of ``model.safetensors`` in the same folder.
    It holds no tensor for a model with a classifier of its own.
    """
    tensors = {} if backbone.prompts_CE is None else {"prompts": backbone.prompts_CE.contiguous()}
    save_file(tensors, folder / _PROMPTS, {"digest": _prompts_digest(folder, names, templates)})


def _kept_prompts(folder: Path, names: list[str], templates: list[str]) -> Tensor | None:
    """The prompts that :func:`keep_prompts` wrote; None if there are none, or of other texts or weights."""
    if not (folder / _PROMPTS).exists():
        return None
    with safe_open(folder / _PROMPTS, "pt") as file:
        if file.metadata().get("digest") != _prompts_digest(folder, names, templates):
            return None
        return file.get_tensor("prompts")


def _prompts_digest(folder: Path, names: list[str], templates: list[str]) -> str:
    return digest([names, list(templates), file_digest(folder / "model.safetensors")])
