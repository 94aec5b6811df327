"""Forward passes for the training of a head policy: through the whole model, or through the last block alone.

Shapes: N images of train, B batch, D width (d_in), P blocks with a policy, H heads.
"""

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from sparsight.backbones.backbone import Backbone, BlockPolicy
from sparsight.common.progress import Progress
from sparsight.images.split import Pixels, Split
from sparsight.pruning.head_outputs import HeadOutputs

_STORED = 2**31  # largest total of stored head outputs, in bytes


class Passes(Protocol):
    """What training needs from train and val."""

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation over train of the policy's input at each decided block, (P, D) each."""

    def logits(self, rows: np.ndarray, policy: BlockPolicy) -> Tensor:
        """Class logits (B, classes) of some train images under a policy, with gradients."""

    def on_val(self, policy: BlockPolicy) -> tuple[np.ndarray, np.ndarray]:
        """For every val image, the predicted class and the share of heads kept in the decided blocks."""


class Whole:
    """Runs the whole model every time, for a policy of earlier blocks too or for weights that change."""

    def __init__(self, backbone: Backbone, train: Split, val: Split, blocks: list[int], batch_size: int) -> None:
        self.backbone, self.train, self.val = backbone, train, val
        self.blocks, self.batch_size = blocks, batch_size
        self.pixels = Pixels(train, backbone.preprocess, backbone.decoding_threads)

    @torch.no_grad()
    def statistics(self) -> tuple[Tensor, Tensor]:
        names = [f"blocks.{block}.input" for block in self.blocks]
        total = square = torch.zeros((), dtype=torch.float64)
        for images in _images(self.backbone, self.train, self.batch_size):
            taps = self.backbone.taps(images, names)
            read = torch.stack([self.backbone.policy_input(taps[name]).double() for name in names])
            total, square = total + read.sum(dim=1), square + read.square().sum(dim=1)
        mean = total / len(self.train)
        variance = (square / len(self.train) - mean.square()).clamp(min=1e-12)
        return mean.float(), variance.sqrt().float()

    def logits(self, rows: np.ndarray, policy: BlockPolicy) -> Tensor:
        return self.backbone(self.backbone.normalize(self.pixels[rows]), policy=policy)

    @torch.no_grad()
    def on_val(self, policy: BlockPolicy) -> tuple[np.ndarray, np.ndarray]:
        predicted, usage = [], []
        for images in _images(self.backbone, self.val, 4 * self.batch_size):
            tokens = self.backbone.tokens(images)
            x_BTD, masks = self.backbone.run_blocks(tokens, 0, self.backbone.n_blocks, policy, "gathered")
            predicted.append(self.backbone.classify(x_BTD).argmax(dim=1).cpu().numpy())
            usage.append(torch.stack(list(masks.values()), dim=1).float().mean(dim=(1, 2)).cpu().numpy())
        return np.concatenate(predicted), np.concatenate(usage)


class AtLastBlock:
    """Runs the model once and stores the head outputs, for a policy of the last block on a frozen model."""

    def __init__(self, backbone: Backbone, train: Split, val: Split, batch_size: int) -> None:
        self.block = backbone.n_blocks - 1
        self.train, self.val = (_at_last_block(backbone, split, batch_size) for split in (train, val))

    @staticmethod
    def fits(backbone: Backbone, n_images: int) -> bool:
        """Whether the stored outputs are small enough, as is usual if the classifier reads only the class token."""
        numbers = n_images * backbone.tower.n_read * backbone.d_in * (backbone.n_heads + 1)
        return numbers * torch.float32.itemsize <= _STORED

    def statistics(self) -> tuple[Tensor, Tensor]:
        read_ND = self.train.read_ND.double()
        variance = read_ND.var(dim=0, correction=0).clamp(min=1e-12)
        return read_ND.mean(dim=0)[None].float(), variance.sqrt()[None].float()

    def logits(self, rows: np.ndarray, policy: BlockPolicy) -> Tensor:
        images = self.train[torch.from_numpy(rows).to(self.train.x_NRD.device)]
        keep_BH = policy.decide(self.block, images.read_ND)
        assert keep_BH is not None
        return images.logits(keep_BH)

    @torch.no_grad()
    def on_val(self, policy: BlockPolicy) -> tuple[np.ndarray, np.ndarray]:
        keep_NH = policy.decide(self.block, self.val.read_ND)
        assert keep_NH is not None
        predicted_N = self.val.logits(keep_NH).argmax(dim=1)
        return predicted_N.cpu().numpy(), keep_NH.float().mean(dim=1).cpu().numpy()


def _images(backbone: Backbone, split: Split, batch_size: int) -> Iterator[Tensor]:
    for pixels in split.batches(backbone.preprocess, batch_size, backbone.decoding_threads):
        yield backbone.normalize(pixels)


@torch.no_grad()
def _at_last_block(backbone: Backbone, split: Split, batch_size: int) -> HeadOutputs:
    batches = []
    with Progress(len(split), "images") as progress:
        for images in _images(backbone, split, batch_size):
            x_BTD, _ = backbone.run_blocks(backbone.tokens(images), 0, backbone.n_blocks - 1)
            batches.append(HeadOutputs.of(backbone, x_BTD))
            progress(len(images))
    return HeadOutputs.cat(batches)
