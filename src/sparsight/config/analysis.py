"""Sections of the analysis: SAEs, steering, pruning, report."""

import itertools
from dataclasses import dataclass
from typing import Any, Literal, get_args

from sparsight import sae, sites
from sparsight.config.checks import not_negative, positive, rising
from sparsight.config.inputs import parts_of
from sparsight.errors import SparsightError

Strategy = Literal[
    "none", "reconstruct", "uniform", "sample-top", "class-latents", "class-latents-in-stream", "targeted",
    "latent-atlas", "random-latents", "random-sae", "logit-bias", "logit-bias-matched", "class-threshold",
    "class-static", "skip-block", "zero-heads", "all-heads",
]  # fmt: skip


@dataclass(frozen=True)
class Sae:
    """A sparse autoencoder and its training, once per seed."""

    backbone: str
    """Name of the backbone whose activations it explains."""
    site: str | None = None
    """One of activations.sites: an SAE of its own. Either this or ``sites``."""
    sites: tuple[str, ...] = ()
    """Two or more of activations.sites, in the order of the model: a ReSAE chain, one SAE per site (docs/sae.md)."""
    affine: Literal["full", "diagonal", "identity", "zero"] = "full"
    """Only for ``sites``: the map that predicts a site from the one before, whose residual the SAE there learns. The
    controls: a diagonal map, none but the shift of the mean, or nothing at all (``zero``: plain SAEs)."""
    ridge: float = 1e-3
    """Only for ``sites``: weight of ||A||^2 in the fit of the maps, in mean eigenvalues of the earlier site's
    covariance."""
    kind: str = "topk"
    """The variant: a file of src/sparsight/sae."""
    d_sae: int = 768
    """Number of latents."""
    k: int = 16
    """Active latents per activation."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One SAE is trained per seed, named <name>-s<seed>."""
    epochs: int = 50
    """Passes over the stored train split."""
    batch_size: int = 256
    """Activations a step."""
    memory_mb: int = 1024
    """Memory for activations while training, in MB. A store that fits is shuffled as a whole in every epoch,
    a larger one in pools of half this size."""
    lr: float | None = None
    """Peak learning rate of Adam on activations scaled to unit variance, linear decay over the last fifth;
    null takes 2e-4 / sqrt(d_sae / 2^14)."""
    aux_k: int = 64
    """Dead latents that the AuxK loss revives at a time; 0 turns it off."""
    aux_coefficient: float = 1 / 32
    """Weight of the AuxK loss."""
    dead_after: int = 20_000
    """Activations without firing after which a latent counts as dead in training."""
    bf16: bool = False
    """Run the forward products of training in bfloat16; weights stay fp32."""
    prototype_weight: float = 0.0
    """PASS: weight of the squared distance of codes to the mean code of their class (arXiv 2506.01247: 0.8). More than
    0 uses the labels of the train split."""
    experts: int | None = None
    """Only for kind ``switch``: number of experts. Width-matched with a TopK SAE at the same d_sae; compute-matched
    at d_sae times experts."""
    prefixes: tuple[float, ...] | None = None
    """Only for kind ``matryoshka``: shares of d_sae that must reconstruct alone, rising to 1."""

    @property
    def places(self) -> tuple[str, ...]:
        """The site, or the sites of the chain."""
        return self.sites if self.site is None else (self.site,)

    def options(self) -> dict[str, Any]:
        """What ``sae.create`` takes beside sizes and seed."""
        names = ("aux_k", "aux_coefficient", "experts", "prefixes")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def __post_init__(self) -> None:
        if self.kind not in sae.names():
            raise SparsightError(f"kind: there is no SAE {self.kind!r}; known: {', '.join(sae.names())}")
        if (self.site is None) == (not self.sites):
            raise SparsightError("site: give either site (one SAE) or sites (a ReSAE chain)")
        _check_chain(self.sites)
        if self.site is not None and (self.affine, self.ridge) != ("full", 1e-3):
            raise SparsightError("affine: only a chain has maps (affine, ridge); give sites, or leave it out")
        positive(self, "d_sae", "k", "epochs", "batch_size", "memory_mb", *(["lr"] if self.lr is not None else []))
        not_negative(self, "ridge", "prototype_weight")
        for option, kind in (("experts", "switch"), ("prefixes", "matryoshka")):
            if getattr(self, option) is not None and self.kind != kind:
                raise SparsightError(f"{option}: only kind {kind} has it, not {self.kind}; leave it out")
        if self.k > self.d_sae:
            raise SparsightError(
                f"k: {self.k} active latents are more than d_sae = {self.d_sae}; lower k or raise d_sae"
            )
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise SparsightError("seeds: name at least one seed, each once")


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
        return 1 if self.at_last_block or self.couple_mlp else parts_of(self.batch_size)


@dataclass(frozen=True)
class Steering:
    """Edits along an SAE's latents at its site, beside their controls."""

    sae: str
    """Name of the SAE section whose latents steer, every seed of it: of the class token, in the residual stream."""
    kind: Literal["class-latents", "vs2", "vs2++"] = "class-latents"
    """``class-latents``: latents of the class that is predicted (or known) are amplified. ``vs2``: every image's own
    active latents are, without labels (arXiv 2506.01247). ``vs2++``: along the difference between its neighbours of one
    label and the others. Each brings its controls; docs/steering.md."""
    strengths: tuple[float, ...] = (1.5, 2.0, 3.0, 5.0, 10.0)
    """Factors on the class's latents, or alpha = lambda (gamma - 1) of VS2, 0.25 to 2 for a start, and of VS2++, 0.5 to
    16. Validation picks one per method."""
    latents: int = 10
    """Only for kind ``class-latents``: how many are amplified, the first ones by ``ranking`` on the train split."""
    ranking: Literal["mean-difference", "mean", "attribution"] = "mean-difference"
    """Only for kind ``class-latents``: mean activation in the class minus elsewhere, mean activation in the class, or
    what the class's logit owes to the latent (activation times gradient)."""
    edit: Literal["amplify", "clamp"] = "amplify"
    """Only for kind ``class-latents``: the image's own codes times the strength, or the strength times the latents'
    mean activation in the class. Strength 0 ablates them."""
    neighbours: int = 50
    """Only for kind ``vs2++``: train images around an image."""
    neighbour_backbone: str | None = None
    """Only for kind ``vs2++``: name of the backbone section whose embeddings find neighbours; null: the steered model.
    ``activations.sites`` must have embedding."""
    quantiles: tuple[float, ...] = (0.9, 0.95, 0.99, 0.995)
    """Only for kind ``vs2``: of the FVU of single train images. The gate leaves alone what is reconstructed worse.
    Validation picks one."""

    def __post_init__(self) -> None:
        positive(self, "latents", "neighbours")
        rising(self, "strengths", "quantiles")
        if not 0 < self.quantiles[0] <= self.quantiles[-1] <= 1:
            raise SparsightError(f"quantiles: must lie above 0 and at most at 1; got {list(self.quantiles)}")


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


@dataclass(frozen=True)
class Report:
    """The page."""

    title: str | None = None
    """Heading of the page; null names the run."""
    latents: int = 200
    """Latents of each SAE in the browser: those that select for a class most."""
    images: int = 10
    """Images of each: those that activate it most."""


def _check_chain(chain: tuple[str, ...]) -> None:
    if chain and (len(chain) < 2 or any(sites.depth(a) >= sites.depth(b) for a, b in itertools.pairwise(chain))):
        raise SparsightError(f"sites: a chain needs two or more sites in the order of the model, got {list(chain)}")
