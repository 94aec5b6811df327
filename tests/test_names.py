"""Names of latents: on images whose attributes are known, against scikit-learn, and in a run.

Shapes: I images, E width of the image-text features, F latents (d_sae), W words.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
import zarr
from conftest import write_store
from runs import TINY_RUN
from scipy import sparse
from sklearn.metrics import roc_auc_score

from sparsight import sae
from sparsight.activations.store import ActivationStore
from sparsight.backbones.loading import open_folder
from sparsight.common import tables
from sparsight.common.errors import SparsightError
from sparsight.pipeline.run import load_run
from sparsight.sae import SAE
from sparsight.sae.metrics.monosemanticity import unit_rows
from sparsight.sae.metrics.names import Words, auroc, name_latents, read_words

SITE = "blocks.1.input"
WORDS = ["red", "green", "blue", "circle", "square", "star"]
N = {"train": 600, "test": 300}
PER_WORD, N_RANDOM, E = 20, 600, 32


def filled(folder: Path, split: str, x: np.ndarray, tokens: str = "cls") -> ActivationStore:
    """A store that holds the given activations, (I, D) or (I, T, D)."""
    path = write_store(folder / split, len(x), {SITE: x.shape[1:]}, tokens, dtype="float32")
    zarr.open_group(path, mode="r+", zarr_format=3)[SITE][:] = x
    manifest = json.loads(path.with_suffix(".json").read_text())
    del manifest["checksum"]
    path.with_suffix(".json").write_text(json.dumps(manifest))
    return ActivationStore.open(path)


def plain_sae(width: int) -> SAE:
    """Latent i is activation i, where that is above zero."""
    one = sae.create("relu", width, width, 1).requires_grad_(False)
    for weight in (one.W_enc, one.W_dec):
        weight.copy_(torch.eye(width))
    one.b_enc.zero_()
    one.b_dec.zero_()
    return one


class Attributed:
    """Images of a colour and a shape, and what an image-text model might make of them and of the words."""

    def __init__(self) -> None:
        generator = np.random.default_rng(0)
        concepts = generator.standard_normal((len(WORDS), E))
        common, gap = 3 * generator.standard_normal(E), 3 * generator.standard_normal(E)
        self.shows, self.features = {}, {}
        for split, n in N.items():
            colour, shape = generator.integers(3, size=(2, n))
            shows = np.eye(6, dtype=bool)[colour] | np.eye(6, dtype=bool)[3 + shape]
            self.shows[split] = shows
            self.features[split] = unit_rows(common + shows @ concepts + generator.standard_normal((n, E)))
        self.words = Words(
            WORDS,
            unit_rows(gap + concepts + 0.5 * generator.standard_normal(concepts.shape)),
            {split: features.__getitem__ for split, features in self.features.items()},
        )
        self.random = generator.uniform(0.02, 0.6, N_RANDOM)
        self.generator = generator

    def activations(self, split: str) -> np.ndarray:
        """PER_WORD latents of each attribute, which miss a fifth of its images and fire on some others; random ones."""
        n, draw = N[split], self.generator.random
        own = np.repeat(self.shows[split], PER_WORD, axis=1)
        fires = np.hstack(
            [np.where(own, draw(own.shape) < 0.8, draw(own.shape) < 0.05), draw((n, N_RANDOM)) < self.random]
        )
        return np.where(fires, self.generator.gamma(2, size=fires.shape), -1).astype(np.float32)


def test_latents_of_an_attribute_get_its_word_and_random_ones_none(tmp_path: Path) -> None:
    made = Attributed()
    stores = {split: filled(tmp_path, split, made.activations(split)) for split in N}
    width = len(WORDS) * PER_WORD + N_RANDOM
    (columns,) = name_latents([plain_sae(width)], SITE, stores, made.words, 0)
    right = np.array(columns["name"][: width - N_RANDOM]) == np.repeat(WORDS, PER_WORD)
    assert right.mean() >= 0.8
    random = [name for name in columns["name"][-N_RANDOM:] if name is not None]
    assert len(random) <= 0.02 * N_RANDOM, "the null is a quantile of 99 %"
    for name, score, null in zip(*columns.values(), strict=True):
        assert (name is not None) == (score > null)


def test_a_name_is_chosen_on_train_and_scored_on_test(tmp_path: Path) -> None:
    """Against plain arithmetic, with an image's code as the mean over its tokens and firing on any of them."""
    made = Attributed()
    generator = np.random.default_rng(1)
    x = {
        split: np.stack([made.activations(split) - generator.gamma(1, size=(N[split], 1)) for _ in range(4)], axis=1)
        for split in N
    }
    stores = {split: filled(tmp_path, split, values.astype(np.float32), "all") for split, values in x.items()}
    (columns,) = name_latents([plain_sae(x["test"].shape[2])], SITE, stores, made.words, 0, tokens="all")
    z = {split: np.maximum(values, 0).mean(axis=1) for split, values in x.items()}
    similarity = {split: made.features[split] @ made.words.centred_WE.T for split in N}
    for latent in (0, 30, 119, 130, 400):
        correlation = [np.corrcoef(z["train"][:, latent], s)[0, 1] for s in similarity["train"].T]
        word = int(np.argmax(correlation))
        expected = roc_auc_score(z["test"][:, latent] > 0, similarity["test"][:, word])
        assert columns["name_auroc"][latent] == pytest.approx(expected, abs=1e-9)
        assert columns["name"][latent] in (None, WORDS[word])


