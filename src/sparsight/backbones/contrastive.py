"""Training of a small open_clip model on images and captions made from class names.

Shapes: B batch, C classes in the batch, E joint embedding.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsight import config
from sparsight.backbones import open_clip
from sparsight.backbones.backbone import Backbone
from sparsight.backbones.recipes import Recipe, augment, labels_of, share
from sparsight.images.split import Pixels, Split

_MAX_LOGIT_SCALE = math.log(100)  # CLIP's limit (arXiv 2103.00020, section 2.5)


class Contrastive(Recipe):
    """Matches images with captions of the classes in the batch, in both directions.

    The loss is CLIP's symmetric loss with several positives per text, as in UniCL (arXiv 2204.03610, equations 2
    to 4): a caption matches every image of its class. With few classes, most images share their caption with
    others, and plain CLIP would push them apart. Each step draws one template per class.
    """

    def __init__(
        self, section: config.Backbone, backbone: Backbone, train: Split, val: Split, names: Sequence[str],
        templates: Sequence[str], n_parallel: int,
    ) -> None:  # fmt: skip
        super().__init__(section, backbone, backbone, train, val, n_parallel)
        self.pixels = Pixels(train, backbone.preprocess, torch.get_num_threads())
        self.names, self.templates = names, templates
        tokenizer = open_clip.tokenizer(backbone.model, backbone.name.partition("/")[2])
        texts = [[template.format(name) for template in templates] for name in names]
        self.tokens = torch.stack([tokenizer(class_texts) for class_texts in texts])  # (classes, templates, length)

    def inputs(self, rows: np.ndarray, generator: torch.Generator) -> Tensor:
        return augment(self.backbone.normalize(self.pixels[rows]), self.section, generator)

    def outputs(self, inputs: Tensor) -> Tensor:
        return self.backbone.features(inputs)

    def loss(self, outputs_BE: Tensor, rows: np.ndarray, generator: torch.Generator) -> dict[str, Tensor]:
        model = self.backbone.model
        present_C, index_B = labels_of(self.train, rows, outputs_BE).unique(return_inverse=True)
        chosen_C = torch.randint(len(self.templates), (len(present_C),), generator=generator)
        texts_CE = model.encode_text(self.tokens[present_C.cpu(), chosen_C].to(outputs_BE.device), normalize=True)
        logits_BC = open_clip.prompt_logits(model, outputs_BE, texts_CE)
        match_BC = F.one_hot(index_B, len(present_C)).to(logits_BC.dtype)
        to_text = F.cross_entropy(logits_BC, index_B, label_smoothing=self.section.label_smoothing)
        to_image = F.cross_entropy(logits_BC.T, (match_BC / match_BC.sum(dim=0)).T)
        return {"loss": (to_text + to_image) / 2, "train_accuracy": share(logits_BC, index_B)}

    def step(self, rows: np.ndarray, progress: float, generator: torch.Generator) -> dict[str, Tensor]:
        scalars = super().step(rows, progress, generator)
        self.backbone.model.logit_scale.data.clamp_(max=_MAX_LOGIT_SCALE)
        return scalars

    def epoch_end(self) -> dict[str, float]:
        with self.averaged():
            self.backbone.use_prompts(self.names, self.templates)
        return super().epoch_end()
