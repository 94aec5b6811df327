"""Multiply-accumulates of a backbone for one image: of a single head, and of everything else."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from sparsight.backbones.attention_layers import read_layer
from sparsight.backbones.backbone import Backbone


def of_head(backbone: Backbone) -> int:
    """Cost of one head of one block: queries, keys, values, scores, projection, and its MLP channels if coupled.

    Raises:
        SparsightError: heads that cannot be separated.
    """
    tokens = backbone.n_prefix + backbone.n_patches
    return _channels(backbone) * tokens * (_linear_width(backbone) + 2 * tokens)


def outside_heads(backbone: Backbone) -> int:
    """Cost that remains if all heads are off, counted on a forward pass."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        backbone(backbone.blank)
    products = sum(
        flops for name, flops in counter.get_flop_counts()["Global"].items() if "scaled_dot" not in str(name)
    )
    heads, tokens = backbone.n_blocks * backbone.n_heads, backbone.n_prefix + backbone.n_patches
    return products // 2 - heads * _channels(backbone) * tokens * _linear_width(backbone)


def of_mlp(backbone: Backbone, block: int) -> int:
    """Cost of a block's MLP that remains if all heads are off."""
    parts, tokens = backbone.tower.parts(block), backbone.n_prefix + backbone.n_patches
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        parts.mlp(torch.zeros(1, tokens, backbone.d_in, device=backbone.device))
    coupled = parts.mlp_inputs if backbone.couples_mlp else ()
    return counter.get_total_flops() // 2 - sum(tokens * linear.weight.numel() for linear in coupled)


def _channels(backbone: Backbone) -> int:
    """C, the channels of a head."""
    layer = read_layer(backbone.switchable(0), **backbone.tower.shared()[0])
    return layer.proj.in_features // backbone.n_heads


def _linear_width(backbone: Backbone) -> int:
    """Number of weights of the linear maps per channel of a head."""
    coupled = backbone.tower.parts(0).mlp_inputs if backbone.couples_mlp else ()
    return 4 * backbone.d_in + sum(linear.out_features for linear in coupled)
