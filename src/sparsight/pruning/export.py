"""A model with only the chosen heads: smaller weights that plain timm loads and runs.

Shapes: D width (d_in), H heads, C channels of a head, K kept heads.
"""

import copy
import re
import statistics
import time
from typing import Any

import torch
from safetensors.torch import save_file
from timm.layers import Attention
from torch import Tensor, nn

from sparsight.backbones.backbone import Backbone
from sparsight.common.errors import SparsightError
from sparsight.common.files import write_json
from sparsight.common.progress import log
from sparsight.common.work import Work

_BATCH, _ROUNDS = 64, 15


def parse(text: str, backbone: Backbone) -> dict[int, list[int]]:
    """Heads to keep by block, from a name such as ``b4-h0-h1_b5-h2-h5``. Other blocks keep all heads.

    Raises:
        SparsightError: a malformed name, a block or head that the model does not have, or one that is named twice.
    """
    heads_by_block: dict[int, list[int]] = {}
    for part in text.split("_"):
        if not re.fullmatch(r"b\d+(-h\d+)+", part):
            raise SparsightError(f"heads {text!r}: expected b<block>-h<head>-h<head>..., e.g. b4-h0_b5-h2-h5")
        block, *heads = (int(number) for number in re.findall(r"\d+", part))
        if block >= backbone.n_blocks or max(heads) >= backbone.n_heads:
            raise SparsightError(
                f"heads {text!r}: {part} is out of range; the model has blocks 0 to {backbone.n_blocks - 1} of heads "
                f"0 to {backbone.n_heads - 1}"
            )
        if block in heads_by_block or len(set(heads)) < len(heads):
            raise SparsightError(f"heads {text!r}: {part} names a block or a head twice")
        heads_by_block[block] = sorted(heads)
    return heads_by_block


def export(backbone: Backbone, about: dict[str, Any], heads: dict[int, list[int]], work: Work) -> None:
    """Write ``model.safetensors`` and ``config.json`` (how timm loads it, docs/pruning.md) to ``work.out``.

    The weights are the backbone's, without the rows of qkv and the columns of proj of the other heads. So the logits
    are those of masking. The largest difference and the milliseconds of both ways are logged.

    Args:
        backbone: a timm model.
        about: its config.json.
        heads: heads to keep, by block.

    Raises:
        SparsightError: a model that timm could not load with fewer heads.
    """
    pruned = without_other_heads(backbone, heads)
    save_file({name: value.contiguous() for name, value in pruned.state_dict().items()}, work.out / "model.safetensors")
    masked_ms, pruned_ms, difference = _compare(backbone, pruned, heads)
    write_json(
        work.out / "config.json",
        {
            "format_version": 1,
            "model": about["model"].removeprefix("timm/"),
            "architecture": {**about["architecture"], "num_classes": backbone.n_classes},
            "classes": about["classes"],
            "preprocess": about["preprocess"],
            "heads_kept": {str(block): kept for block, kept in heads.items()},
            "max_abs_logit_difference": difference,
        },
    )
    n_bytes = [sum(4 * p.numel() for p in model.parameters()) for model in (backbone.model, pruned)]
    log(
        f"{n_bytes[1] / 1e6:.2f} MB of {n_bytes[0] / 1e6:.2f} MB; {pruned_ms:.2f} ms a batch of {_BATCH}, masked "
        f"{masked_ms:.2f} ms; logits differ by at most {difference:.1e}"
    )


@torch.no_grad()
def without_other_heads(backbone: Backbone, heads: dict[int, list[int]]) -> nn.Module:
    """A copy of the timm model whose attention layers have only the heads to keep, by block."""
    model: Any = copy.deepcopy(backbone.model)
    for block, kept in heads.items():
        old: Any = backbone.tower.parts(block).attention
        if type(old) is not Attention or old.gate is not None or not isinstance(old.norm, nn.Identity):
            raise SparsightError(
                f"block {block}: heads of {type(old).__name__} cannot be taken out for timm; it must be timm's plain "
                "Attention, without gate or norm over all heads"
            )
        new = Attention(
            old.qkv.in_features, len(kept), attn_head_dim=old.head_dim, qkv_bias=old.qkv.bias is not None,
            proj_bias=old.proj.bias is not None,
        )  # fmt: skip
        new.q_norm, new.k_norm = copy.deepcopy(old.q_norm), copy.deepcopy(old.k_norm)
        new.qkv.weight.copy_(_rows(old.qkv.weight, old.num_heads, kept))
        new.proj.weight.copy_(old.proj.weight.unflatten(1, (old.num_heads, -1))[:, kept].flatten(1))
        if old.qkv.bias is not None:
            new.qkv.bias.copy_(_rows(old.qkv.bias, old.num_heads, kept))
        if old.proj.bias is not None:
            new.proj.bias.copy_(old.proj.bias)
        model.blocks[block].attn = new.to(old.qkv.weight)
    return model.eval()


def _rows(qkv: Tensor, n_heads: int, kept: list[int]) -> Tensor:
    """From rows (3 H C, ...) of queries, keys and values to those of the kept heads, (3 K C, ...)."""
    return qkv.unflatten(0, (3, n_heads, -1))[:, kept].flatten(0, 2)


@torch.no_grad()
def _compare(backbone: Backbone, pruned: nn.Module, heads: dict[int, list[int]]) -> tuple[float, float, float]:
    """Median milliseconds per batch, masked and pruned in turns, and the largest difference of their logits."""
    size = (_BATCH, backbone.preprocess.channels, *backbone.preprocess.size)
    images = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(backbone.device)
    mask = torch.ones(_BATCH, backbone.n_blocks, backbone.n_heads, dtype=torch.bool, device=backbone.device)
    for block, kept in heads.items():
        mask[:, block] = False
        mask[:, block, kept] = True
    seconds: list[list[float]] = [[], []]
    for _ in range(_ROUNDS):
        outputs = []
        for way, model in enumerate((lambda: backbone(images, head_mask=mask), lambda: pruned(images))):
            begin = time.perf_counter()
            outputs.append(model().cpu())
            seconds[way].append(1000 * (time.perf_counter() - begin))
    masked, reduced = outputs
    difference = float((masked - reduced).abs().max())
    assert difference <= 1e-3 * float(masked.abs().max()), "the exported model is not the masked one"
    return statistics.median(seconds[0]), statistics.median(seconds[1]), difference
