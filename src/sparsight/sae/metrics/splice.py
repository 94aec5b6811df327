"""Splicing: the cost of replacing activations by reconstructions inside the model.

Shapes: B batch, T tokens, D width (d_in), N rows = B x tokens of a group, C classes.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from sparsight.backbones.backbone import Backbone
from sparsight.common import sites
from sparsight.common.intervals import paired, wilson
from sparsight.common.progress import followed
from sparsight.common.slices import row_slices
from sparsight.images.split import Split

_IMAGES = 125


class Replacement(Protocol):
    """Computes the replacement for the activations at a site."""

    def __call__(self, m: int, group: str, h: Tensor, before: Tensor | None) -> Tensor:
        """The replacement (N, D) for the rows of a token group at site number ``m``.

        Args:
            m: number of the site.
            group: ``cls``, ``registers`` or ``patches``.
            h: the rows that arrive at the site, (N, D), changed by the replacements at earlier sites.
            before: the replacement for the group at the previous site; None at the first.
        """


Clean = Sequence[Mapping[str, Tensor]]
"""For each site, the rows (N, D) of each token group in a pass without replacements."""


@dataclasses.dataclass(frozen=True)
class Spliced:
    """Predictions of the model with replaced activations."""

    right: dict[str, np.ndarray]
    """Whether each labelled image is classified correctly, bool (labelled images,), by mode and for ``untouched``.
    Empty if nothing could be replaced."""
    changed: dict[str, np.ndarray]
    """Whether each image is classified differently than untouched, bool (n images,), by mode."""
    kl: dict[str, float]
    """Mean KL(untouched || replaced) of the predictions in nats, by mode."""

    def metrics(self, names: Mapping[str, str]) -> dict[str, float]:
        """Metrics of some modes.

        Args:
            names: by mode, the name that it gets in the metrics.

        Returns:
            ``accuracy_untouched``; per name ``accuracy_<name>`` with 95 % interval ``_lo`` and ``_hi``, the paired
            difference ``<name>_delta`` with ``_lo`` and ``_hi``, and ``kl_<name>``. Without labels, ``kl_<name>`` and
            ``changed_<name>`` with ``_lo`` and ``_hi``: the share of images that are classified differently. Empty if
            nothing could be replaced.
        """
        if not self.right:
            return {}
        untouched = self.right["untouched"]
        if not len(untouched):
            return {key: value for mode, name in names.items() for key, value in self._effects(mode, name).items()}
        result = {"accuracy_untouched": float(untouched.mean())}
        for mode, name in names.items():
            interval = wilson(self.right[mode])
            result |= {f"accuracy_{name}": interval["accuracy"]}
            result |= {f"accuracy_{name}_{end}": interval[end] for end in ("lo", "hi")}
            result |= {f"{name}_{key}": value for key, value in paired(self.right[mode], untouched).items()}
            result[f"kl_{name}"] = self.kl[mode]
        return result

    def _effects(self, mode: str, name: str) -> dict[str, float]:
        share = wilson(self.changed[mode])
        ends = {f"changed_{name}_{end}": share[end] for end in ("lo", "hi")}
        return {f"changed_{name}": share["accuracy"], **ends, f"kl_{name}": self.kl[mode]}


@torch.no_grad()
def spliced(
    backbone: Backbone, split: Split, names: Sequence[str], positions: Mapping[str, Sequence[int]],
    modes: Mapping[str, Callable[[Clean], Replacement]], n_images: int | None = None, fixed: Collection[str] = (),
) -> Spliced:  # fmt: skip
    """Predictions of a model with replaced activations, and without.

    Nothing is replaced without positions or without a classifier. All sites must be in the residual stream
    (blocks.<i>.input or .output), which is all that later blocks read; otherwise nothing is replaced either.

    Args:
        backbone: the model.
        split: the images.
        names: sites in the order of the model.
        positions: positions of each token group whose activations are replaced, along the model's token axis.
        modes: by name, a function from the clean activations of a batch to the replacement.
        n_images: use the first images alone, at most so many; None takes all.
        fixed: modes whose replacements do not depend on ``h`` and ``before``, but for their shapes. If every token is
            replaced, what they do before the last site changes nothing, so the model runs from there alone.
    """
    n_images = len(split) if n_images is None else min(n_images, len(split))
    windows, labels = list(row_slices(n_images, _IMAGES)), split.labels[:n_images]
    places = [sites.parse(name) for name in names]
    if not positions or not backbone.n_classes or any(part not in ("input", "output") for _, part in places):
        return Spliced({}, {}, {})
    starts = [int(block or 0) + (part == "output") for block, part in places]
    positions = {group: list(tokens) for group, tokens in positions.items()}
    answers: dict[str, list[Tensor]] = {name: [] for name in ("untouched", *modes)}
    kl: dict[str, Tensor | float] = dict.fromkeys(modes, 0.0)

    def forward(x_BTD: Tensor, replace: Replacement | None, first: int = 0) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """Run the model from site number ``first`` on: logits (B, C), and the rows that arrived at each site."""
        block, arrived, before = starts[first], [], dict.fromkeys(positions)
        for m, start in enumerate(starts[first:], first):
            x_BTD, _ = backbone.run_blocks(x_BTD, block, start)
            block = start
            arrived.append({group: x_BTD[:, tokens].flatten(0, 1) for group, tokens in positions.items()})
            if replace is not None:
                x_BTD = x_BTD.clone()
                for group, tokens in positions.items():
                    before[group] = value = replace(m, group, arrived[-1][group], before[group])
                    x_BTD[:, tokens] = value.unflatten(0, (len(x_BTD), -1))
        return backbone.classify(backbone.run_blocks(x_BTD, block, backbone.n_blocks)[0]), arrived

    batches = split.stream(windows, backbone.preprocess, backbone.decoding_threads)
    for pixels in followed(batches, len(windows), "batches"):
        tokens_BTD = backbone.tokens(backbone.normalize(pixels))
        x_BTD, _ = backbone.run_blocks(tokens_BTD, 0, starts[0])  # once for all modes
        whole = sum(map(len, positions.values())) == x_BTD.shape[1]
        logits, clean = forward(x_BTD, None)
        answers["untouched"].append(logits.argmax(dim=1))
        for name, mode in modes.items():
            changed, _ = forward(x_BTD, mode(clean), len(starts) - 1 if whole and name in fixed else 0)
            answers[name].append(changed.argmax(dim=1))
            log_p, log_q = logits.double().log_softmax(dim=1), changed.double().log_softmax(dim=1)
            kl[name] = kl[name] + (log_p.exp() * (log_p - log_q)).sum()
    predicted = {name: torch.cat(blocks).cpu().numpy() for name, blocks in answers.items()}
    right = {name: (classes == labels)[labels >= 0] for name, classes in predicted.items()}
    different = {name: predicted[name] != predicted["untouched"] for name in modes}
    return Spliced(right, different, {name: float(total) / n_images for name, total in kl.items()})
