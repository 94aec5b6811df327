"""The last block head by head: class logits as a function of the mask of its heads.

The class logits depend on a mask only through the sum of the kept heads' projected outputs. So each head is computed
and projected once per image. After that, a mask costs a sum and the MLP, for only the tokens that the classifier reads.

Shapes: N images, B batch, T tokens, R tokens that the classifier reads, D width (d_in), H heads, C channels of a head,
M masks.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sparsight.backbones import attention
from sparsight.backbones.attention_layers import read_layer
from sparsight.backbones.backbone import Backbone
from sparsight.pruning.masks import unpack

_AFFORDABLE = 64  # largest cost of a table of all masks, in passes through the last block per image


def affordable(backbone: Backbone) -> bool:
    """Whether a table of all masks costs no more than ``_AFFORDABLE`` passes through the last block."""
    share = backbone.tower.n_read / (backbone.n_prefix + backbone.n_patches)
    return bool(2**backbone.n_heads * share <= _AFFORDABLE)


@dataclass(frozen=True)
class HeadOutputs:
    """Outputs of every head of the last block for a set of images."""

    backbone: Backbone
    x_NRD: Tensor
    """The residual stream at the block's input, at the tokens that the classifier reads."""
    projected_HNRD: Tensor
    """What each head adds to the stream, without the projection's bias."""

    @classmethod
    @torch.no_grad()
    def of(cls, backbone: Backbone, x_BTD: Tensor) -> "HeadOutputs":
        """Compute from the whole stream at the block's input."""
        last, R, H = backbone.n_blocks - 1, backbone.tower.n_read, backbone.n_heads
        parts, shared = backbone.tower.parts(last), backbone.tower.shared()[last]
        assert parts.attention is not None, "the policy has decided heads of this block's kind"
        proj = read_layer(parts.attention, **shared).proj
        out_BRHC = attention.head_outputs(parts.attention, parts.before(x_BTD), R, **shared)
        projected = [out @ w.T for out, w in zip(out_BRHC.unbind(2), proj.weight.chunk(H, 1), strict=True)]
        return cls(backbone, x_BTD[:, :R].clone(), torch.stack(projected))

    @classmethod
    def cat(cls, several: list["HeadOutputs"]) -> "HeadOutputs":
        """Concatenate batches."""
        x_NRD = torch.cat([batch.x_NRD for batch in several])
        return cls(several[0].backbone, x_NRD, torch.cat([batch.projected_HNRD for batch in several], dim=1))

    def __len__(self) -> int:
        return len(self.x_NRD)

    def __getitem__(self, rows: Tensor | slice) -> "HeadOutputs":
        return HeadOutputs(self.backbone, self.x_NRD[rows], self.projected_HNRD[:, rows])

    @property
    def read_ND(self) -> Tensor:
        """What a head policy reads at the block's input."""
        return self.backbone.policy_input(self.x_NRD)

    def logits(self, keep_NH: Tensor) -> Tensor:
        """Class logits (N, classes) under a mask per image; a float mask gets gradients."""
        attn_NRD = torch.einsum("nh,hnrd->nrd", keep_NH.to(self.x_NRD), self.projected_HNRD)
        return self._finish(attn_NRD[None], keep_NH[None])[:, 0]

    @torch.no_grad()
    def every(self) -> Iterator[Tensor]:
        """Class logits (N, M, classes) under all 2^H masks, in the order of their codes, some masks at a time."""
        H, T = len(self.projected_HNRD), self.backbone.n_prefix + self.backbone.n_patches
        masks_MH = torch.from_numpy(unpack(np.arange(2**H), H)).to(self.x_NRD)
        for masks in masks_MH.split(max(1, T // self.x_NRD.shape[1])):  # at most as many rows as the whole stream
            keep_MNH = masks[:, None].expand(-1, len(self), -1)
            yield self._finish(torch.tensordot(masks, self.projected_HNRD, 1), keep_MNH)

    def _finish(self, attn_MNRD: Tensor, keep_MNH: Tensor) -> Tensor:
        """Class logits (N, M, classes) from the sums of head outputs."""
        last, tower = self.backbone.n_blocks - 1, self.backbone.tower
        parts = tower.parts(last)
        assert parts.attention is not None
        bias = read_layer(parts.attention, **tower.shared()[last]).proj.bias
        middle = self.x_NRD + parts.after(attn_MNRD if bias is None else attn_MNRD + bias)
        middle = middle.flatten(0, 1)
        out = middle + self.backbone.mlp(last, middle, keep_MNH.flatten(0, 1))
        return self.backbone.classify(out).unflatten(0, attn_MNRD.shape[:2]).transpose(0, 1)
