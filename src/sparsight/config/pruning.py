"""Head policies, and the evaluation of steered head pruning."""

from dataclasses import dataclass
from typing import Literal, get_args

from sparsight.common.errors import SparsightError
from sparsight.config.bounds import Count, NotNegative, Positive, PositiveShare, Share
from sparsight.config.checks import Section, only_if, rising
from sparsight.config.compute import n_microbatches

Strategy = Literal[
    "none", "reconstruct", "uniform", "sample-top", "class-latents", "class-latents-in-stream", "targeted",
    "latent-atlas", "random-latents", "random-sae", "logit-bias", "logit-bias-matched", "class-threshold",
    "class-static", "skip-block", "zero-heads", "all-heads",
]  # fmt: skip

CHOOSING: tuple[Strategy, ...] = (
    "sample-top", "class-latents", "class-latents-in-stream", "targeted", "random-latents", "random-sae",
    "logit-bias-matched",
)  # fmt: skip
"""Strategies that choose a number of latents."""
AMPLIFYING: tuple[Strategy, ...] = (*CHOOSING, "uniform", "latent-atlas")
"""Strategies that have a row for each of ``strengths``."""


@dataclass(frozen=True)
class Policy(Section):
    """A head policy and its training."""

    backbone: str
    """Name of the backbone whose heads the policy switches."""
    blocks: Literal["all", "last"] = "all"
    """Blocks whose heads the policy switches: ``all`` but the first, as in AdaViT, or only the ``last``."""
    target: PositiveShare = 0.6
    """Share of heads to keep on average in these blocks."""
    couple_mlp: bool = False
    """Whether switching off a head also removes its channels from the input of the block's MLP, as in AdaViT's
    released models."""
    usage_weight: NotNegative = 2.0
    """Weight of the usage loss relative to the cross-entropy."""
    temperature: Positive = 5.0
    """Temperature of the Gumbel-sigmoid relaxation."""
    noise: Literal["gumbel", "none"] = "gumbel"
    """How training decides: with Gumbel noise on the head logits, as in AdaViT, or without noise, as in evaluation."""
    epochs: Count = 10
    """Passes over the train split."""
    batch_size: Count = 64
    """Images per step."""
    lr: Positive = 1e-2
    """Peak learning rate of Adam: linear warm-up over the first tenth of training, then cosine decay to 0."""
    backbone_lr: Positive | None = None
    """Peak learning rate for the backbone's weights, which are then fine-tuned with the policy, as in AdaViT, and
    saved in the policy's file. null freezes them."""

    @property
    def at_last_block(self) -> bool:
        """Whether the input of the last block is all that training needs of an image."""
        return self.blocks == "last" and self.backbone_lr is None

    @property
    def cores(self) -> int:
        """Number of CPU cores that training can use, one per micro-batch that passes the whole model.

        One if training needs only the last block's input. One also if MLPs are coupled, because coupling narrows
        the MLPs of the model itself, which only one pass at a time can do.
        """
        return 1 if self.at_last_block or self.couple_mlp else n_microbatches(self.batch_size)


@dataclass(frozen=True)
class Pruning(Section):
    """Evaluation of steered head policies; null if there are none."""

    steering: str
    """Name of the steering section (of kind class-latents) whose SAEs steer the head policies. Their latents are ranked
    again, by mean difference in the pruned model."""
    strategies: tuple[Strategy, ...] = get_args(Strategy)
    """Rows of the tables (docs/pruning.md); must include ``none``."""
    strengths: tuple[NotNegative, ...] = (1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 100.0)
    """Factors on the amplified latents, for strategies that amplify."""
    latents: tuple[Count, ...] = (1, 5, 10, 20)
    """Numbers of latents to amplify, for strategies that choose latents. Validation picks strength and number."""
    bias_strengths: tuple[NotNegative, ...] = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 100.0)
    """Factors on the class's mean shift of the head logits, for ``logit-bias``."""
    tolerance: Share = 0.01
    """Largest accepted loss of val accuracy. The accepted option with the least last-block usage is chosen."""
    margin: PositiveShare = 0.02
    """Non-inferiority margin for test accuracy: the one-sided 95 % upper bound of the loss must be below it."""
    batch_size: Count = 125
    """Images per forward pass."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if "none" not in self.strategies:
            raise SparsightError("strategies: 'none' must be among them; every other row is compared with it")
        rising(self, "strengths", "bias_strengths", "latents")
        chosen = set(self.strategies)
        only_if(bool(chosen & {*AMPLIFYING}), "a strategy that amplifies latents", self, "strengths")
        only_if(bool(chosen & {*CHOOSING}), "a strategy that chooses latents", self, "latents")
        only_if("logit-bias" in chosen, "the strategy logit-bias", self, "bias_strengths")
