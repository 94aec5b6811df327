"""A Vision Transformer of any family, with named taps and head gates.

Shapes: B batch, T tokens (class tokens first, then registers, then patches), D width (d_in), L blocks, H heads,
C channels of a head, E joint embedding of images and texts.
"""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from sparsight.backbones import attention
from sparsight.backbones.attention import HeadMode
from sparsight.backbones.preprocessing import mean_and_std, published
from sparsight.backbones.towers import Tower, timm_tower
from sparsight.common import sites
from sparsight.common.devices import sent
from sparsight.common.errors import SparsightError
from sparsight.common.modules import Module
from sparsight.images.preprocess import Preprocess


class BlockPolicy(Protocol):
    """Decides, block by block, which heads an image uses."""

    def decide(self, block: int, read_BD: Tensor) -> Tensor | None:
        """Bool (B, H) for one block from :meth:`Backbone.policy_input` at its input; None keeps every head."""


class Backbone(Module):
    """A Vision Transformer whose blocks can be tapped and whose heads can be gated.

    Works in float32 and, inside ``torch.autocast``, in bfloat16. Unless heads are switched off, the results are
    those of the library's own forward, bit for bit.

    Args:
        model: a timm or open_clip model; it is put into eval mode.
        name: ``timm/...`` or ``open_clip/...``; open_clip finds the tokenizer by it.
        preprocess: how pictures become the model's input; None uses the model's own configuration.

    Raises:
        SparsightError: an unsupported kind of model or block.
    """

    model: Any  # timm and open_clip do not type their attributes
    prompts_CE: Tensor | None

    def __init__(self, model: nn.Module, name: str = "timm/", preprocess: Preprocess | None = None) -> None:
        super().__init__()
        self.name = name
        self.tower = _tower(model)
        self.model, self.preprocess = model.eval(), preprocess or published(model, self.tower.image_size)
        self.class_names: list[str] | None = None
        """Names of the output classes, if the backbone stage recorded them."""
        self.couples_mlp = False
        """Whether switching off a head also removes its channels from the input of the block's MLP (AdaViT's
        released models); see :meth:`run_blocks`."""
        self.random_classifier = False
        """Whether weights were loaded that have no classifier of this size, so that it is random."""
        self.register_buffer("prompts_CE", None, persistent=False)

    @property
    def n_blocks(self) -> int:
        """L, the number of blocks."""
        return len(self.tower.blocks)

    @property
    def n_heads(self) -> int:
        """H, the number of heads of every block."""
        layer: Any = self.tower.parts(0).attention
        return 0 if layer is None else int(layer.num_heads)

    @property
    def d_in(self) -> int:
        """D, the width of the residual stream."""
        return self.tower.d_in

    @property
    def d_embedding(self) -> int:
        """Width of ``embedding``; an attention pool may change it (CoCa)."""
        return self.taps(self.blank, ["embedding"])["embedding"].shape[1]

    @property
    def n_prefix(self) -> int:
        """Class and register tokens in front of the patches."""
        return self.tower.n_prefix

    @property
    def n_patches(self) -> int:
        """Patches of one image."""
        return self.tower.n_patches

    @property
    def class_positions(self) -> list[int]:
        """Positions of the class tokens: [0], [] without one, [0, 1] with DeiT's distillation token."""
        return list(range(self.tower.n_class))

    @property
    def register_positions(self) -> list[int]:
        """Positions of the register tokens."""
        return list(range(self.tower.n_class, self.n_prefix))

    @property
    def patch_positions(self) -> tuple[int, int]:
        """First patch and the position after the last."""
        return self.n_prefix, self.n_prefix + self.n_patches

    @property
    def policy_tokens(self) -> Literal["cls", "mean"]:
        """What head policies read of the stream: the (first) class token, without one the mean over the patches."""
        return "cls" if self.class_positions else "mean"

    @property
    def policy_positions(self) -> slice:
        """Positions of the tokens that :meth:`policy_input` reads."""
        return slice(0, 1) if self.class_positions else slice(*self.patch_positions)

    def policy_input(self, x_BTD: Tensor) -> Tensor:
        """What head policies read of the stream, (B, D); see :attr:`policy_tokens`."""
        return x_BTD[:, 0] if self.class_positions else x_BTD[:, self.policy_positions].mean(dim=1)

    @property
    def n_classes(self) -> int | None:
        """Outputs of the classifier, or number of prompts instead; None if there is neither."""
        if self.prompts_CE is not None:
            return len(self.prompts_CE)
        return None if self.has_text else int(self.model.num_classes)

    @property
    def has_text(self) -> bool:
        """Whether the model has a text tower."""
        return hasattr(self.model, "encode_text")

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.parameters()).device

    @property
    def decoding_threads(self) -> int:
        """Threads that decode its images: those of torch's operations; beside a GPU every core of the process."""
        return len(os.sched_getaffinity(0)) if self.device.type == "cuda" else torch.get_num_threads()

    def normalize(self, pixels: np.ndarray | Tensor) -> Tensor:
        """uint8 (B, H, W, C) as :meth:`Split.batch` gives it -> the model's input, float32 (B, C, H, W)."""
        x = sent(torch.from_numpy(pixels) if isinstance(pixels, np.ndarray) else pixels, self.device)
        mean, std = mean_and_std(self.preprocess, self.device)
        return (x.permute(0, 3, 1, 2).float() / 255 - mean) / std

    def forward(
        self,
        images: Tensor,
        head_mask: Tensor | None = None,
        policy: BlockPolicy | None = None,
        heads: HeadMode = "masked",
    ) -> Tensor:
        """Class logits (B, classes); image features (B, E) of an open_clip model without prompts.

        Args:
            images: preprocessed, (B, C, H, W).
            head_mask: bool (B, L, H), true where a head is kept.
            policy: decides block by block; not together with ``head_mask``.
            heads: ``masked`` or ``gathered`` (the kept heads only), see :func:`sparsight.backbones.attention.attend`.

        Raises:
            SparsightError: images of another size, a mask of another shape, or heads that cannot be switched.
        """
        if head_mask is not None and policy is not None:
            raise SparsightError("give head_mask or policy, not both")
        if head_mask is not None:
            expected = (len(images), self.n_blocks, self.n_heads)
            if head_mask.shape != expected:
                raise SparsightError(f"head_mask: expected shape {expected}, got {tuple(head_mask.shape)}")
            policy = _Fixed(head_mask)
        x_BTD, _ = self.run_blocks(self.tokens(images), 0, self.n_blocks, policy, heads)
        return self.classify(x_BTD)

    @torch.no_grad()
    def taps(self, images: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """Activations by site from one forward pass: (B, T, D) each, ``embedding`` (B, D).

        ``.attn`` and ``.mlp`` are the sublayer's additions to the residual stream. ``embedding`` is the output of
        the final norm and pooling, which the classifier or the projection reads. The pass stops after the last
        block that is needed.

        Raises:
            SparsightError: a site that does not exist in this model.
        """
        for name in names:
            sites.check(name, self.n_blocks, "sites")
        last = max(self.n_blocks if name == "embedding" else int(name.split(".")[1]) + 1 for name in names)
        x_BTD, shared = self.tokens(images), self.tower.shared()
        activations: dict[str, Tensor] = {}
        for i in range(last):
            parts = self.tower.parts(i)
            attn_BTD = parts.after(parts.attend(parts.before(x_BTD), **shared[i]))
            middle_BTD = x_BTD + attn_BTD
            mlp_BTD = parts.mlp(middle_BTD)
            out_BTD = middle_BTD + mlp_BTD
            by_part = {"input": x_BTD, "attn": attn_BTD, "mlp": mlp_BTD, "output": out_BTD}
            activations |= {
                f"blocks.{i}.{part}": value for part, value in by_part.items() if f"blocks.{i}.{part}" in names
            }
            x_BTD = out_BTD
        if "embedding" in names:
            activations["embedding"] = self.tower.pool(x_BTD)
        return {name: activations[name] for name in names}

    @torch.no_grad()
    def head_outputs(self, images: Tensor, block: int) -> Tensor:
        """Each head's input to the output projection of one block, (B, T, H, C).

        Flattened to (B, T, H C) and projected, they are the block's attention. Later blocks are not run.

        Raises:
            SparsightError: heads that cannot be separated, or no such block.
        """
        sites.check(f"blocks.{block}.attn", self.n_blocks, "head_outputs")
        x_BTD, _ = self.run_blocks(self.tokens(images), 0, block)
        layer = self.switchable(block)
        return attention.head_outputs(layer, self.tower.parts(block).before(x_BTD), **self.tower.shared()[block])

    def tokens(self, images: Tensor) -> Tensor:
        """The residual stream entering block 0, (B, T, D)."""
        if tuple(images.shape[-2:]) != self.tower.image_size:
            raise SparsightError(f"images: expected {self.tower.image_size} pixels, got {tuple(images.shape[-2:])}")
        return self.tower.embed(images)

    def run_blocks(
        self, x_BTD: Tensor, start: int, stop: int, policy: BlockPolicy | None = None, heads: HeadMode = "masked"
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Run blocks ``start`` to ``stop`` - 1: the residual stream after them, and the policy's mask of each block.

        Running the first blocks once and the remaining ones several times gives the same bits as full passes.
        """
        masks: dict[int, Tensor] = {}
        blocks, shared = self.tower.blocks, self.tower.shared()
        for i in range(start, stop):
            keep_BH = None if policy is None else policy.decide(i, self.policy_input(x_BTD))
            if keep_BH is None:
                x_BTD = blocks[i](x_BTD, **shared[i])
                continue
            masks[i] = keep_BH
            parts = self.tower.parts(i)
            kept_BTD = attention.attend(self.switchable(i), parts.before(x_BTD), keep_BH, heads, **shared[i])
            x_BTD = x_BTD + parts.after(kept_BTD)
            x_BTD = x_BTD + self.mlp(i, x_BTD, keep_BH, heads)
        return x_BTD, masks

    def mlp(self, block: int, x_BTD: Tensor, keep_BH: Tensor, heads: HeadMode = "masked") -> Tensor:
        """The addition of a block's MLP to the stream, given that the heads of ``keep_BH`` were kept.

        Raises:
            SparsightError: the MLP is coupled to the heads, but its input maps are unknown or D is no multiple of H.
        """
        parts = self.tower.parts(block)
        if not self.couples_mlp:
            return parts.mlp(x_BTD)
        if not parts.mlp_inputs or self.d_in % self.n_heads:
            kind = type(self.tower.blocks[block]).__name__
            raise SparsightError(f"couple_mlp: the MLP of this {kind} has no input of {self.n_heads} equal parts")
        with attention.narrowed(parts.mlp_inputs, keep_BH, heads):
            return parts.mlp(x_BTD)

    def switchable(self, block: int) -> nn.Module:
        """The attention layer of a block; :class:`SparsightError` if there are several."""
        layer = self.tower.parts(block).attention
        if layer is None:
            kind = type(self.tower.blocks[block]).__name__
            raise SparsightError(f"heads of a {kind} cannot be switched: it has several attention layers")
        return layer

    def classify(self, x_BTD: Tensor) -> Tensor:
        """The output of :meth:`forward`, from the residual stream after the last block."""
        return self._logits(self.tower.head(x_BTD))

    def classify_embedding(self, embedding_BD: Tensor) -> Tensor:
        """The same from ``embedding``, (B, D); :class:`SparsightError` for a distilled DeiT, which needs two tokens."""
        return self._logits(self.tower.read(embedding_BD))

    def _logits(self, features_BE: Tensor) -> Tensor:
        if self.prompts_CE is None:
            return features_BE
        from sparsight.backbones import open_clip

        return open_clip.prompt_logits(self.model, features_BE, self.prompts_CE)

    def features(self, images: Tensor) -> Tensor:
        """Output for images without prompts, (B, E): open_clip's image features, or timm's logits."""
        x_BTD, _ = self.run_blocks(self.tokens(images), 0, self.n_blocks)
        return self.tower.head(x_BTD)

    def encode_image(self, images: Tensor) -> Tensor:
        """open_clip's image features of unit norm, (B, E)."""
        return nn.functional.normalize(self.features(images), dim=-1)

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """open_clip's text features of unit norm, (n, E); :class:`SparsightError` without a text tower."""
        self._need_text()
        from sparsight.backbones import open_clip

        return open_clip.encode_text(self.model, self._own_name, list(texts))

    def use_prompts(self, classes: Sequence[str], templates: Sequence[str]) -> None:
        """Make :meth:`forward` classify by prompts: scaled similarity to the texts of each class (CLIP).

        Args:
            classes: readable class names.
            templates: texts with ``{}`` for the class name; their features are averaged per class.
        """
        self._need_text()
        from sparsight.backbones import open_clip

        self.prompts_CE = open_clip.prompt_classifier(self.model, self._own_name, list(classes), tuple(templates))

    @property
    def _own_name(self) -> str:
        return self.name.partition("/")[2]

    def _need_text(self) -> None:
        if not self.has_text:
            raise SparsightError(f"backbone {self.name!r} has no text tower; use an open_clip/<model>")

    @property
    def blank(self) -> Tensor:
        """One blank image, as input of :meth:`forward`."""
        return torch.zeros(1, self.preprocess.channels, *self.tower.image_size, device=self.device)


@dataclasses.dataclass
class _Fixed:
    """A policy that returns a given mask."""

    mask_BLH: Tensor

    def decide(self, block: int, read_BD: Tensor) -> Tensor:
        return self.mask_BLH[:, block]


def _tower(model: nn.Module) -> Tower:
    if hasattr(model, "visual"):
        from sparsight.backbones.open_clip import tower  # takes seconds to import

        return tower(model)
    return timm_tower(model)
