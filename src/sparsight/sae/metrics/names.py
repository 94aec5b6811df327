"""Names for latents: the word whose text fits best the images on which a latent fires.

The idea is that of CLIP-Dissect (arXiv 2204.10965): an image-text model compares words with images, and a latent gets
the word that goes along with its activations. The form is ours. Let a_i be the activations of a latent, u_i the
model's features of the same images and t_w those of the words, all of unit length. The latent has the direction

    v = sum_i a_i u_i / sum_i a_i - mean of u_i,

from the mean image to the images that activate it. The similarity of image and word is s_iw = <u_i, t_w - mean of t_w>:
what all texts share says nothing about a word, but varies from image to image. The name is the word with the largest
<v, t_w - mean of t_w> / sd_w, with sd_w the standard deviation of s_iw over the images. Up to a factor of the latent,
this is the correlation of its activation with s_iw. The paper compares ranks or mutual information instead.

A name is chosen on train and judged on test, by the AUROC of s_iw for whether the latent fires on an image. It must
exceed a null, the larger of two: the 95 % quantile of the AUROC of the names of other latents, and the 99 % quantile of
a name without any relation to the latent (Mann and Whitney).

Shapes: I images, E width of the image-text model's features, F latents (d_sae), W words.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from scipy import sparse, stats

from sparsight.activations.store import ActivationStore
from sparsight.backbones.loading import open_folder
from sparsight.backbones.prompts import PLAIN
from sparsight.common.errors import SparsightError, reason
from sparsight.common.progress import followed
from sparsight.common.slices import row_slices
from sparsight.sae.base import SAE
from sparsight.sae.inputs import SaeInputs
from sparsight.sae.metrics.monosemanticity import unit_rows
from sparsight.sae.metrics.sparse_codes import Matrix, from_codes, pooled, times
from sparsight.sae.resae import ReSAE

COLUMNS = {"name": pa.string(), "name_auroc": pa.float64(), "name_null": pa.float64()}
"""Columns of ``latents.parquet``; all null without an image-text model."""
_OTHERS = 0.95  # quantile over the names of other latents
_CHANCE = 0.99  # quantile of a name without relation: one random latent in a hundred gets a name
_SHUFFLED = 256  # names of other latents, at most; more would hardly move their quantile
_ENTRIES = 2**25  # largest number of entries of dense codes at a time
_LATENTS = 4096  # latents whose scores for all words are held at a time


@dataclass(frozen=True)
class Words:
    """Words, and images, as an image-text model sees them."""

    words: Sequence[str]
    texts_WE: np.ndarray
    """float64, rows of unit length."""
    images: Mapping[str, Callable[[slice], np.ndarray]]
    """For ``train`` and ``test``, from some images of the split to their features, float64 (I, E), of unit length."""

    @cached_property
    def centred_WE(self) -> np.ndarray:
        """The texts minus their mean."""
        return self.texts_WE - self.texts_WE.mean(axis=0)


def read_words(path: Path) -> list[str]:
    """The lines of a text file that are not blank, each once.

    Raises:
        SparsightError: no such file, not of UTF-8, or fewer than two words, which leave nothing to compare.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SparsightError(f"{path}: cannot be read ({reason(error)}); give a text file with a word a line") from None
    words = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if len(words) < 2:
        raise SparsightError(f"{path}: has {len(words)} words; give at least two, one a line")
    return words


