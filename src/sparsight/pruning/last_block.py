"""Inputs of the last block for a split, and predictions under head masks of that block.

A mask of the H heads is written as one number, its code: bit h is set if head h is kept. If it is cheap, the
predictions under all 2^H masks are tabulated at once (:mod:`sparsight.pruning.head_outputs`), and any strategy is a
look-up. Otherwise (many heads, or a classifier that pools over all tokens) only the requested masks are run, each once
per image.

Shapes: N images, B batch, P images of a batch, T tokens, D width (d_in), L blocks, H heads, M masks, S rows of a table.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from sparsight.backbones.attention import FixedPatches, HeadMode
from sparsight.backbones.backbone import Backbone
from sparsight.common.devices import sent
from sparsight.common.progress import Progress
from sparsight.images.split import Split
from sparsight.pruning.head_outputs import HeadOutputs, affordable
from sparsight.pruning.latent_effects import Edit
from sparsight.pruning.masks import pack, unpack
from sparsight.pruning.policy import FixedMask, HeadPolicy

_KEPT = 2**30  # bytes of a split's residual stream that are kept for later rows; a larger stream is computed again


@dataclass(frozen=True)
class LastBlockInputs:
    """Inputs of the last block for every image of a split, after the policy has pruned the earlier blocks."""

    labels: np.ndarray
    """(N,) the true classes."""
    read_ND: Tensor
    """What the policy reads at the last block's input: the class token, or the mean over the patches."""
    logits_NH: Tensor
    """The policy's head logits for the last block."""
    before: np.ndarray
    """bool (N, L - 1, H), heads kept in the earlier blocks (the first is always whole)."""
    skipped: np.ndarray
    """(N,) classes predicted without the last block."""
    table: np.ndarray | None
    """(N, M) classes predicted under every mask, by code; None if only requested masks are run."""
    runs: "_BlockRunner"

    @property
    def tabulated(self) -> bool:
        """Whether :meth:`predict` is a look-up."""
        return self.table is not None

    def predict(self, codes_SN: np.ndarray) -> np.ndarray:
        """Predicted classes (S, N) under masks."""
        if self.table is None:
            return self.runs.masked(codes_SN)
        return np.take_along_axis(self.table, codes_SN.T, axis=1).T

    def predict_edited(
        self, codes_SN: np.ndarray, edits_S: list[Edit], wanted_S: Sequence[np.ndarray | None] = ()
    ) -> np.ndarray:
        """Predicted classes (S, N) under masks, with edits in the stream of what the policy reads at the block's input.

        An edit of the mean over patches is added to every patch. Images that an edit leaves as they are, which are most
        images if it is of another class, are looked up if there is a table.

        Args:
            wanted_S: bool (N,), the images that are asked for, None for all; what others get says nothing.
        """
        every = np.ones(len(self), bool)
        wanted = [torch.from_numpy(every if mask is None else mask) for mask in wanted_S or [None] * len(edits_S)]
        if self.table is None:
            return self.runs.edited(codes_SN, edits_S, wanted)
        changed_S = [edit.images.cpu() & mask for edit, mask in zip(edits_S, wanted, strict=True)]
        predicted_SN, runs_SN = self.predict(codes_SN), self.runs.edited(codes_SN, edits_S, changed_S)
        return np.where(torch.stack(changed_S).numpy(), runs_SN, predicted_SN)

    @property
    def n_heads(self) -> int:
        """H."""
        return int(self.logits_NH.shape[1])

    @property
    def unsteered(self) -> np.ndarray:
        """(N,) codes of the unsteered policy's masks."""
        return pack(self.logits_NH > 0)

    def __len__(self) -> int:
        return len(self.labels)


@torch.no_grad()
def last_block_inputs(
    backbone: Backbone, policy: HeadPolicy, split: Split, batch_size: int, n_parallel: int = 1
) -> LastBlockInputs:
    """Run the pruned model on a split up to its last block, and tabulate that block if this is cheap.

    Args:
        n_parallel: edits of a batch that later run through the last block at the same time; no result depends on it.
    """
    last, tabulated = backbone.n_blocks - 1, affordable(backbone)
    read, kept, skipped, table = [], [], [], []
    with Progress(len(split), "images") as progress:
        for x_BTD, before in _prefixes(backbone, policy, split, batch_size):
            whole = torch.ones(len(x_BTD), backbone.n_heads, dtype=torch.bool, device=x_BTD.device)
            kept.append(torch.stack([before.get(block, whole) for block in range(last)], dim=1).cpu().numpy())
            read.append(backbone.policy_input(x_BTD))
            skipped.append(backbone.classify(x_BTD).argmax(dim=1).cpu().numpy())
            if tabulated:
                predictions = [logits.argmax(dim=2) for logits in HeadOutputs.of(backbone, x_BTD).every()]
                table.append(torch.cat(predictions, dim=1).to(torch.int32).cpu().numpy())
            progress(len(x_BTD))
    read_ND = torch.cat(read)
    # Coupled MLPs are narrowed in the model itself, so only one pass can run at a time.
    n_parallel = 1 if backbone.couples_mlp else n_parallel
    runs = _BlockRunner(backbone, policy, split, batch_size, ThreadPoolExecutor(n_parallel))
    return LastBlockInputs(
        split.labels, read_ND, policy.logits(last, read_ND), np.concatenate(kept), np.concatenate(skipped),
        np.concatenate(table) if tabulated else None, runs,
    )  # fmt: skip


