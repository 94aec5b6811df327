"""Training of the head policy, on a frozen backbone or together with its weights.

The loss is AdaViT's, with two changes that the docs list as ours. The policy's input is centred and scaled, because its
large constant part would make the policy nearly the same for every image; this is folded into the saved weights. The
usage loss is about the evaluated (thresholded) usage, because the sampled usage differs from it.

Shapes: B batch, D width (d_in), P blocks with a policy, H heads.
"""

import dataclasses
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsight import config
from sparsight.backbones.backbone import Backbone
from sparsight.common.devices import sent
from sparsight.common.errors import SparsightError
from sparsight.common.progress import log
from sparsight.common.seeds import derive_seed
from sparsight.common.work import Work
from sparsight.images.labels import need_labels, needs
from sparsight.images.manifest import Manifest
from sparsight.images.split import Split
from sparsight.pruning.policy import FixedMask, HeadPolicy
from sparsight.pruning.policy_inputs import AtLastBlock, Passes, Whole
from sparsight.training import loop, schedules
from sparsight.training.batches import RowNumbers
from sparsight.training.microbatches import MicroBatches


def fit(
    section: config.Policy, backbone: Backbone, manifest: Manifest, name: str, seed: int, work: Work, n_parallel: int,
    record: dict[str, Any],
) -> None:  # fmt: skip
    """Write ``policy.safetensors``, ``config.json`` and ``training.jsonl`` to ``work.out``.

    Args:
        n_parallel: micro-batches that train at the same time (:mod:`sparsight.training.microbatches`); no result
            depends on it.

    Raises:
        SparsightError: images without labels, or a backbone whose heads cannot be switched.
    """
    need_labels(manifest, needs(f"policies.{name}", section))
    finetuned = section.backbone_lr is not None
    backbone.requires_grad_(finetuned)
    train, val = manifest.split("train"), manifest.split("val")
    last = backbone.n_blocks - 1
    blocks = [last] if section.blocks == "last" else list(range(1, last + 1))
    policy = HeadPolicy(backbone.d_in, backbone.n_heads, blocks).to(backbone.device)
    policy.couples_mlp = section.couple_mlp
    backbone = policy.own(backbone)
    _check_heads(backbone, blocks, name)
    passes: Passes
    if section.at_last_block and AtLastBlock.fits(backbone, len(train) + len(val)):
        log("only the last block is decided: every image passes the blocks before it once")
        passes = AtLastBlock(backbone, train, val, section.batch_size)
    else:
        passes = Whole(backbone, train, val, blocks, section.batch_size)
    trainable = _Training(section, policy, backbone, passes, train, val, MicroBatches(min(n_parallel, section.cores)))
    seed = derive_seed(seed, "policy", name)
    batches, log_path = RowNumbers(len(train), section.batch_size, seed), work.out / "training.jsonl"
    loop.train(trainable, batches, section.epochs, seed, work.state, log_path)
    folded = trainable.folded()
    if finetuned:
        folded.finetuned = backbone.model.state_dict()
    metadata = {"name": name, "backbone": section.backbone, "training": dataclasses.asdict(section), "record": record}
    folded.save(work.out, **metadata)


@torch.no_grad()
def _check_heads(backbone: Backbone, blocks: list[int], name: str) -> None:
    """Check, before any work, that the heads of every decided block can be left uncomputed."""
    x_BTD = torch.zeros(1, backbone.n_prefix + backbone.n_patches, backbone.d_in, device=backbone.device)
    keep = torch.ones(1, backbone.n_heads, dtype=torch.bool, device=backbone.device)
    for block in blocks:
        try:
            backbone.run_blocks(x_BTD, block, block + 1, FixedMask(keep), "gathered")
        except SparsightError as error:
            raise SparsightError(f"policies.{name}: block {block}: {error}") from None


