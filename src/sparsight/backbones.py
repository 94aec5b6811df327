"""Vision Transformers with named taps and head gates.

Shapes: B batch, T tokens (class and register tokens first, then patches), D width (d_in), L blocks, H heads.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.data import resolve_model_data_config
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from sparsight import sites
from sparsight.attention import HeadMode, attend
from sparsight.errors import SparsightError
from sparsight.images import Preprocess


class BlockPolicy(Protocol):
    """Something that decides, block by block, which heads an image uses."""

    def decide(self, block: int, cls_BD: Tensor) -> Tensor | None:
        """Bool (B, H) for one block from the class token at its input; None keeps every head."""


class Backbone(nn.Module):
    """A plain (pre-norm) timm VisionTransformer whose blocks can be tapped and whose heads can be gated.

    Args:
        model: the timm model, in eval mode from here on.
        preprocess: how pictures become its input; None takes the model's own configuration.

    Raises:
        SparsightError: blocks of another kind, whose parts have no names here.
    """

    model: Any  # timm does not type its attributes

    def __init__(self, model: nn.Module, preprocess: Preprocess | None = None) -> None:
        super().__init__()
        if not isinstance(model, VisionTransformer) or any(type(block) is not Block for block in model.blocks):
            raise SparsightError(f"{type(model).__name__}: taps need a timm VisionTransformer with plain blocks")
        self.model, self.preprocess = model.eval(), preprocess or _preprocess(model)

    @property
    def n_blocks(self) -> int:
        """L."""
        return len(self.model.blocks)

    @property
    def n_heads(self) -> int:
        """H, of every block."""
        return int(self.model.blocks[0].attn.num_heads)

    @property
    def d_in(self) -> int:
        """D, the width of the residual stream."""
        return int(self.model.embed_dim)

    @property
    def n_prefix(self) -> int:
        """Class and register tokens in front of the patches."""
        return int(self.model.num_prefix_tokens)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def normalize(self, pixels: np.ndarray) -> Tensor:
        """uint8 (B, H, W, C) as :meth:`Split.batch` gives it -> the model's input, float32 (B, C, H, W)."""
        x = torch.from_numpy(pixels).to(self.device).permute(0, 3, 1, 2).float() / 255
        mean = x.new_tensor(self.preprocess.mean).view(1, -1, 1, 1)
        return (x - mean) / x.new_tensor(self.preprocess.std).view(1, -1, 1, 1)

    def forward(
        self,
        images: Tensor,
        head_mask: Tensor | None = None,
        policy: BlockPolicy | None = None,
        heads: HeadMode = "masked",
    ) -> Tensor:
        """Class logits (B, classes).

        Args:
            images: preprocessed, (B, C, H, W).
            head_mask: bool (B, L, H), true where a head is kept.
            policy: decides block by block; not together with ``head_mask``.
            heads: ``masked`` or ``gathered`` (the kept heads only), see :func:`sparsight.attention.attend`.
        """
        if head_mask is not None and policy is not None:
            raise SparsightError("give head_mask or policy, not both")
        if head_mask is not None:
            wanted = (len(images), self.n_blocks, self.n_heads)
            if head_mask.shape != wanted:
                raise SparsightError(f"head_mask: expected shape {wanted}, got {tuple(head_mask.shape)}")
            policy = _Fixed(head_mask)
        x_BTD, _ = self.run_blocks(self.tokens(images), 0, self.n_blocks, policy, heads)
        return self.classify(x_BTD)

    @torch.no_grad()
    def taps(self, images: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """Activations by site from one forward pass: (B, T, D) each, ``embedding`` (B, D).

        ``.attn`` and ``.mlp`` are what the sublayer adds to the residual stream. The pass stops after the
        last block that is asked for.

        Raises:
            SparsightError: a site that does not exist in this model.
        """
        for name in names:
            sites.check(name, self.n_blocks, "sites")
        last = max(self.n_blocks if name == "embedding" else int(name.split(".")[1]) + 1 for name in names)
        x_BTD = self.tokens(images)
        found: dict[str, Tensor] = {}
        for i, block in enumerate(self.model.blocks[:last]):
            attn_BTD = block.ls1(block.attn(block.norm1(x_BTD)))
            middle_BTD = x_BTD + attn_BTD
            mlp_BTD = block.ls2(block.mlp(block.norm2(middle_BTD)))
            out_BTD = middle_BTD + mlp_BTD
            parts = {"input": x_BTD, "attn": attn_BTD, "mlp": mlp_BTD, "output": out_BTD}
            found |= {f"blocks.{i}.{part}": value for part, value in parts.items()}
            found = {name: value for name, value in found.items() if name in names}
            x_BTD = out_BTD
        if "embedding" in names:
            found["embedding"] = self.model.forward_head(self.model.norm(x_BTD), pre_logits=True)
        return {name: found[name] for name in names}

    def tokens(self, images: Tensor) -> Tensor:
        """The residual stream entering block 0, (B, T, D)."""
        model = self.model
        return model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))

    def run_blocks(
        self, x_BTD: Tensor, start: int, stop: int, policy: BlockPolicy | None = None, heads: HeadMode = "masked"
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Blocks ``start`` to ``stop`` - 1: the residual stream after them, and the masks that were decided.

        Running a prefix once and several suffixes gives the same bits as several whole passes.
        """
        masks: dict[int, Tensor] = {}
        for i in range(start, stop):
            block = self.model.blocks[i]
            keep_BH = None if policy is None else policy.decide(i, x_BTD[:, 0])
            if keep_BH is None:
                x_BTD = block(x_BTD)
                continue
            masks[i] = keep_BH
            x_BTD = x_BTD + block.drop_path1(block.ls1(attend(block.attn, block.norm1(x_BTD), keep_BH, heads)))
            x_BTD = x_BTD + block.drop_path2(block.ls2(block.mlp(block.norm2(x_BTD))))
        return x_BTD, masks

    def classify(self, x_BTD: Tensor) -> Tensor:
        """Class logits from the residual stream after the last block."""
        return self.model.forward_head(self.model.norm(x_BTD))

    def macs(self, n_kept: float | Tensor) -> float | Tensor:
        """Multiply-accumulates of one block's attention with ``n_kept`` heads: qkv, scores, values, projection."""
        attention = self.model.blocks[0].attn
        tokens = self.model.patch_embed.num_patches + self.n_prefix
        return n_kept * attention.head_dim * tokens * (4 * self.d_in + 2 * tokens)

    @property
    def macs_outside_attention(self) -> int:
        """Multiply-accumulates of one image outside attention: patch embedding, MLPs, classifier."""
        model = self.model
        patches = model.patch_embed.num_patches
        embed = patches * model.patch_embed.proj.weight.numel()
        tokens = patches + self.n_prefix
        mlp = sum(tokens * (block.mlp.fc1.weight.numel() + block.mlp.fc2.weight.numel()) for block in model.blocks)
        return embed + mlp + (model.head.weight.numel() if isinstance(model.head, nn.Linear) else 0)


@dataclasses.dataclass
class _Fixed:
    """A mask given in advance, as a policy."""

    mask_BLH: Tensor

    def decide(self, block: int, cls_BD: Tensor) -> Tensor:
        return self.mask_BLH[:, block]


def load(name: str, weights: str | None = None, num_classes: int | None = None, **architecture: Any) -> Backbone:
    """Create a backbone by name.

    Args:
        name: ``timm/<architecture>``.
        weights: None (random), ``"pretrained"`` (downloaded by timm) or the path of a safetensors file.
        num_classes: outputs of the classifier; None keeps the architecture's. A classifier in the weights
            that has another number of outputs is left out and starts at random.
        architecture: timm's keyword arguments, e.g. ``img_size=28, patch_size=7, in_chans=1``.

    Raises:
        SparsightError: unknown model, or weights that do not fit it.
    """
    library, _, model_name = name.partition("/")
    if library != "timm" or not timm.is_model(model_name.partition(".")[0]):
        raise SparsightError(f"backbone {name!r} is unknown; use timm/<architecture>, e.g. timm/vit_small_patch16_224")
    options = dict(architecture)
    if num_classes is not None:
        options["num_classes"] = num_classes
    try:
        model = timm.create_model(model_name, pretrained=weights == "pretrained", **options)
    except TypeError as error:
        raise SparsightError(f"backbone {name!r} refuses its architecture options: {error}") from None
    if weights not in (None, "pretrained"):
        _load_weights(model, Path(str(weights)))
    return Backbone(model)


def _load_weights(model: nn.Module, path: Path) -> None:
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise SparsightError(f"{path}: not a readable safetensors file ({error})") from None
    own = model.state_dict()
    head = {k for k in state if k.startswith("head.") and k in own and state[k].shape != own[k].shape}
    wrong = sorted(k for k in state.keys() - head if k not in own or state[k].shape != own[k].shape)
    missing = sorted(k for k in own.keys() - state.keys() if not k.startswith("head."))
    if wrong or missing:
        raise SparsightError(f"{path}: does not fit the architecture, see e.g. {(wrong + missing)[0]!r}")
    for key, value in state.items():
        if not torch.isfinite(value).all():
            raise SparsightError(f"{path}: {key!r} holds NaN or infinite values; the file is damaged")
    model.load_state_dict({k: v.float() for k, v in state.items() if k not in head}, strict=False)


def _preprocess(model: Any) -> Preprocess:
    data = resolve_model_data_config(model)
    height, width = model.patch_embed.img_size
    channels = model.patch_embed.proj.in_channels
    mean, std = tuple(data["mean"]), tuple(data["std"])
    if channels == 1:  # timm names RGB statistics whatever in_chans is
        mean, std = (sum(mean) / len(mean),), (sum(std) / len(std),)
    trained_here = (height, width) == tuple(data["input_size"][-2:])
    return Preprocess(
        (height, width), channels, mean, std, data["interpolation"], data["crop_pct"] if trained_here else 1.0
    )


def open_folder(folder: Path) -> tuple[Backbone, dict[str, Any]]:
    """The backbone that the backbone stage wrote, and its config.json.

    Raises:
        SparsightError: the folder does not hold one.
    """
    try:
        about = json.loads((folder / "config.json").read_text())
    except OSError as error:
        raise SparsightError(f"{folder}: no backbone here ({error.strerror}: config.json)") from None
    weights = str(folder / "model.safetensors")
    backbone = load(about["model"], weights, len(about["classes"]), **about["architecture"])
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in about["preprocess"].items()}
    backbone.preprocess = Preprocess(**values)
    return backbone, about
