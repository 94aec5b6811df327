"""Reconstructions put in place of activations inside the model: what they cost.

Shapes: B batch, T tokens, D width (d_in), N rows = B x tokens of a group, C classes.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from sparsight.backbones.backbone import Backbone
from sparsight.common import sites
from sparsight.common.intervals import paired, wilson
from sparsight.images.split import Split

_IMAGES = 125


class Replacement(Protocol):
    """What is put in place of the activation at one site."""

    def __call__(self, m: int, group: str, h: Tensor, before: Tensor | None) -> Tensor:
        """Rows (N, D) for those of a token group at site number ``m``.

        Args:
            m: which site.
            group: ``cls``, ``registers`` or ``patches``.
            h: what arrives there, (N, D), changed by the replacements at earlier sites.
            before: what this returned for the group at the site before; None at the first.
        """


Clean = Sequence[Mapping[str, Tensor]]
"""Per site the rows (N, D) of each token group in a pass without replacements."""


@dataclasses.dataclass(frozen=True)
class Spliced:
    """What the model answers with activations replaced."""

    right: dict[str, np.ndarray]
    """On which images, bool (N,), by mode, and ``untouched``; empty where nothing could be replaced."""
    kl: dict[str, float]
    """Mean KL(untouched || replaced) of the predictions in nats, by mode."""

    def metrics(self, names: Mapping[str, str]) -> dict[str, float]:
        """The numbers of modes, by the name that each shall have.

        Returns:
            ``accuracy_untouched``; per name ``accuracy_<name>`` with 95 % interval ``_lo`` and ``_hi``, the paired
            difference ``<name>_delta`` with ``_lo`` and ``_hi``, and ``kl_<name>``. Nothing where nothing could be
            replaced.
        """
        if not self.right:
            return {}
        untouched = self.right["untouched"]
        found = {"accuracy_untouched": float(untouched.mean())}
        for mode, name in names.items():
            interval = wilson(self.right[mode])
            found |= {f"accuracy_{name}": interval["accuracy"]}
            found |= {f"accuracy_{name}_{end}": interval[end] for end in ("lo", "hi")}
            found |= {f"{name}_{key}": value for key, value in paired(self.right[mode], untouched).items()}
            found[f"kl_{name}"] = self.kl[mode]
        return found


@torch.no_grad()
def spliced(
    backbone: Backbone, split: Split, names: Sequence[str], positions: Mapping[str, Sequence[int]],
    modes: Mapping[str, Callable[[Clean], Replacement]],
) -> Spliced:  # fmt: skip
    """What a model answers with activations replaced, and without.

    Args:
        split: the images.
        names: sites in the order of the model.
        positions: positions of each token group whose activations are replaced, along the model's token axis.
        modes: by name, from the clean activations of a batch to the replacement.

    Nothing is replaced without positions or a classifier, and where a site is not the residual stream
    (blocks.<i>.input or .output), which is all that later blocks read.
    """
    places = [sites.parse(name) for name in names]
    if not positions or not backbone.n_classes or any(part not in ("input", "output") for _, part in places):
        return Spliced({}, {})
    starts = [int(block or 0) + (part == "output") for block, part in places]
    positions = {group: list(at) for group, at in positions.items()}
    hits: dict[str, list[np.ndarray]] = {name: [] for name in ("untouched", *modes)}
    kl = dict.fromkeys(modes, 0.0)
    labels = iter(np.split(split.labels, range(_IMAGES, len(split), _IMAGES)))

    def forward(x_BTD: Tensor, replace: Replacement | None) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """From the first site on: logits (B, C), and what arrived at each site."""
        done, seen, before = starts[0], [], dict.fromkeys(positions)
        for m, start in enumerate(starts):
            x_BTD, _ = backbone.run_blocks(x_BTD, done, start)
            done = start
            seen.append({group: x_BTD[:, at].flatten(0, 1) for group, at in positions.items()})
            if replace is not None:
                x_BTD = x_BTD.clone()
                for group, at in positions.items():
                    before[group] = value = replace(m, group, seen[m][group], before[group])
                    x_BTD[:, at] = value.unflatten(0, (len(x_BTD), -1))
        return backbone.classify(backbone.run_blocks(x_BTD, done, backbone.n_blocks)[0]), seen

    for pixels in split.batches(backbone.preprocess, _IMAGES, torch.get_num_threads()):
        tokens_BTD, truth = backbone.tokens(backbone.normalize(pixels)), next(labels)
        x_BTD, _ = backbone.run_blocks(tokens_BTD, 0, starts[0])  # once, whatever is put in place afterwards
        logits, clean = forward(x_BTD, None)
        hits["untouched"].append(logits.argmax(dim=1).cpu().numpy() == truth)
        for name, mode in modes.items():
            changed, _ = forward(x_BTD, mode(clean))
            hits[name].append(changed.argmax(dim=1).cpu().numpy() == truth)
            log_p, log_q = logits.double().log_softmax(dim=1), changed.double().log_softmax(dim=1)
            kl[name] += float((log_p.exp() * (log_p - log_q)).sum())
    right = {name: np.concatenate(blocks) for name, blocks in hits.items()}
    return Spliced(right, {name: total / len(split) for name, total in kl.items()})
