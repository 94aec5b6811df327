"""The structure of each family of Vision Transformers, under common names.

A :class:`Tower` defines how images become tokens, which blocks follow, and how the output is read. A
:class:`BlockParts` defines how one block adds its attention and its MLP to the residual stream. A new family needs
one class and one line in a table.

Shapes: B batch, T tokens (class tokens first, then registers, then patches), D width, E outputs.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from timm.models.beit import Beit
from timm.models.beit import Block as BeitBlock
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block, ParallelThingsBlock, ResPostBlock, VisionTransformer
from torch import Tensor, nn

from sparsight.common.errors import SparsightError

Branch = Callable[..., Tensor]


@dataclass(frozen=True)
class BlockParts:
    """A block: ``y = x + after(attend(before(x)))``, then ``y + mlp(y)``, bit for bit as its own forward."""

    before: Branch
    """The norm before attention, or the identity (post-norm)."""
    attend: Branch
    """Attention as the block calls it, with x and the arguments of :meth:`Tower.shared`."""
    attention: nn.Module | None
    """The layer behind ``attend``, whose heads may be switched; None if there are several."""
    after: Branch
    """Everything between attention and the residual stream: layer scale, norm (post-norm), drop path."""
    mlp: Branch
    """The whole MLP branch."""
    mlp_inputs: tuple[nn.Linear, ...] = ()
    """The MLP's linear maps that read the normalised stream; () if they are unknown."""


class Tower:
    """A timm VisionTransformer: plain, DeiT (also distilled), DINOv2, SigLIP, CLIP towers; base of the others."""

    def __init__(self, model: Any) -> None:
        self.model = model
        for block in self.blocks:
            block_parts(block)

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks in order."""
        return list(self.model.blocks)

    def parts(self, block: int) -> BlockParts:
        """The parts of one block."""
        return block_parts(self.blocks[block])

    @property
    def d_in(self) -> int:
        """D, the width of the residual stream."""
        return int(self.model.embed_dim)

    @property
    def n_class(self) -> int:
        """Number of class tokens: 0, 1, or 2 (the class and the distillation token of a distilled DeiT)."""
        return sum(getattr(self.model, name, None) is not None for name in ("cls_token", "dist_token"))

    @property
    def n_prefix(self) -> int:
        """Class and register tokens in front of the patches."""
        return int(self.model.num_prefix_tokens)

    @property
    def n_patches(self) -> int:
        """Patches of one image."""
        return int(self.model.patch_embed.num_patches)

    @property
    def n_read(self) -> int:
        """Number of leading tokens that :meth:`head` reads: the class tokens, or every token if it pools."""
        return self.n_class if self.model.global_pool == "token" else self.n_prefix + self.n_patches

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the input."""
        height, width = self.model.patch_embed.img_size
        return int(height), int(width)

    @property
    def classifier(self) -> nn.Linear | None:
        """The layer that maps the embedding to class logits, if it is one linear layer."""
        head = self.model.head
        return head if isinstance(head, nn.Linear) and self.n_class < 2 else None

    def embed(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) -> the residual stream entering block 0, (B, T, D)."""
        model = self.model
        return model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))

    def shared(self) -> list[dict[str, Tensor]]:
        """Per block, its arguments other than the stream: rotary embedding, position bias, or nothing."""
        return [{}] * len(self.model.blocks)

    def pool(self, x_BTD: Tensor) -> Tensor:
        """The stream after the last block -> input of the classifier or projection, (B, D)."""
        return self.model.forward_head(self.model.norm(x_BTD), pre_logits=True)

    def read(self, pooled_BD: Tensor) -> Tensor:
        """The output of :meth:`pool` -> the model's output, (B, E)."""
        if self.n_class == 2:
            raise SparsightError("a distilled DeiT reads two class tokens: its embedding alone cannot be classified")
        return self.model.head(pooled_BD)

    def head(self, x_BTD: Tensor) -> Tensor:
        """The stream after the last block -> the model's output, (B, E)."""
        return self.model.forward_head(self.model.norm(x_BTD))


class EvaTower(Tower):
    """timm's Eva class: EVA, EVA02, DINOv3, Perception Encoder, ViTs with rotary positions."""

    def embed(self, images: Tensor) -> Tensor:
        model = self.model
        return model.norm_pre(model._pos_embed(model.patch_embed(images))[0])

    def shared(self) -> list[dict[str, Tensor]]:
        model = self.model
        if model.rope is None:
            return super().shared()
        rope = model.rope.get_embed(shape=model.patch_embed.grid_size)
        return [{"rope": rope[i] if model.rope_mixed else rope} for i in range(len(model.blocks))]