@torch.no_grad()
def words_from(
    weights: Sequence[Path], stores: Sequence[Path], files: Sequence[Path], device: torch.device
) -> Words | None:
    """The words of a file, or else the class names, and the stored embeddings of an image-text model.

    Args:
        weights: the weights of the image-text model, in the folder of the backbone stage. The words stand in its
            templates.
        stores: manifests of its stores of ``train`` and ``test``, with the site ``embedding``.
        files: one text file with a word or a phrase a line, or none for the class names.
        device: device of the model.

    Returns:
        None without a model, or without a file and with fewer than two classes.
    """
    if not weights:
        return None
    backbone, about = open_folder(weights[0].parent)
    words = read_words(files[0]) if files else about["prompt_names"]
    if len(words) < 2:
        return None
    backbone.to(device).use_prompts(words, about["templates"] or PLAIN)
    assert backbone.prompts_CE is not None

    def features(store: ActivationStore, at: slice) -> np.ndarray:
        embedding = torch.from_numpy(store.rows("embedding").images(at.start, at.stop)).to(device).float()
        return unit_rows(backbone.tower.read(embedding).cpu().numpy())

    images = {path.stem: partial(features, ActivationStore.open(path)) for path in stores}
    return Words(words, unit_rows(backbone.prompts_CE.cpu().numpy()), images)


@torch.no_grad()
def name_latents(
    saes: Sequence[SAE], site: str, stores: Mapping[str, ActivationStore], words: Words, seed: int,
    chain: ReSAE | None = None, tokens: str | None = None,
) -> list[dict[str, list[Any]]]:  # fmt: skip
    """The columns ``name``, ``name_auroc`` and ``name_null``, for each SAE.

    A latent fires on an image if it fires on any token. ``name`` is None if the best word does not exceed its null. All
    three are None for a latent that never fires on train, or on no or every image of test.

    Args:
        saes: SAEs of one site and shape.
        site: their site.
        stores: stores of the SAEs' inputs, of ``train`` and ``test``; with the same images as those of ``words``.
        words: words and images.
        seed: seed of the choice among very many names.
        chain: the chain that the SAE belongs to, if any.
        tokens: the tokens that the SAEs read; None takes what the site stores.
    """
    sums = [_Sums(sae.d_sae, words.centred_WE) for sae in saes]
    for codes, features in _windows(saes, site, stores["train"], words.images["train"], chain, tokens):
        for own, z in zip(sums, codes, strict=True):
            own.update(z, features)
    fires: list[list[Matrix]] = [[] for _ in saes]
    parts = []
    for codes, features in _windows(saes, site, stores["test"], words.images["test"], chain, tokens):
        parts.append(features)
        for own_fires, z in zip(fires, codes, strict=True):
            own_fires.append((z > 0).astype(np.float64))
    test_IE = np.concatenate(parts)
    return [
        judged(own.chosen(), sparse.vstack(own_fires, format="csc"), test_IE, words, seed)
        for own, own_fires in zip(sums, fires, strict=True)
    ]


