"""Head policies, and the evaluation of steered head pruning."""

from dataclasses import dataclass
from typing import Literal, get_args

from sparsight.common.errors import SparsightError
from sparsight.config.checks import not_negative, positive, rising
from sparsight.config.compute import n_microbatches

Strategy = Literal[
    "none", "reconstruct", "uniform", "sample-top", "class-latents", "class-latents-in-stream", "targeted",
    "latent-atlas", "random-latents", "random-sae", "logit-bias", "logit-bias-matched", "class-threshold",
    "class-static", "skip-block", "zero-heads", "all-heads",
]  # fmt: skip


@dataclass(frozen=True)
class Policy:
    """A head policy and its training."""

    backbone: str
    """Name of the backbone whose heads it switches."""
    blocks: Literal["all", "last"] = "all"
    """Which it decides: ``all`` but the first, as AdaViT, or the ``last`` alone."""
    target: float = 0.6
    """Share of heads to keep on average in the blocks that it decides, above 0, at most 1."""
    couple_mlp: bool = False
    """A head that is off also takes its channels from the input of the block's MLP, as in AdaViT's released models."""
    usage_weight: float = 2.0
    """Weight of the usage loss against the cross-entropy."""
    temperature: float = 5.0
    """Temperature of the Gumbel-sigmoid relaxation."""
    noise: Literal["gumbel", "none"] = "gumbel"
    """Training decides with Gumbel noise on the head logits, as AdaViT, or as evaluation does, straight through."""
    epochs: int = 10
    """Passes over the train split."""
    batch_size: int = 64
    """Images a step."""
    lr: float = 1e-2
    """Peak learning rate of Adam; cosine to 0."""
    backbone_lr: float | None = None
    """The same for the backbone's weights, which are then fine-tuned with the policy, as in AdaViT, and kept in its
    file; null freezes them."""

    def __post_init__(self) -> None:
        if not 0 < self.target <= 1:
            raise SparsightError(f"target: must lie above 0 and at most at 1, got {self.target}")
        positive(
            self,
            "temperature",
            "epochs",
            "batch_size",
            "lr",
            *(["backbone_lr"] if self.backbone_lr is not None else []),
        )
        not_negative(self, "usage_weight")

    @property
    def at_last_block(self) -> bool:
        """Whether training needs no more of an image than what enters the last block."""
        return self.blocks == "last" and self.backbone_lr is None

    @property
    def cores(self) -> int:
        """That training can use: parts of a batch side by side, where they pass the whole model.

        One where MLPs are coupled: they are narrowed in the model itself, which one pass at a time can have.
        """
        return 1 if self.at_last_block or self.couple_mlp else n_microbatches(self.batch_size)


@dataclass(frozen=True)
class Pruning:
    """The evaluation of steered head policies; null where there are none."""

    steering: str
    """Name of the steering section (of kind class-latents) whose SAEs steer the head policies."""
    strategies: tuple[Strategy, ...] = get_args(Strategy)
    """Rows of the tables (docs/pruning.md); ``none`` is always among them."""
    strengths: tuple[float, ...] = (1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 100.0)
    """Factors on the amplified latents."""
    latents: tuple[int, ...] = (1, 5, 10, 20)
    """How many are amplified, where a strategy chooses some. Validation picks strength and number."""
    bias_strengths: tuple[float, ...] = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 100.0)
    """Factors on the class's mean shift of the head logits, for logit-bias."""
    tolerance: float = 0.01
    """Accuracy on val that a row may cost before it is refused; the least last-block usage then wins."""
    margin: float = 0.02
    """Accuracy on test that may be lost without being inferior: the one-sided 95 % bound of the loss must be less."""
    batch_size: int = 125
    """Images a forward pass."""

    def __post_init__(self) -> None:
        if "none" not in self.strategies:
            raise SparsightError("strategies: 'none' must be among them; every other row is compared with it")
        rising(self, "strengths", "bias_strengths", "latents")
        positive(self, "batch_size", "margin")
        not_negative(self, "tolerance")
        if self.latents[0] < 1:
            raise SparsightError(f"latents: at least one is amplified; got {list(self.latents)}")
