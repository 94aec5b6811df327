"""open_clip models: creation by name, image towers under the common names, texts and prompts.

Shapes: B batch, T tokens (the class token first, then patches), D width, E joint embedding.
"""

import copy
import logging
import warnings
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from open_clip.convert import convert_state_dict
from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed, resize_text_pos_embed
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from sparsight.backbones.towers import Tower, timm_tower
from sparsight.backbones.weights import read_weights
from sparsight.common.errors import SparsightError, reason
from sparsight.config.backbone import RANDOM

# MultiheadAttention has a second implementation, with other rounding, which runs only without hooks and gradients.
# It is disabled, because a tap, a gate or a gradient must not change the bits of other values.
torch.backends.mha.set_fastpath_enabled(False)


class ClipTower(Tower):
    """open_clip's own VisionTransformer."""

    def __init__(self, clip: Any) -> None:
        self.visual = clip.visual
        super().__init__(clip)

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.visual.transformer.resblocks)

    @property
    def d_in(self) -> int:
        return int(self.visual.transformer.width)

    @property
    def n_class(self) -> int:
        return 1

    @property
    def n_prefix(self) -> int:
        return 1

    @property
    def n_patches(self) -> int:
        height, width = self.visual.grid_size
        return int(height * width)

    @property
    def n_read(self) -> int:
        takes_class_token = self.visual.pool_type == "tok" and self.visual.attn_pool is None
        return self.n_class if takes_class_token else self.n_prefix + self.n_patches

    @property
    def image_size(self) -> tuple[int, int]:
        height, width = self.visual.image_size
        return int(height), int(width)

    @property
    def classifier(self) -> None:
        return None

    def embed(self, images: Tensor) -> Tensor:
        return self.visual._embeds(images)

    def shared(self) -> list[dict[str, Tensor]]:
        return [{}] * len(self.blocks)

    def pool(self, x_BTD: Tensor) -> Tensor:
        return self.visual._pool(x_BTD)[0]

    def read(self, pooled_BD: Tensor) -> Tensor:
        return pooled_BD if self.visual.proj is None else pooled_BD @ self.visual.proj

    def head(self, x_BTD: Tensor) -> Tensor:
        return self.read(self.pool(x_BTD))


class ClipTimmTower(Tower):
    """An image tower that open_clip takes from timm (SigLIP, EVA, Perception Encoder): trunk, then projection."""

    def __init__(self, clip: Any) -> None:
        self.visual, self.trunk = clip.visual, timm_tower(clip.visual.trunk)
        super().__init__(clip.visual.trunk)

    @property
    def n_class(self) -> int:
        return self.trunk.n_class

    @property
    def n_read(self) -> int:
        return self.trunk.n_read

    @property
    def classifier(self) -> None:
        return None

    def embed(self, images: Tensor) -> Tensor:
        return self.trunk.embed(images)

    def shared(self) -> list[dict[str, Tensor]]:
        return self.trunk.shared()

    def pool(self, x_BTD: Tensor) -> Tensor:
        return self.trunk.pool(x_BTD)

    def read(self, pooled_BD: Tensor) -> Tensor:
        return self.visual.head(self.trunk.read(pooled_BD))

    def head(self, x_BTD: Tensor) -> Tensor:
        return self.visual.head(self.trunk.head(x_BTD))


def tower(clip: Any) -> Tower:
    """The image tower of an open_clip model.

    Raises:
        SparsightError: a tower that is not a Vision Transformer.
    """
    if type(clip.visual) is VisionTransformer:
        return ClipTower(clip)
    if type(clip.visual) is TimmModel:
        return ClipTimmTower(clip)
    raise SparsightError(f"open_clip: the image tower is a {type(clip.visual).__name__}, not a Vision Transformer")