def _windows(
    saes: Sequence[SAE], site: str, store: ActivationStore, features: Callable[[slice], np.ndarray],
    chain: ReSAE | None, tokens: str | None,
) -> Any:  # fmt: skip
    """Window by window the codes of each SAE, CSR (I, F), an image's being the mean over its tokens, and features."""
    inputs = SaeInputs(store, site, saes[0].W_dec.device, chain, tokens)
    at_once = max(1, min(8192, _ENTRIES // saes[0].d_sae) // inputs.tokens)
    windows = list(row_slices(len(inputs.rows) // inputs.tokens, at_once))
    for window in followed(windows, len(windows), "windows"):
        x = inputs.images(window)
        yield [pooled(from_codes(sae.encode(x)), inputs.tokens) for sae in saes], features(window)


class _Sums:
    """Sums over the images of train, from which the name of every latent is chosen."""

    def __init__(self, d_sae: int, texts_WE: np.ndarray) -> None:
        self.texts_WE, width = texts_WE, texts_WE.shape[1]
        self.n = 0
        self.total_F, self.weighted_FE = np.zeros(d_sae), np.zeros((d_sae, width))
        self.features_E, self.squares_EE = np.zeros(width), np.zeros((width, width))

    def update(self, z_IF: Matrix, features_IE: np.ndarray) -> None:
        z_IF = z_IF.astype(np.float64)
        self.n += len(features_IE)
        self.total_F += z_IF.sum(axis=0)
        self.weighted_FE += times(sparse.csr_array(z_IF.T), features_IE)
        self.features_E += features_IE.sum(axis=0)
        self.squares_EE += features_IE.T @ features_IE

    def chosen(self) -> np.ndarray:
        """The word of each latent, int (F,); -1 for a latent that never fires."""
        mean_E = self.features_E / self.n
        covariance_EE = self.squares_EE / self.n - np.outer(mean_E, mean_E)
        variance_W = np.einsum("we,ef,wf->w", self.texts_WE, covariance_EE, self.texts_WE, optimize=True)
        scaled_WE = self.texts_WE / np.sqrt(np.maximum(variance_W, 1e-12))[:, None]
        fires_F = self.total_F > 0
        direction_FE = self.weighted_FE / np.where(fires_F, self.total_F, 1)[:, None] - mean_E
        best = [(direction_FE[at] @ scaled_WE.T).argmax(axis=1) for at in row_slices(len(fires_F), _LATENTS)]
        return np.where(fires_F, np.concatenate(best), -1)


def judged(
    chosen_F: np.ndarray, fires_IF: Matrix, features_IE: np.ndarray, words: Words, seed: int
) -> dict[str, list[Any]]:
    """The columns of one SAE, from the chosen words and the images on which each latent fires, CSC (I, F) of ones."""
    n, fired_F = len(features_IE), fires_IF.sum(axis=0)
    auroc_F = np.full(len(chosen_F), np.nan)
    used = np.setdiff1d(chosen_F, [-1])
    for word in used:
        named = np.flatnonzero(chosen_F == word)
        auroc_F[named] = auroc(fires_IF[:, named], features_IE @ words.centred_WE[[word]].T)[:, 0]
    others = used
    if len(used) > _SHUFFLED:
        others = np.sort(np.random.default_rng(seed).choice(used, _SHUFFLED, replace=False))
    null_F = _chance(fired_F, n)
    if len(others):
        auroc_FW = auroc(fires_IF, features_IE @ words.centred_WE[others].T)
        auroc_FW[chosen_F[:, None] == others] = np.nan
        rated = ~np.isnan(auroc_FW).all(axis=1)
        null_F[rated] = np.maximum(null_F[rated], np.nanquantile(auroc_FW[rated], _OTHERS, axis=1))
    columns: dict[str, list[Any]] = {name: [None] * len(chosen_F) for name in COLUMNS}
    for latent in np.flatnonzero(~np.isnan(auroc_F)):
        columns["name_auroc"][latent], columns["name_null"][latent] = float(auroc_F[latent]), float(null_F[latent])
        if auroc_F[latent] > null_F[latent]:
            columns["name"][latent] = words.words[chosen_F[latent]]
    return columns


def auroc(fires_IF: Matrix, scores_IW: np.ndarray) -> np.ndarray:
    """AUROC of every score for whether every latent fires, (F, W); NaN for one that fires on no or every image.

    By the sum of ranks: with m of n images firing, (sum of their ranks - m (m + 1) / 2) / (m (n - m)).
    """
    fired_F1 = fires_IF.sum(axis=0)[:, None]
    pairs_F1 = fired_F1 * (len(scores_IW) - fired_F1)
    above_FW = fires_IF.T @ stats.rankdata(scores_IW, axis=0) - fired_F1 * (fired_F1 + 1) / 2
    return np.divide(above_FW, pairs_F1, out=np.full(above_FW.shape, np.nan), where=pairs_F1 > 0)


def _chance(fired_F: np.ndarray, n: int) -> np.ndarray:
    """The quantile of the AUROC of a score without relation to the latent (normal approximation), at most 1."""
    pairs_F = np.maximum(fired_F * (n - fired_F), 1)
    return np.minimum(0.5 + stats.norm.ppf(_CHANCE) * np.sqrt((n + 1) / (12 * pairs_F)), 1.0)