class BeitTower(Tower):
    """timm's BEiT and BEiTv2: relative position biases, per block or shared."""

    def embed(self, images: Tensor) -> Tensor:
        model = self.model
        x = model.patch_embed(images)
        x = torch.cat((model.cls_token.expand(len(x), -1, -1), x), dim=1)
        return model.pos_drop(x if model.pos_embed is None else x + model.pos_embed)

    def shared(self) -> list[dict[str, Tensor]]:
        if self.model.rel_pos_bias is None:
            return super().shared()
        return [{"shared_rel_pos_bias": self.model.rel_pos_bias()}] * len(self.model.blocks)


TOWERS: dict[type[nn.Module], type[Tower]] = {
    VisionTransformer: Tower,
    VisionTransformerDistilled: Tower,
    Eva: EvaTower,
    Beit: BeitTower,
}


def timm_tower(model: nn.Module) -> Tower:
    """The tower of a timm model.

    Raises:
        SparsightError: an unsupported class; also a subclass, which may compute something else.
    """
    kind = TOWERS.get(type(model))
    if kind is None:
        known = ", ".join(cls.__name__ for cls in TOWERS)
        raise SparsightError(f"taps need a timm VisionTransformer or a relative ({known}), not {type(model).__name__}")
    return kind(model)


def block_parts(block: Any) -> BlockParts:
    """The parts of one block.

    Raises:
        SparsightError: a block that does not add attention and MLP one after the other.
    """
    reader = _BLOCKS.get(f"{type(block).__module__}.{type(block).__qualname__}")
    if reader is None:
        known = ", ".join(name.rpartition(".")[2] for name in _BLOCKS)
        raise SparsightError(f"taps need blocks that add attention, then MLP ({known}), not {type(block).__name__}")
    return reader(block)


def _plain(block: Any) -> BlockParts:
    return BlockParts(
        block.norm1,
        block.attn,
        block.attn,
        lambda x: block.drop_path1(block.ls1(x)),
        lambda x: block.drop_path2(block.ls2(block.mlp(block.norm2(x)))),
        _mlp_inputs(block.mlp),
    )


def _post_norm(block: Any) -> BlockParts:
    return BlockParts(
        nn.Identity(),
        block.attn,
        block.attn,
        lambda x: block.drop_path1(block.norm1(x)),
        lambda x: block.drop_path2(block.norm2(block.mlp(x))),
        _mlp_inputs(block.mlp),
    )


def _scaled(block: Any) -> BlockParts:
    """EVA and BEiT: layer scale as a bare parameter."""

    def scale(gamma: Tensor | None, x: Tensor) -> Tensor:
        return x if gamma is None else gamma * x

    return BlockParts(
        block.norm1,
        block.attn,
        block.attn,
        lambda x: block.drop_path1(scale(block.gamma_1, x)),
        lambda x: block.drop_path2(scale(block.gamma_2, block.mlp(block.norm2(x)))),
        _mlp_inputs(block.mlp),
    )


def _several(block: Any) -> BlockParts:
    """Several attentions side by side, then several MLPs (arXiv 2203.09795)."""

    def total(branches: Iterable[nn.Module], x: Tensor) -> Tensor:
        return torch.stack([branch(x) for branch in branches]).sum(dim=0)

    return BlockParts(
        nn.Identity(), lambda x: total(block.attns, x), None, nn.Identity(), lambda x: total(block.ffns, x)
    )


def _open_clip(block: Any) -> BlockParts:
    return BlockParts(
        block.ln_1,
        block.attention,
        block.attn,
        block.ls_1,
        lambda x: block.ls_2(block.mlp(block.ln_2(x))),
        _mlp_inputs(block.mlp),
    )


def _open_clip_custom(block: Any) -> BlockParts:
    return BlockParts(
        block.ln_1,
        block.attn,
        block.attn,
        lambda x: block.ls_1(block.ln_attn(x)),
        lambda x: block.ls_2(block.mlp(block.ln_2(x))),
        _mlp_inputs(block.mlp),
    )


def _mlp_inputs(mlp: nn.Module) -> tuple[nn.Linear, ...]:
    """The MLP's input maps, by the names that timm and open_clip give them."""
    layers = [getattr(mlp, name, None) for name in ("fc1", "fc1_g", "fc1_x", "c_fc")]
    return tuple(layer for layer in layers if isinstance(layer, nn.Linear))


_BLOCKS: dict[str, Callable[[Any], BlockParts]] = {
    f"{cls.__module__}.{cls.__qualname__}": reader
    for cls, reader in (
        (Block, _plain),
        (ResPostBlock, _post_norm),
        (ParallelThingsBlock, _several),
        (EvaBlock, _scaled),
        (EvaBlockPostNorm, _post_norm),
        (BeitBlock, _scaled),
    )
} | {  # by name: importing open_clip takes seconds
    "open_clip.transformer.ResidualAttentionBlock": _open_clip,
    "open_clip.transformer.CustomResidualAttentionBlock": _open_clip_custom,
}