def create(name: str, weights: str | None, **architecture: Any) -> nn.Module:
    """An open_clip model.

    Args:
        name: ``ViT-B-32-quickgelu``, ``ViT-B-32-quickgelu@openai`` (a tag of open_clip, which gives the
            preprocessing, and the weights if ``weights`` is ``pretrained``), ``hf-hub:org/repo`` or
            ``local-dir:folder``.
        weights: None or ``random``, ``pretrained`` (downloaded) or the path of a safetensors file or checkpoint.
        architecture: overrides of open_clip's model config, with dots: ``embed_dim``, ``vision.width``,
            ``vision.layers``, ``vision.head_width``, ``vision.image_size``, ``text.layers``, ...

    Raises:
        SparsightError: an unknown name, tag or option; an activation (QuickGELU) that the tag's weights were not
            trained with; weights that cannot be loaded or do not fit.
    """
    model_name, _, tag = name.partition("@")
    from_hub = ":" in model_name
    config = None if from_hub else open_clip.get_model_config(model_name)
    if not from_hub and config is None:
        raise SparsightError(f"open_clip knows no model {model_name!r}; see open_clip.list_models()")
    tag_config = open_clip.get_pretrained_cfg(model_name, tag) if tag else {}
    if tag and not tag_config:
        known = ", ".join(open_clip.list_pretrained_tags_by_model(model_name)) or "none"
        raise SparsightError(f"open_clip has no weights {tag!r} for {model_name}; it has: {known}")
    if config is not None and tag_config and (tag_config.get("quick_gelu", False) != config.get("quick_gelu", False)):
        variant = model_name.removesuffix("-quickgelu") if config.get("quick_gelu") else f"{model_name}-quickgelu"
        raise SparsightError(
            f"open_clip: {tag!r} was {'' if tag_config.get('quick_gelu') else 'not '}trained with QuickGELU, unlike "
            f"{model_name}, so its outputs would be wrong; use {variant}@{tag}"
        )
    if weights == "pretrained" and not tag and not from_hub:
        raise SparsightError(f"open_clip: say which weights, e.g. {model_name}@openai; see open_clip.list_pretrained()")
    if from_hub and weights is None:
        raise SparsightError(f"open_clip: {model_name!r} comes with its weights; set weights: pretrained")
    options = _options(config, architecture, name)
    keys = ("mean", "std", "interpolation", "resize_mode")
    logging.disable(logging.WARNING)  # open_clip writes to the root logger; the checks above cover its warnings
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            model = open_clip.create_model(
                model_name,
                pretrained=tag if weights == "pretrained" and not from_hub else None,
                load_weights=weights == "pretrained",
                pretrained_text=False,
                force_preprocess_cfg={key: tag_config[key] for key in keys if key in tag_config},
                **options,
            )
    except (RuntimeError, ValueError, TypeError, OSError, AssertionError) as error:
        raise SparsightError(f"open_clip/{name}: cannot be made ({reason(error)})") from None
    finally:
        logging.disable(logging.NOTSET)
    if weights not in (None, "pretrained", RANDOM):
        _load(model, Path(str(weights)))
    return model


def _options(config: dict[str, Any] | None, architecture: dict[str, Any], name: str) -> dict[str, Any]:
    """The model config's sections, with dotted overrides applied."""
    if not architecture:
        return {}
    if config is None:
        raise SparsightError(f"open_clip/{name}: a model from a hub or folder has its own architecture; give none")
    merged = copy.deepcopy(config)
    for key, value in architecture.items():
        section, _, option = key.rpartition(".")
        if section not in ("", "vision", "text"):
            raise SparsightError(f"open_clip/{name}: unknown architecture option {key!r}; use vision.<x> or text.<x>")
        (merged[f"{section}_cfg"] if section else merged)[option] = value
    options = {key: merged[key] for key in ("embed_dim", "vision_cfg", "text_cfg")}
    if "vision.image_size" in architecture:  # a timm tower is created at its own size, then resized
        options["force_image_size"] = architecture["vision.image_size"]
    return options


def _load(model: Any, path: Path) -> None:
    """Load weights under open_clip's names or names that open_clip converts; position embeddings are resized."""
    state = {key: value.float() if value.is_floating_point() else value for key, value in read_weights(path).items()}
    try:
        state = convert_state_dict(model, state)
        if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
            state = convert_to_custom_text_state_dict(state)
        resize_pos_embed(state, model)
        resize_text_pos_embed(state, model)
        model.load_state_dict(state)
    except (RuntimeError, KeyError) as error:
        shown = " ".join(str(error).split())[:200]  # torch's first line names no key
        raise SparsightError(f"{path}: does not fit the architecture ({shown})") from None


@torch.no_grad()
def encode_text(clip: Any, name: str, texts: list[str], batch_size: int = 256) -> Tensor:
    """Text features of unit norm, (n, E).

    Raises:
        SparsightError: the model's tokenizer is not available (some must be downloaded).
    """
    tokens_NT = tokenizer(clip, name)(texts).to(next(clip.parameters()).device)
    parts = [clip.encode_text(tokens, normalize=True) for tokens in tokens_NT.split(batch_size)]
    return torch.cat(parts)


def tokenizer(clip: Any, name: str) -> Any:
    """The tokenizer: texts -> token ids (n, context length); raises SparsightError if it cannot be loaded."""
    try:
        return open_clip.get_tokenizer(name.partition("@")[0], context_length=getattr(clip, "context_length", None))
    except (OSError, ImportError, ValueError, RuntimeError) as error:
        raise SparsightError(f"open_clip/{name}: no tokenizer ({reason(error)})") from None


def prompt_classifier(clip: Any, name: str, classes: list[str], templates: tuple[str, ...]) -> Tensor:
    """One text feature per class, the mean over templates, of unit norm: (classes, E) (arXiv 2103.00020, 3.1.4)."""
    texts = [template.format(label) for label in classes for template in templates]
    features = encode_text(clip, name, texts).view(len(classes), len(templates), -1)
    return F.normalize(features.mean(dim=1), dim=-1)


def prompt_logits(clip: Any, features_BE: Tensor, prompts_CE: Tensor) -> Tensor:
    """Scaled cosine similarities (B, classes), as open_clip's ``get_logits``."""
    logits = clip.logit_scale.exp() * F.normalize(features_BE, dim=-1) @ prompts_CE.T
    return logits if clip.logit_bias is None else logits + clip.logit_bias
