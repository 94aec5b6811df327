"""A Vision Transformer: its architecture, weights and training."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sparsight.common.errors import SparsightError
from sparsight.config.checks import positive
from sparsight.config.compute import n_microbatches

PUBLISHED = "published"
"""Stands, in the place of templates, for the ensemble that was published for the image source."""


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
        return n_microbatches(self.batch_size) if self.epochs else 1

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