def test_auroc_is_that_of_scikit_learn_also_with_ties() -> None:
    generator = np.random.default_rng(0)
    fires, scores = generator.random((50, 7)) < 0.3, generator.integers(5, size=(50, 3)).astype(float)
    fires[:, 5], fires[:, 6] = True, False
    found = auroc(sparse.csc_array(fires.astype(np.float64)), scores)
    for latent in range(5):
        for word in range(3):
            assert found[latent, word] == pytest.approx(roc_auc_score(fires[:, latent], scores[:, word]))
    assert np.isnan(found[5:]).all()


def test_latents_that_never_fire_have_neither_name_nor_score(tmp_path: Path) -> None:
    made = Attributed()
    x = {split: made.activations(split) for split in N}
    x["train"][:, 0], x["test"][:, 1], x["test"][:, 2] = -1, -1, 1
    stores = {split: filled(tmp_path, split, values) for split, values in x.items()}
    (columns,) = name_latents([plain_sae(x["test"].shape[1])], SITE, stores, made.words, 0)
    for column in columns.values():
        assert column[:3] == [None] * 3
    assert columns["name"][3] == "red"


def test_words_are_the_lines_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "words.txt"
    file.write_text("striped\n\n  fire truck \nstriped\n\u00fcber\n", encoding="utf-8")
    assert read_words(file) == ["striped", "fire truck", "\u00fcber"]
    file.write_text("\nstriped\n")
    with pytest.raises(SparsightError, match="has 1 words; give at least two"):
        read_words(file)


def test_words_need_a_file_and_an_image_text_model(tmp_path: Path) -> None:
    configuration = yaml.safe_load(Path("params.yaml").read_text())
    configuration["report"]["words"] = str(tmp_path / "words.txt")
    with pytest.raises(SparsightError, match=r"report\.words: there is no file"):
        load_run(configuration)
    (tmp_path / "words.txt").write_text("red\n")
    run = load_run(configuration)
    assert run.namer_of("vit") == run.namer_of("clip") == ["clip"]
    configuration["backbones"]["clip"] = None
    with pytest.raises(SparsightError, match=r"report\.words: names of latents need an open_clip backbone"):
        load_run(configuration)


@pytest.mark.parametrize("name", ["topk-s0", "resae-s0/blocks.2.input", "final-s0"])
def test_a_run_names_latents_by_its_image_text_model(run_folder: Path, name: str) -> None:
    """Also those of the other backbone, whose images are the same: scored by the image-text model's own forward."""
    run = run_folder / TINY_RUN
    folder = run / "saes" / name
    schema = pq.read_schema(folder / "latents.parquet")
    assert [schema.field(column).type for column in ("name", "name_auroc", "name_null")] == [
        pa.string(), pa.float64(), pa.float64(),
    ]  # fmt: skip
    rows: list[dict[str, Any]] = tables.read(folder / "latents.parquet")
    clip, about = open_folder(run / "backbones" / "clip")
    rated = [row for row in rows if row["name_auroc"] is not None]
    assert rated and all((row["name"] is not None) == (row["name_auroc"] > row["name_null"]) for row in rated)
    assert {row["name"] for row in rated} <= {None, *about["prompt_names"]}
    assert all(row["frequency"] > 0 for row in rated)
    if name == "topk-s0":
        embedding = ActivationStore.open(run / "activations" / "clip" / "test.json").rows("embedding")[:]
        x = ActivationStore.open(run / "activations" / "vit" / "test.json").rows("blocks.2.input", tokens="cls")[:]
        fires = sae.load(folder).requires_grad_(False).encode(x.astype(np.float32)).dense().numpy() > 0
        with torch.no_grad():
            features = clip.tower.read(torch.from_numpy(embedding.astype(np.float32))).numpy()
        assert clip.prompts_CE is not None
        similarity = unit_rows(features) @ unit_rows(clip.prompts_CE.detach().numpy()).T
        similarity -= similarity.mean(axis=1, keepdims=True)
        for row in rated:
            scores = [roc_auc_score(fires[:, row["latent"]], s) for s in similarity.T]
            nearest = min(abs(score - row["name_auroc"]) for score in scores)
            assert nearest < 1e-6
            if row["name"] is not None:
                own = scores[about["prompt_names"].index(row["name"])]
                assert own == pytest.approx(row["name_auroc"], abs=1e-6) and own > np.quantile(scores, 0.5)
