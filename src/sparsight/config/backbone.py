"""A Vision Transformer: its architecture, weights and training."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from sparsight.common.errors import SparsightError
from sparsight.config.bounds import Bounds, Count, CountOrZero, NotNegative, Positive, Share, ShareBelowOne
from sparsight.config.checks import Section, only_if
from sparsight.config.compute import n_microbatches

PUBLISHED = "published"
"""Value of ``templates`` that selects the prompt ensemble published for the image source."""

RANDOM = "random"
"""Value of ``weights`` that keeps the weights as they are drawn."""

_AUGMENTATION = ("rotate", "zoom", "shift", "flip")


@dataclass(frozen=True)
class Backbone(Section):
    """A Vision Transformer: its architecture, its weights and its training."""

    model: str
    """``timm/<architecture>``, ``open_clip/<model>[@<tag>]`` or ``open_clip/hf-hub:<org>/<repo>``; docs/models.md."""
    weights: str | None = None
    """Initial weights: null (random, to be trained), ``pretrained`` (downloaded by the library), or the path of a
    safetensors file or checkpoint (read without running code). ``random`` weights stay as they are drawn: a control,
    with training ``none``."""
    architecture: dict[str, CountOrZero] = field(default_factory=dict)
    """Architecture options to override, by the library's names: img_size, patch_size, in_chans, embed_dim, depth,
    num_heads, num_classes (timm; the last only for weights as they are); embed_dim, vision.width, vision.layers,
    vision.image_size, text.layers, ... (open_clip)."""
    training: Literal["supervised", "probe", "contrastive", "none"] = "supervised"
    """``supervised`` trains all weights and a class head. ``probe`` trains a linear head on the frozen tower.
    ``contrastive`` matches images with captions made from class names (open_clip). ``none`` uses the weights as they
    are, without a classifier, when only embeddings are needed."""
    templates: tuple[str, ...] = ()
    """Captions with {} for the class name, used in training and as prompts. If none is given, "a photo of a {}." is
    used. The single word ``published`` selects the ensemble published for the image source (docs/steering.md)."""
    held_out_templates: tuple[str, ...] = ()
    """Captions that are never trained on. Test accuracy with them as prompts is also reported."""
    epochs: CountOrZero = 0
    """Passes over the train split. 0 uses the weights as they are, with their classifier, and turns training off, with
    all of its settings."""
    batch_size: Count = 64
    """Images per step, in training and in evaluation; training ``none`` has neither."""
    lr: Positive = 1e-3
    """Peak learning rate of AdamW: linear warm-up over the first tenth of training, then cosine decay to 0."""
    weight_decay: NotNegative = 0.05
    """Decoupled weight decay of AdamW."""
    label_smoothing: ShareBelowOne = 0.1
    """Share of the target probability that is spread over all classes; in contrastive training, over all captions and,
    in the other direction, over all images of the batch."""
    ema: ShareBelowOne = 0.0
    """Decay per step of the weights' moving average. The averaged weights are evaluated and saved. 0 turns this off."""
    rotate: Annotated[float, Bounds(0, 180)] = 0.0
    """Augmentation, not of a probe: largest rotation in degrees, in either direction."""
    zoom: ShareBelowOne = 0.0
    """Augmentation: largest relative change of scale, in either direction."""
    shift: Share = 0.0
    """Augmentation: largest shift, as a share of the image's side."""
    flip: bool = False
    """Augmentation: mirror each image with probability 1/2."""

    @property
    def cores(self) -> int:
        """Number of CPU cores that training can use, one per micro-batch."""
        return n_microbatches(self.batch_size) if self.epochs else 1

    @property
    def classifies(self) -> bool:
        """Whether the model has a classifier, or prompts."""
        return self.reads_text or self.training != "none"

    @property
    def reads_text(self) -> bool:
        """Whether texts can name classes and latents: an open_clip model whose weights are not random."""
        return self.model.startswith("open_clip/") and self.weights != RANDOM

    @property
    def depth(self) -> int | None:
        """Number of blocks, if ``architecture`` sets it."""
        return self.architecture.get("vision.layers" if self.model.startswith("open_clip/") else "depth")

    def __post_init__(self) -> None:
        super().__post_init__()
        clip = self.model.startswith("open_clip/")
        if not clip and not self.model.startswith("timm/"):
            raise SparsightError(
                f"model: {self.model!r} starts with neither 'timm/' nor 'open_clip/'; e.g. timm/vit_small_patch16_224"
            )
        if self.weights is None and self.epochs == 0:
            raise SparsightError("epochs: random weights need training; set epochs or weights")
        if self.weights not in (None, "pretrained", RANDOM) and not Path(str(self.weights)).is_file():
            raise SparsightError(f"weights: there is no file {self.weights!r}; give null, pretrained or a path")
        if self.weights == RANDOM and (self.training != "none" or self.epochs):
            raise SparsightError("weights: random weights are a control that is not trained; set training to none")
        if self.training == "none" and ((clip and self.weights != RANDOM) or self.epochs or self.weights is None):
            raise SparsightError("training: 'none' is for timm weights as they are; set weights, and leave epochs at 0")
        if "num_classes" in self.architecture and (self.epochs or self.training == "none"):
            raise SparsightError(
                "architecture: num_classes is of the classifier in weights that are used as they are; leave it out "
                "where epochs train one, and with training none"
            )
        if self.epochs and clip != (self.training == "contrastive"):
            raise SparsightError(
                f"training: {self.training!r} does not suit {self.model}; contrastive is for open_clip"
            )
        if (self.templates or self.held_out_templates) and not clip:
            raise SparsightError("templates: only an open_clip model reads texts")
        templates = () if self.templates == (PUBLISHED,) else self.templates
        for template in (*templates, *self.held_out_templates):
            if template.count("{}") != 1 or template.replace("{}", "").count("{"):
                raise SparsightError(f"templates: {template!r} needs one {{}} for the class name")
        read = self.training != "probe" or self.epochs == 0
        only_if(read, "training of all weights (not a probe)", self, *_AUGMENTATION)