class _Training:
    """See :class:`sparsight.training.loop.Trainable`."""

    def __init__(
        self, section: config.Policy, policy: HeadPolicy, backbone: Backbone, passes: Passes, train: Split, val: Split,
        parts: MicroBatches,
    ) -> None:  # fmt: skip
        self.section, self.policy, self.backbone, self.passes, self.parts = section, policy, backbone, passes, parts
        self.train_labels, self.val_labels = train.labels, val.labels
        self.mean_PD, self.std_PD = passes.statistics()
        self.trained = nn.ModuleDict({"policy": policy})
        groups = [{"params": list(policy.parameters()), "peak": section.lr}]
        if section.backbone_lr is not None:
            self.trained["backbone"] = backbone
            groups.append({"params": list(backbone.parameters()), "peak": section.backbone_lr})
        self.optimizer = torch.optim.Adam(groups, fused=True)

    def step(self, rows: np.ndarray, number: int, total: int, generator: torch.Generator) -> dict[str, Tensor]:
        section = self.section
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * schedules.warmup_cosine(number, total)
        noise_BPH = self._noise(len(rows), generator)
        n_heads = noise_BPH[0].numel()

        def forward(places_B: Tensor) -> Tensor:
            """Class logits of some images of the batch, and each head's evaluated and sampled mask."""
            sampled = _Sampled(self, noise_BPH[places_B])
            whole = len(places_B) == len(rows)  # always on a GPU, whose places the host would have to wait for
            logits_BC = self.passes.logits(rows if whole else rows[places_B.numpy()], sampled)
            return torch.cat([logits_BC, *sampled.evaluated, *sampled.sampled], dim=1)

        def loss(outputs: Tensor) -> dict[str, Tensor]:
            logits_BC, evaluated, sampled = outputs.tensor_split([-2 * n_heads, -n_heads], dim=1)
            labels_B = sent(torch.from_numpy(self.train_labels[rows]).long(), logits_BC.device)
            cross_entropy, usage = F.cross_entropy(logits_BC, labels_B), evaluated.mean()
            return {
                "loss": cross_entropy + section.usage_weight * (usage - section.target).square(),
                "cross_entropy": cross_entropy,
                "usage_evaluated": usage,
                "usage_sampled": sampled.mean(),
            }

        places_B = torch.arange(len(rows), device=noise_BPH.device)
        scalars = self.parts.backward(forward, places_B, loss, self.trained.parameters())
        self.optimizer.step()
        return scalars

    def _noise(self, n_images: int, generator: torch.Generator) -> Tensor:
        """Noise (B, P, H): the difference of two Gumbel variables, which is logistic, or zero."""
        like_PH = self.policy.bias
        if self.section.noise == "none":
            return like_PH.new_zeros(n_images, *like_PH.shape)
        u_PBH = torch.rand(len(like_PH), n_images, like_PH.shape[1], generator=generator).clamp(1e-6, 1 - 1e-6)
        return sent((torch.log(u_PBH) - torch.log1p(-u_PBH)).transpose(0, 1), like_PH.device)

    def check(self) -> None:
        """Nothing: a loss that is not finite is one of the scalars."""

    def epoch_end(self) -> dict[str, float]:
        predicted, usage = self.passes.on_val(self.folded())
        accuracy = float((predicted == self.val_labels).mean())
        return {"val_accuracy": accuracy, "val_usage_policy_blocks": float(usage.mean())}

    def state(self) -> dict[str, Tensor]:
        return loop.module_state(self.trained) | loop.optimizer_state(self.optimizer)

    def restore(self, state: dict[str, Tensor]) -> None:
        loop.restore_module(self.trained, state)
        loop.restore_optimizer(self.optimizer, state)

    @torch.no_grad()
    def folded(self) -> HeadPolicy:
        """The policy on what it reads, unscaled: w.(x - mean)/std + b = (w/std).x + (b - (w/std).mean)."""
        raw = HeadPolicy(self.backbone.d_in, self.backbone.n_heads, self.policy.blocks).to(self.mean_PD.device)
        raw.couples_mlp = self.policy.couples_mlp
        weight = self.policy.weight / self.std_PD[:, None]
        raw.weight.copy_(weight)
        raw.bias.copy_(self.policy.bias - torch.einsum("phd,pd->ph", weight, self.mean_PD))
        return raw.requires_grad_(False)


class _Sampled:
    """The policy in training: straight-through samples (Gumbel-sigmoid) on standardised inputs.

    Args:
        training: the training that it belongs to.
        noise_BPH: noise of the images of its forward pass.
    """

    def __init__(self, training: _Training, noise_BPH: Tensor) -> None:
        self.training, self.noise_BPH = training, noise_BPH
        self.sampled: list[Tensor] = []
        self.evaluated: list[Tensor] = []
        """Masks (B, H) per decided block: ``sampled`` as used, without gradients; ``evaluated`` as in evaluation."""

    def decide(self, block: int, read_BD: Tensor) -> Tensor | None:
        policy, tau = self.training.policy, self.training.section.temperature
        if block not in policy.blocks:
            return None
        p = policy.blocks.index(block)
        logits = policy.logits(block, (read_BD - self.training.mean_PD[p]) / self.training.std_PD[p])
        mask = _straight_through(torch.sigmoid((logits + self.noise_BPH[:, p]) / tau))
        self.sampled.append(mask.detach())
        self.evaluated.append(_straight_through(torch.sigmoid(logits / tau)))
        return mask


def _straight_through(soft: Tensor) -> Tensor:
    """0 or 1 forward, the gradient of ``soft`` backward."""
    return (soft > 0.5).to(soft.dtype) + soft - soft.detach()
