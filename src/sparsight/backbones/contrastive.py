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
from sparsight.backbones.recipes import Recipe, augment, share
from sparsight.common.devices import sent
from sparsight.images.split import Pixels, Split

_MAX_LOGIT_SCALE = math.log(100)  # CLIP's limit (arXiv 2103.00020, section 2.5)


class Contrastive(Recipe):
    """Matches images with captions of the classes in the batch, in both directions.

    The loss is CLIP's symmetric loss with several positives per text, as in UniCL (arXiv 2204.03610, equations 2
    to 4): a caption matches every image of its class. With few classes, most images share their caption with
    others, and plain CLIP would push them apart. Label smoothing applies in both directions. Each step draws one
    template per class.
    """

    def __init__(
        self, section: config.Backbone, backbone: Backbone, train: Split, val: Split, names: Sequence[str],
        templates: Sequence[str], n_parallel: int,
    ) -> None:  # fmt: skip
        super().__init__(section, backbone, backbone, train, val, n_parallel)
        self.pixels = Pixels(train, backbone.preprocess, backbone.decoding_threads)
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
        # The labels are on the host: to count the classes among them, nothing needs to wait for a GPU.
        present_C, index_B = torch.from_numpy(self.train.labels[rows]).long().unique(return_inverse=True)
        chosen_C = torch.randint(len(self.templates), (len(present_C),), generator=generator)
        texts_CE = model.encode_text(sent(self.tokens[present_C, chosen_C], outputs_BE.device), normalize=True)
        index_B = sent(index_B, outputs_BE.device)
        logits_BC = open_clip.prompt_logits(model, outputs_BE, texts_CE)
        match_BC = F.one_hot(index_B, len(present_C)).to(logits_BC.dtype)
        smoothing = self.section.label_smoothing
        to_text, to_image = (_one_way(*pair, smoothing) for pair in ((logits_BC, match_BC), (logits_BC.T, match_BC.T)))
        return {"loss": (to_text + to_image) / 2, "train_accuracy": share(logits_BC, index_B)}

    def step(self, rows: np.ndarray, number: int, total: int, generator: torch.Generator) -> dict[str, Tensor]:
        scalars = super().step(rows, number, total, generator)
        self.backbone.model.logit_scale.data.clamp_(max=_MAX_LOGIT_SCALE)
        return scalars

    def epoch_end(self) -> dict[str, float]:
        with self.averaged():
            self.backbone.use_prompts(self.names, self.templates)
        return super().epoch_end()


def _one_way(logits: Tensor, match: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy of each row's matches, which share its target probability: both (rows, candidates)."""
    return F.cross_entropy(logits, match / match.sum(dim=1, keepdim=True), label_smoothing=smoothing)