@dataclass
class _BlockRunner:
    """Predicts by running the last block."""

    backbone: Backbone
    policy: HeadPolicy
    split: Split
    batch_size: int
    pool: ThreadPoolExecutor

    @torch.no_grad()
    def masked(self, codes_SN: np.ndarray) -> np.ndarray:
        """Predicted classes (S, N). The block runs once per image and distinct mask."""
        predicted_SN = np.empty_like(codes_SN)
        for window, x_BTD in self._windows():
            codes_SB = codes_SN[:, window]
            images = np.broadcast_to(np.arange(len(x_BTD)), codes_SB.shape)
            H = self.backbone.n_heads
            pairs, inverse = np.unique(images * 2**H + codes_SB, return_inverse=True)
            predictions = []
            for start in range(0, len(pairs), self.batch_size):
                part = pairs[start : start + self.batch_size]
                rows = sent(torch.from_numpy(part // 2**H), x_BTD.device)
                predictions.append(self._last(x_BTD[rows], part % 2**H, "gathered"))
            predicted_SN[:, window] = np.concatenate(predictions)[inverse].reshape(codes_SB.shape)
        return predicted_SN

    @torch.no_grad()
    def edited(self, codes_SN: np.ndarray, edits_S: list[Edit], changed_S: list[Tensor]) -> np.ndarray:
        """Predicted classes (S, N). The block runs once per row and image of ``changed_S``, bool (N,); others get -1.

        If edits and classifier leave the patches alone, their keys and values are computed once for all rows.
        """
        predicted_SN = np.full_like(codes_SN, -1)
        for window, x_BTD in self._windows():
            fixed = self._fixed_patches(x_BTD)

            def run(s: int, window: slice = window, x_BTD: Tensor = x_BTD, fixed: FixedPatches | None = fixed) -> None:
                images = changed_S[s][window].nonzero().squeeze(1)
                if len(images):
                    edit_PD = edits_S[s].of(sent(images + window.start, x_BTD.device))
                    codes_P = codes_SN[s, window][images.numpy()]
                    predicted = self._edited(x_BTD, fixed, images, codes_P, edit_PD)
                    predicted_SN[s, window][images.numpy()] = predicted

            list(self.pool.map(run, range(len(edits_S))))
        return predicted_SN

    def _fixed_patches(self, x_BTD: Tensor) -> FixedPatches | None:
        """Keys and values of the tokens that neither an edit changes nor the classifier reads; None without such."""
        backbone, last = self.backbone, self.backbone.n_blocks - 1
        parts, n_read = backbone.tower.parts(last), backbone.tower.n_read
        if not backbone.class_positions or n_read > backbone.n_prefix:
            return None
        assert parts.attention is not None, "the policy has decided heads of this block's kind"
        return FixedPatches(parts.attention, parts.before(x_BTD), n_read, **backbone.tower.shared()[last])

    @torch.no_grad()  # needed in each thread
    def _edited(
        self, x_BTD: Tensor, fixed: FixedPatches | None, images_P: Tensor, codes_P: np.ndarray, edit_PD: Tensor
    ) -> np.ndarray:
        """Predicted classes (P,) of some images of a batch with edits."""
        backbone, last = self.backbone, self.backbone.n_blocks - 1
        images_P = sent(images_P, x_BTD.device)
        n_tokens = x_BTD.shape[1] if fixed is None else fixed.n_read
        x_PTD = x_BTD[images_P, :n_tokens]
        x_PTD[:, backbone.policy_positions] += edit_PD[:, None]
        if fixed is None:
            return self._last(x_PTD, codes_P, "masked")
        parts = backbone.tower.parts(last)
        keep_PH = sent(torch.from_numpy(unpack(codes_P, backbone.n_heads)), x_BTD.device)
        x_PTD = x_PTD + parts.after(fixed.attend(parts.before(x_PTD), images_P, keep_PH))
        x_PTD = x_PTD + backbone.mlp(last, x_PTD, keep_PH)
        return backbone.classify(x_PTD).argmax(dim=1).cpu().numpy()

    def _windows(self) -> Iterator[tuple[slice, Tensor]]:
        numbers = len(self.split) * (self.backbone.n_prefix + self.backbone.n_patches) * self.backbone.d_in
        small = numbers * torch.float32.itemsize <= _KEPT
        start = 0
        for x_BTD in self._kept if small else self._streams():
            yield slice(start, start + len(x_BTD)), x_BTD
            start += len(x_BTD)

    @cached_property
    def _kept(self) -> list[Tensor]:
        return list(self._streams())

    def _streams(self) -> Iterator[Tensor]:
        return (x_BTD for x_BTD, _ in _prefixes(self.backbone, self.policy, self.split, self.batch_size))

    def _last(self, x_BTD: Tensor, codes_B: np.ndarray, heads: HeadMode) -> np.ndarray:
        last = self.backbone.n_blocks - 1
        keep = FixedMask(sent(torch.from_numpy(unpack(codes_B, self.backbone.n_heads)), x_BTD.device))
        out_BTD, _ = self.backbone.run_blocks(x_BTD, last, last + 1, keep, heads)
        return self.backbone.classify(out_BTD).argmax(dim=1).cpu().numpy()


def _prefixes(
    backbone: Backbone, policy: HeadPolicy, split: Split, batch_size: int
) -> Iterator[tuple[Tensor, dict[int, Tensor]]]:
    """Per batch, the residual stream at the last block's input, and the masks of the earlier blocks."""
    for pixels in split.batches(backbone.preprocess, batch_size, backbone.decoding_threads):
        tokens = backbone.tokens(backbone.normalize(pixels))
        yield backbone.run_blocks(tokens, 0, backbone.n_blocks - 1, policy, "gathered")
