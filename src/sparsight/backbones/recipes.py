"""Training recipes of backbones: the base class, supervised training, linear probe.

Shapes: B batch, N images, H height, W width, C channels (augment) or classes, D width.
"""

import copy
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsight import config
from sparsight.backbones.backbone import Backbone
from sparsight.common.devices import sent
from sparsight.common.errors import SparsightError
from sparsight.common.progress import Progress
from sparsight.images.split import Pixels, Split
from sparsight.training import loop, schedules
from sparsight.training.microbatches import MicroBatches


class Recipe:
    """AdamW with warm-up and cosine, gradient clipping, moving average; see :class:`sparsight.training.loop.Trainable`.

    Args:
        section: the hyperparameters.
        backbone: the backbone to train, in part or as a whole.
        trained: the part whose weights change.
        train, val: the splits.
        n_parallel: number of micro-batches that run at the same time.

    Raises:
        SparsightError: a model with dropout.
    """

    def __init__(
        self,
        section: config.Backbone,
        backbone: Backbone,
        trained: nn.Module,
        train: Split,
        val: Split,
        n_parallel: int,
    ) -> None:
        if section.epochs:
            _check_dropout(trained)
        self.section, self.backbone, self.trained, self.train, self.val = section, backbone, trained, train, val
        decay = [parameter for parameter in trained.parameters() if parameter.ndim > 1]
        no_decay = [parameter for parameter in trained.parameters() if parameter.ndim <= 1]
        groups = [{"params": decay, "weight_decay": section.weight_decay}, {"params": no_decay, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=section.lr, fused=True)
        self.average = copy.deepcopy(trained).requires_grad_(False) if section.ema else None
        self.parts = MicroBatches(n_parallel)

    def inputs(self, rows: np.ndarray, generator: torch.Generator) -> Tensor:
        """Inputs of :meth:`outputs`, (B, ...)."""
        raise AssertionError("the base class serves weights that are used as they are: it takes no steps")

    def outputs(self, inputs: Tensor) -> Tensor:
        """Outputs for some of the rows, (B, C), for :meth:`loss`."""
        return self.trained(inputs)

    def loss(self, outputs_BC: Tensor, rows: np.ndarray, generator: torch.Generator) -> dict[str, Tensor]:
        """``loss`` to minimise, and other scalars to log; here those of a classifier."""
        labels_B = labels_of(self.train, rows, outputs_BC)
        loss = F.cross_entropy(outputs_BC, labels_B, label_smoothing=self.section.label_smoothing)
        return {"loss": loss, "train_accuracy": share(outputs_BC, labels_B)}

    def step(self, rows: np.ndarray, number: int, total: int, generator: torch.Generator) -> dict[str, Tensor]:
        for group in self.optimizer.param_groups:
            group["lr"] = self.section.lr * schedules.warmup_cosine(number, total)
        self.trained.train()
        inputs = self.inputs(rows, generator)
        scalars = self.parts.backward(
            self.outputs, inputs, lambda outputs: self.loss(outputs, rows, generator), self.trained.parameters()
        )
        nn.utils.clip_grad_norm_(self.trained.parameters(), 1.0)
        self.optimizer.step()
        self.trained.eval()
        if self.average is not None:
            with torch.no_grad():
                for slow, fast in zip(self.average.parameters(), self.trained.parameters(), strict=True):
                    slow.lerp_(fast, 1 - self.section.ema)
        return scalars

    def check(self) -> None:
        """Nothing: a loss that is not finite is one of the scalars."""

    def epoch_end(self) -> dict[str, float]:
        with self.averaged():
            return {"val_accuracy": self.on_val()}

    def on_val(self) -> float:
        """Accuracy on val with the weights as they are now."""
        return float(correct(self.backbone, self.val, self.section.batch_size, self.parts).mean())

    def averaged(self) -> "_Swap":
        """Inside ``with``, the backbone has the averaged weights, if there are any."""
        return _Swap(self.trained, self.average)

    def state(self) -> dict[str, Tensor]:
        state = loop.module_state(self.trained) | loop.optimizer_state(self.optimizer)
        if self.average is not None:
            state |= {f"average.{name}": value for name, value in loop.module_state(self.average).items()}
        return state

    def restore(self, state: dict[str, Tensor]) -> None:
        loop.restore_module(self.trained, state)
        loop.restore_optimizer(self.optimizer, state)
        if self.average is not None:
            prefix = "average."
            average = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            loop.restore_module(self.average, average)


class _Swap:
    """Exchanges the weights of two modules of one kind while inside ``with``."""

    def __init__(self, module: nn.Module, other: nn.Module | None) -> None:
        self.module, self.other = module, other

    def __enter__(self) -> None:
        self._swap()

    def __exit__(self, *_: object) -> None:
        self._swap()

    def _swap(self) -> None:
        if self.other is not None:
            for parameter, counterpart in zip(self.module.parameters(), self.other.parameters(), strict=True):
                parameter.data, counterpart.data = counterpart.data, parameter.data


class Supervised(Recipe):
    """Trains every weight by cross-entropy on augmented images."""

    def __init__(self, section: config.Backbone, backbone: Backbone, train: Split, val: Split, n_parallel: int) -> None:
        super().__init__(section, backbone, backbone, train, val, n_parallel)
        self.pixels = Pixels(train, backbone.preprocess, backbone.decoding_threads)

    def inputs(self, rows: np.ndarray, generator: torch.Generator) -> Tensor:
        return augment(self.backbone.normalize(self.pixels[rows]), self.section, generator)


class LinearProbeRecipe(Recipe):
    """Trains a linear head on the frozen tower's embeddings of the plain images; each image passes the tower once."""

    def __init__(self, section: config.Backbone, backbone: Backbone, train: Split, val: Split, n_parallel: int) -> None:
        backbone.requires_grad_(False)
        head = backbone.tower.classifier
        if head is None:
            raise SparsightError(f"training: {backbone.name} has no linear class head to probe with")
        super().__init__(section, backbone, head.requires_grad_(True), train, val, n_parallel)
        self.embeddings_ND, self.val_ND = (
            _embeddings(backbone, split, section.batch_size, self.parts) for split in (train, val)
        )

    def inputs(self, rows: np.ndarray, generator: torch.Generator) -> Tensor:
        return self.embeddings_ND[sent(torch.from_numpy(rows), self.embeddings_ND.device)]

    @torch.no_grad()
    def on_val(self) -> float:
        labels = labels_of(self.val, np.arange(len(self.val)), self.val_ND)
        return float(share(self.trained(self.val_ND), labels))


def _embeddings(backbone: Backbone, split: Split, batch_size: int, parts: MicroBatches) -> Tensor:
    """The classifier's input for each image, (N, D)."""

    def embed(images_BCHW: Tensor) -> Tensor:
        return backbone.taps(images_BCHW, ["embedding"])["embedding"]

    embeddings = []
    with Progress(len(split), "images") as progress:
        for pixels in split.batches(backbone.preprocess, batch_size, backbone.decoding_threads):
            embeddings.append(parts.forward(embed, backbone.normalize(pixels)))
            progress(len(pixels))
    return torch.cat(embeddings)


def _check_dropout(trained: nn.Module) -> None:
    """Raise SparsightError for dropout: its generator is in no checkpoint and is shared by all parts of a batch."""
    for name, module in trained.named_modules():
        rate = next((getattr(module, key) for key in ("p", "drop_prob", "prob") if hasattr(module, key)), 0)
        if "Drop" in type(module).__name__ and rate:
            raise SparsightError(
                f"architecture: {name} drops {rate:g} of what it reads at random, which a resumed training could not "
                "repeat; set the dropout to 0"
            )


def share(logits_BC: Tensor, labels_B: Tensor) -> Tensor:
    """Share of a batch that is classified correctly."""
    return (logits_BC.argmax(dim=1) == labels_B).float().mean()


def labels_of(split: Split, rows: np.ndarray, like: Tensor) -> Tensor:
    """Labels of some images, int64 (B,), on the device of ``like``."""
    return sent(torch.from_numpy(split.labels[rows]).long(), like.device)


def correct(backbone: Backbone, split: Split, batch_size: int, parts: MicroBatches) -> np.ndarray:
    """Whether each labelled image of the split is classified correctly, bool (labelled images,)."""
    predicted = [
        parts.forward(backbone, backbone.normalize(pixels)).argmax(dim=1)
        for pixels in split.batches(backbone.preprocess, batch_size, backbone.decoding_threads)
    ]
    return (torch.cat(predicted).cpu().numpy() == split.labels)[split.labels >= 0]


def augment(images_BCHW: Tensor, section: config.Backbone, generator: torch.Generator) -> Tensor:
    """Random rotation, zoom, shift and mirror image, one affine map per image; empty corners repeat the border."""
    B = len(images_BCHW)

    def uniform(limit: float, *shape: int) -> Tensor:
        return (torch.rand(B, *shape, generator=generator) * 2 - 1) * limit

    angle, zoom, shift = uniform(math.radians(section.rotate)), 1 + uniform(section.zoom), uniform(2 * section.shift, 2)
    mirror = torch.where(torch.rand(B, generator=generator) < 0.5 * section.flip, -1.0, 1.0)
    cos, sin = zoom * angle.cos(), zoom * angle.sin()
    rows = [torch.stack([mirror * cos, -sin, shift[:, 0]], 1), torch.stack([mirror * sin, cos, shift[:, 1]], 1)]
    theta = sent(torch.stack(rows, 1), images_BCHW.device)
    grid = F.affine_grid(theta, list(images_BCHW.shape), align_corners=False)
    return F.grid_sample(images_BCHW, grid, padding_mode="border", align_corners=False)
