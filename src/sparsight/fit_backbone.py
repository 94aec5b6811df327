"""Train a backbone (or take its weights as they are) and say how accurate it is.

Shapes: B batch, H height, W width, C channels.
"""

import dataclasses
import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from sparsight import backbones, config, training
from sparsight.backbones import Backbone
from sparsight.batches import RowNumbers
from sparsight.errors import SparsightError
from sparsight.images import Manifest, Pixels, Split
from sparsight.progress import say
from sparsight.seeds import derive_seed
from sparsight.statistics import wilson
from sparsight.work import Work, write_json


def fit(
    section: config.Backbone, manifest: Manifest, name: str, seed: int, work: Work, device: torch.device,
    record: dict[str, Any],
) -> None:  # fmt: skip
    """Write ``model.safetensors``, ``config.json`` and ``training.jsonl`` to ``work.out``.

    The test split is used once, at the end.

    Raises:
        SparsightError: weights used as they are (epochs 0) with a classifier for other classes.
    """
    torch.manual_seed(derive_seed(seed, "backbone", name, "init"))
    classes = manifest.classes
    if section.epochs == 0:
        backbone = backbones.load(section.model, section.weights, **section.architecture)
        if backbone.model.num_classes != len(classes):
            raise SparsightError(
                f"backbones.{name}: its classifier has {backbone.model.num_classes} outputs, the images "
                f"{len(classes)} classes; set epochs to train a new classifier with the backbone"
            )
    else:
        backbone = backbones.load(section.model, section.weights, len(classes), **section.architecture)
    backbone.to(device)
    threads = torch.get_num_threads()
    train, val, test = (manifest.split(part) for part in ("train", "val", "test"))
    loop = _Training(section, backbone, Pixels(train, backbone.preprocess, threads), val)
    seed = derive_seed(seed, "backbone", name)
    training.train(loop, RowNumbers(len(train), section.batch_size, seed), section.epochs, seed, work)
    splits = {"val": val, "test": test}
    accuracy = {part: wilson(correct(backbone, split, section.batch_size)) for part, split in splits.items()}
    say(f"{name}: accuracy val {accuracy['val']['accuracy']:.4f}, test {accuracy['test']['accuracy']:.4f}")
    pretrained = backbone.model.pretrained_cfg if section.weights == "pretrained" else {}
    about = {
        "format_version": 1,
        "model": section.model,
        "weights": section.weights,
        "architecture": section.architecture,
        "n_blocks": backbone.n_blocks,
        "n_heads": backbone.n_heads,
        "d_in": backbone.d_in,
        "classes": classes,
        "preprocess": dataclasses.asdict(backbone.preprocess),
        "accuracy": accuracy,
        "licence": pretrained.get("license") or ("trained by this run" if section.weights is None else "unknown"),
        "record": record,
    }
    state = {key: value.contiguous() for key, value in backbone.model.state_dict().items()}
    save_file(state, work.out / "model.safetensors")
    write_json(work.out / "config.json", about)


@torch.no_grad()
def correct(backbone: Backbone, split: Split, batch_size: int) -> np.ndarray:
    """Whether each image of the split is classified correctly, bool (n,)."""
    logits = [
        backbone(backbone.normalize(pixels)).argmax(dim=1).cpu().numpy()
        for pixels in split.batches(backbone.preprocess, batch_size, torch.get_num_threads())
    ]
    return np.concatenate(logits) == split.labels


class _Training:
    """Supervised training with AdamW; see :class:`sparsight.training.Trainable`."""

    def __init__(self, section: config.Backbone, backbone: Backbone, pixels: Pixels, val: Split) -> None:
        self.section, self.backbone, self.pixels, self.val = section, backbone, pixels, val
        decay = [p for p in backbone.parameters() if p.ndim > 1]
        rest = [p for p in backbone.parameters() if p.ndim <= 1]
        groups = [{"params": decay, "weight_decay": section.weight_decay}, {"params": rest, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=section.lr, fused=True)

    def step(self, rows: np.ndarray, progress: float, generator: torch.Generator) -> dict[str, Tensor]:
        section, model = self.section, self.backbone
        images = augment(model.normalize(self.pixels[rows]), section, generator)
        labels = torch.from_numpy(self.pixels.split.labels[rows]).long().to(images.device)
        for group in self.optimizer.param_groups:
            group["lr"] = section.lr * training.warmup_cosine(progress)
        model.train()
        logits = model(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=section.label_smoothing)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        self.optimizer.step()
        model.eval()
        return {"loss": loss, "train_accuracy": (logits.argmax(dim=1) == labels).float().mean()}

    def epoch_end(self) -> dict[str, float]:
        return {"val_accuracy": float(correct(self.backbone, self.val, self.section.batch_size).mean())}

    def state(self) -> dict[str, Tensor]:
        return training.module_state(self.backbone) | training.optimizer_state(self.optimizer)

    def restore(self, state: dict[str, Tensor]) -> None:
        training.restore_module(self.backbone, state)
        training.restore_optimizer(self.optimizer, state)


def augment(images_BCHW: Tensor, section: config.Backbone, generator: torch.Generator) -> Tensor:
    """Random rotation, zoom, shift and mirror image, one affine map per image; corners repeat the border."""
    B = len(images_BCHW)

    def uniform(limit: float, *shape: int) -> Tensor:
        return (torch.rand(B, *shape, generator=generator) * 2 - 1) * limit

    angle, zoom, shift = uniform(math.radians(section.rotate)), 1 + uniform(section.zoom), uniform(2 * section.shift, 2)
    mirror = torch.where(torch.rand(B, generator=generator) < 0.5 * section.flip, -1.0, 1.0)
    cos, sin = zoom * angle.cos(), zoom * angle.sin()
    rows = [torch.stack([mirror * cos, -sin, shift[:, 0]], 1), torch.stack([mirror * sin, cos, shift[:, 1]], 1)]
    theta = torch.stack(rows, 1).to(images_BCHW.device)
    grid = F.affine_grid(theta, list(images_BCHW.shape), align_corners=False)
    return F.grid_sample(images_BCHW, grid, padding_mode="border", align_corners=False)
