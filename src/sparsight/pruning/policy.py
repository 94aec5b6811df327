"""The head policy of AdaViT (Meng et al., CVPR 2022): per block, which heads an image uses.

Shapes: B batch, D width (d_in), P blocks with a policy, H heads.
"""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sparsight.backbones.backbone import Backbone
from sparsight.common.errors import SparsightError, reason
from sparsight.common.files import write_json
from sparsight.common.modules import Module

FORMAT_VERSION = 1
_BACKBONE = "backbone."  # prefix of the names of fine-tuned weights


class HeadPolicy(Module):
    """A linear map of :meth:`Backbone.policy_input` at each block's input to one logit per head; logit > 0 keeps it.

    AdaViT decides in every block but the first, which always runs whole.

    Args:
        d_in: D.
        n_heads: H.
        blocks: the P blocks whose heads it decides.
    """

    def __init__(self, d_in: int, n_heads: int, blocks: list[int]) -> None:
        super().__init__()
        self.blocks = blocks
        self.couples_mlp = False
        """Whether it was trained with MLPs coupled to the heads: :attr:`Backbone.couples_mlp`."""
        self.finetuned: dict[str, Tensor] = {}
        """Weights of the backbone's model if they were trained with the policy; empty for a frozen backbone."""
        self.weight = nn.Parameter(torch.zeros(len(blocks), n_heads, d_in))
        self.bias = nn.Parameter(torch.ones(len(blocks), n_heads))

    def check(self, backbone: Backbone) -> None:
        """Raise SparsightError if the policy is for another model, with another width, number of heads or of blocks."""
        _, n_heads, d_in = self.weight.shape
        expected, actual = (d_in, n_heads, self.blocks[-1] + 1), (backbone.d_in, backbone.n_heads, backbone.n_blocks)
        if expected != actual:
            sizes = [f"width {d}, {h} heads, {n} blocks" for d, h, n in (expected, actual)]
            raise SparsightError(f"the head policy is for another model ({sizes[0]}) than this one ({sizes[1]})")

    def logits(self, block: int, read_BD: Tensor) -> Tensor:
        """Head logits (B, H) of one block."""
        d_in = self.weight.shape[2]
        if read_BD.shape[1] != d_in:
            raise SparsightError(f"the head policy is for a model of width {d_in}, not {read_BD.shape[1]}")
        p = self.blocks.index(block)
        return read_BD @ self.weight[p].T + self.bias[p]

    def decide(self, block: int, read_BD: Tensor) -> Tensor | None:
        """Bool (B, H); None for a block without a policy."""
        return self.logits(block, read_BD) > 0 if block in self.blocks else None

    def own(self, backbone: Backbone) -> Backbone:
        """The model that the policy was trained with, derived from ``backbone``, which is not changed.

        It has the fine-tuned weights, if there are any. Its MLPs are coupled to the heads if they were in training.
        """
        adapted = copy.deepcopy(backbone) if self.finetuned else copy.copy(backbone)
        adapted.couples_mlp = self.couples_mlp
        if self.finetuned:
            adapted.model.load_state_dict(self.finetuned)
        return adapted

    def save(self, folder: Path, **about: Any) -> None:
        """Write ``policy.safetensors`` (weight (P, H, D), bias (P, H), ``backbone.*``) and ``config.json``."""
        tensors = self.state_dict() | {f"{_BACKBONE}{name}": value for name, value in self.finetuned.items()}
        tensors = {name: value.clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}
        save_file(tensors, folder / "policy.safetensors")
        _, n_heads, d_in = self.weight.shape
        config = {**about, "format_version": FORMAT_VERSION, "blocks": self.blocks, "n_heads": n_heads, "d_in": d_in}
        write_json(folder / "config.json", {**config, "couples_mlp": self.couples_mlp})

    @classmethod
    def load(cls, folder: Path) -> "HeadPolicy":
        """The policy that :meth:`save` wrote.

        Raises:
            SparsightError: no policy in the folder, or one of another format version.
        """
        try:
            config = json.loads((folder / "config.json").read_text())
        except OSError as error:
            raise SparsightError(f"{folder}: no head policy here ({reason(error)}: config.json)") from None
        if config.get("format_version") != FORMAT_VERSION:
            raise SparsightError(f"{folder}: format_version {config.get('format_version')}, expected {FORMAT_VERSION}")
        policy = cls(config["d_in"], config["n_heads"], config["blocks"])
        policy.couples_mlp = config["couples_mlp"]
        tensors = load_file(folder / "policy.safetensors")
        policy.finetuned = {
            name.removeprefix(_BACKBONE): tensors.pop(name) for name in list(tensors) if name.startswith(_BACKBONE)
        }
        policy.load_state_dict(tensors)
        return policy.requires_grad_(False)


@dataclass(frozen=True)
class FixedMask:
    """A policy with given masks, the same in every block."""

    keep_BH: Tensor

    def decide(self, block: int, read_BD: Tensor) -> Tensor:
        """Bool (B, H)."""
        return self.keep_BH
