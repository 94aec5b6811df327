"""What the classifiers of the run's models say, of images and of the directions of latents.

Shapes: n images, F latents (d_sae), D width (d_in), C classes.
"""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsight.activations.store import ActivationStore
from sparsight.backbones import open_folder
from sparsight.backbones.backbone import Backbone
from sparsight.common.tokens import EMBEDDING

EXTREMES = 3
"""Classes listed per latent, of the largest and of the smallest effect each."""


class Classifiers:
    """The classifiers of a run's models; a model is loaded when it is first needed.

    Args:
        folders: folder of each backbone, by name.
        device: device for computing.
    """

    def __init__(self, folders: Mapping[str, Path], device: torch.device) -> None:
        self._folders, self._device = folders, device
        self._jacobian, self._model = cache(self._computed), cache(self._opened)

    @torch.no_grad()
    def predictions(self, name: str, store: Path, rows: np.ndarray) -> np.ndarray | None:
        """Predicted classes (n,) of images by a model, from their stored embeddings.

        None if none are stored, or the model does not classify by its embedding.

        Args:
            name: the model's name in the run.
            store: manifest of the test split's store.
            rows: numbers of the images.
        """
        activations, backbone = ActivationStore.open(store), self._model(name)
        if EMBEDDING not in activations.sites or backbone is None or len(backbone.class_positions) > 1:
            return None
        x = torch.from_numpy(activations.rows(EMBEDDING)[rows]).float().to(self._device)
        return backbone.classify_embedding(x).argmax(dim=1).cpu().numpy()

    def extremes(self, about: Mapping[str, Any], store: Path, W_dec: Tensor) -> tuple[np.ndarray, np.ndarray] | None:
        """Classes (F, 2 m) of the m largest effects, largest first, then the m smallest, and the effects themselves.

        An effect is of one unit of activation, as difference from the mean over the classes. None if it is not defined:
        unless the SAE reads the class token (or the embedding) of a model whose classifier reads nothing else, and the
        store has the last block's output.

        Args:
            about: the SAE's ``config.json``.
            store: manifest of the test split's store.
            W_dec: (F, D), on the device.
        """
        embedding = about["site"] == EMBEDDING
        if not embedding and about["tokens"] != "cls":
            return None
        jacobian_CD = self._jacobian(about["backbone"], store, embedding)
        if jacobian_CD is None or len(jacobian_CD) < 2:
            return None
        centred_CD = jacobian_CD - jacobian_CD.mean(dim=0)
        m = min(EXTREMES, len(centred_CD) // 2)
        effects, classes = [], []
        for rows in W_dec.detach().split(4096):
            order = (rows @ centred_CD.T).sort(dim=1, descending=True, stable=True)
            ends = [*range(m), *range(len(centred_CD) - m, len(centred_CD))]
            effects.append(order.values[:, ends].cpu().numpy())
            classes.append(order.indices[:, ends].cpu().numpy())
        return np.concatenate(classes), np.concatenate(effects)

    def _computed(self, name: str, store: Path, embedding: bool) -> Tensor | None:
        activations, backbone = ActivationStore.open(store), self._model(name)
        if backbone is None:
            return None
        site = EMBEDDING if embedding else f"blocks.{backbone.n_blocks - 1}.output"
        return jacobian(backbone, activations, site) if site in activations.sites else None

    def _opened(self, name: str) -> Backbone | None:
        """The model; None if it has no classes with names."""
        metadata = json.loads((self._folders[name] / "config.json").read_text())
        if not metadata["classes"] or metadata["training"] == "none":
            return None
        return open_folder(self._folders[name])[0].to(self._device)


def jacobian(backbone: Backbone, store: ActivationStore, site: str) -> Tensor | None:
    """Derivative of the class logits, (C, D), by the activation at ``site``, at the mean over the store.

    Args:
        backbone: the model.
        store: a split's activations.
        site: the last block's output or ``embedding``.

    Returns:
        The derivative. None if the site's class token alone does not decide the logits.
    """
    n_class = len(backbone.class_positions)
    if n_class > 1 or (site != EMBEDDING and (backbone.tower.n_read > 1 or not n_class)):
        return None
    tokens = EMBEDDING if site == EMBEDDING else "cls"
    if site != EMBEDDING and store.tokens_of(site) not in ("cls", "all"):
        return None
    mean_D = torch.from_numpy(store.statistics(site, tokens).mean).float().to(backbone.device)

    def logits(x_D: Tensor) -> Tensor:
        return backbone.classify_embedding(x_D[None])[0] if site == EMBEDDING else backbone.classify(x_D[None, None])[0]

    found: Tensor = torch.autograd.functional.jacobian(logits, mean_D)
    return found
