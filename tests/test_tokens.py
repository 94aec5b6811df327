"""Tokens of a site: what is read from a store of more tokens is, to the bit, what a store of these alone would give."""

import argparse
import copy
import dataclasses
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, make_backbone, make_manifest

from sparsight import config
from sparsight.activations import shards
from sparsight.activations.extract import extract
from sparsight.activations.store import ActivationStore, verify
from sparsight.activations.writer import Plan, StoreWriter, finish_store
from sparsight.common.errors import SparsightError
from sparsight.common.work import Work
from sparsight.config import schema
from sparsight.pipeline.run import load_run
from sparsight.sae.base import load
from sparsight.sae.evaluate import chain_errors
from sparsight.sae.fit import fit
from sparsight.sae.metrics.measure import measure
from sparsight.sae.resae import load_chain
from sparsight.steering.vs2 import Calibration

SITES = ("blocks.0.input", "blocks.1.input")
N, T, D = 768, 6, 200  # more patches than fit into 1 MB, and pools of them that depend on the size of chunks
PICK = {
    "all": slice(None),
    "cls": slice(1),
    "registers": slice(1, 2),
    "patches": slice(2, None),
}  # the second token is a register
CPU = torch.device("cpu")
PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text())


def make_store(folder: Path, values: Mapping[str, np.ndarray], tokens: Mapping[str, str]) -> ActivationStore:
    """A store of given values, float16."""
    first = next(iter(values.values()))
    plan = Plan(len(first), {site: x.shape[1:] for site, x in values.items()}, "float16", 128, tokens)
    writer = StoreWriter(folder / "train.zarr", plan, folder)
    records = {
        number: writer.write(number, {site: np.ascontiguousarray(x[images]) for site, x in values.items()}, [])
        for number, images in enumerate(plan.shards)
    }
    about = {"split": "train", "token_positions": {"class": [0], "register": [1], "patches": [2, T]}, "backbone": "vit"}
    part = folder / "part.json"
    part.write_text(json.dumps({"plan": dataclasses.asdict(plan), "about": about, "shards": records}))
    finish_store(folder / "train.zarr", [part], folder / "train.json")
    return ActivationStore.open(folder / "train.zarr")


@pytest.fixture(scope="module")
def values() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    noise = {site: generator.standard_normal((N, T, D), np.float32) for site in SITES}
    return {site: (x * np.linspace(0.1, 2, D) + 0.5).astype(np.float16) for site, x in noise.items()}


@pytest.fixture(scope="module")
def stores(values: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> dict[str, ActivationStore]:
    """A store of all tokens, and one for each kind of them alone. Their chunks hold different numbers of images."""
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "_CHUNK_BYTES", 2**14)
        for tokens, pick in PICK.items():
            picked = {site: x[:, pick].squeeze() if tokens == "cls" else x[:, pick] for site, x in values.items()}
            made[tokens] = make_store(tmp_path_factory.mktemp(tokens), picked, dict.fromkeys(SITES, tokens))
    assert len({store.rows(SITES[0]).chunk_images for store in made.values()}) == 3
    return made


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_CHUNK_BYTES", 2**14)


@pytest.mark.parametrize("tokens", ["cls", "registers", "patches"])
def test_rows_chunks_and_statistics_are_those_of_a_store_of_these_tokens(
    stores: dict[str, ActivationStore], tokens: str
) -> None:
    ours, alone = stores["all"].rows(SITES[0], tokens), stores[tokens].rows(SITES[0])
    assert np.array_equal(ours[:], alone[:]) and ours.dtype == alone.dtype
    assert (ours.shape, ours.tokens_per_image, ours.chunk_images) == (
        alone.shape, alone.tokens_per_image, alone.chunk_images,
    )  # fmt: skip
    mean, rms = stores["all"].statistics(SITES[0], tokens)
    entry = stores[tokens].manifest["sites"][SITES[0]]
    assert mean.tolist() == entry["mean"] and rms == entry["rms"]
    listed = stores[tokens].statistics(SITES[0], tokens)
    assert np.array_equal(listed.mean, mean) and listed.rms == rms


@pytest.mark.parametrize("stored", ["all", "patches"])
def test_the_mean_over_the_stored_patches_is_read_in_single_precision(
    stores: dict[str, ActivationStore], values: dict[str, np.ndarray], stored: str
) -> None:
    rows = stores[stored].rows(SITES[1], "mean")
    assert rows.dtype == np.float32 and rows.shape == (N, D) and rows.tokens_per_image == 1
    expected = values[SITES[1]][:, 2:].astype(np.float64).mean(axis=1)
    np.testing.assert_allclose(rows[:], expected, atol=1e-5)
    assert np.array_equal(rows[[600, 3, -1]], rows[:][[600, 3, -1]])
    assert stores[stored].token_groups(SITES[1], "mean") == {"mean": [0]}
    np.testing.assert_allclose(stores[stored].statistics(SITES[1], "mean").mean, expected.mean(axis=0), atol=1e-5)


def test_what_a_site_does_not_store_is_refused(stores: dict[str, ActivationStore]) -> None:
    for stored, tokens in (("cls", "patches"), ("cls", "mean"), ("patches", "cls"), ("patches", "all")):
        with pytest.raises(SparsightError, match=f"'blocks.0.input' holds tokens '{stored}', not '{tokens}'; extract"):
            stores[stored].rows(SITES[0], tokens)
    headless = copy.deepcopy(stores["all"].manifest)
    headless["token_positions"]["class"] = []
    with pytest.raises(SparsightError, match=r"the model has no class token; read patches or mean of 'blocks.0"):
        ActivationStore(stores["all"].path, headless).statistics(SITES[0], "cls")
    headless["token_positions"]["register"] = []
    with pytest.raises(SparsightError, match=r"the model has no register token; read patches or mean of 'blocks.0"):
        ActivationStore(stores["all"].path, headless).rows(SITES[0], "registers")


def train(store: ActivationStore, folder: Path, **options: Any) -> Path:
    section = config.Sae(backbone="vit", d_sae=32, k=4, epochs=1, batch_size=128, seeds=(0,), memory_mb=1, **options)
    with Work(folder / "work", "key") as work:
        fit(section, store, None, "sae", 0, work, CPU, {})
        work.finish(folder / "out")
    return folder / "out"


def weights_and_log(folder: Path) -> dict[str, bytes]:
    names = ("sae.safetensors", "affine.safetensors", "training.jsonl")
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.name in names}


@pytest.mark.parametrize("tokens", ["cls", "registers", "patches"])
@pytest.mark.parametrize("places", [{"site": SITES[1]}, {"sites": SITES}], ids=["single", "chain"])
def test_an_sae_is_the_same_whether_its_tokens_are_stored_alone_or_among_others(
    stores: dict[str, ActivationStore], tmp_path: Path, tokens: Any, places: dict[str, Any]
) -> None:
    among = train(stores["all"], tmp_path / "among", tokens=tokens, **places)
    alone = train(stores[tokens], tmp_path / "alone", **places)
    assert weights_and_log(among) == weights_and_log(alone)
    for path in among.rglob("config.json"):
        assert json.loads(path.read_text())["tokens"] == tokens


@pytest.mark.parametrize("tokens", ["cls", "registers", "patches"])
def test_metrics_and_calibration_are_the_same_from_either_store(
    stores: dict[str, ActivationStore], tmp_path: Path, tokens: Any
) -> None:
    labels = dict.fromkeys(("train", "val", "test"), np.arange(N) % 4)
    one = load(train(stores[tokens], tmp_path / "one", site=SITES[0]) / "sae-s0")
    chain = load_chain(train(stores[tokens], tmp_path / "chain", sites=SITES) / "sae-s0")
    found = [
        measure([one], SITES[0], dict.fromkeys(labels, stores[stored]), labels, 4, 0, tokens=tokens)[0]
        for stored in ("all", tokens)
    ]
    assert repr(found[0]) == repr(found[1])  # as text, because nan differs from itself
    assert chain_errors(chain, stores["all"], tokens) == chain_errors(chain, stores[tokens])
    ours, alone = (vars(Calibration.of(one, stores[stored].rows(SITES[0], tokens), 0)) for stored in ("all", tokens))
    assert all(torch.equal(ours[name], alone[name]) for name in alone)


def test_one_extraction_stores_other_tokens_at_every_site(tmp_path: Path) -> None:
    split = make_manifest(tmp_path, per_class=12).split("train")

    def extracted(name: str, sites: list[Any], **options: Any) -> ActivationStore:
        section = schema.parse(config.Activations, {"sites": sites, "batch_size": 3, **options}, "activations")
        folder = tmp_path / name
        with Work(folder / "work", "key") as work:
            store = folder / "train.zarr"
            extract(make_backbone(classes=2, reg_tokens=1), split, section, config.Compute(), work, store, 0, {})
            work.finish(folder)
        finish_store(folder / "train.zarr", [folder / "train.part-0.json"], folder / "train.json")
        return ActivationStore.open(folder / "train.zarr")

    mixed = extracted(
        "mixed",
        [
            {"site": "blocks.0.output", "tokens": "all"},
            "blocks.1.input=patches",
            "blocks.2.input",
            "embedding",
            "blocks.0.attn=registers",
        ],
    )
    assert verify(mixed.path) == []
    stored = {site: mixed.tokens_of(site) for site in mixed.sites}
    assert stored == {
        "blocks.0.output": "all", "blocks.1.input": "patches", "blocks.2.input": "cls", "embedding": "embedding",
        "blocks.0.attn": "registers",
    }  # fmt: skip
    assert list(mixed.token_groups("blocks.0.output")) == ["cls", "registers", "patches"]
    for site, tokens in stored.items():
        alone = extracted(f"{site}-{tokens}", [site], **({} if tokens == "embedding" else {"tokens": tokens}))
        assert mixed.manifest["sites"][site] == alone.manifest["sites"][site]
        assert {name: mixed.manifest["files"][name] for name in alone.manifest["files"] if name != "zarr.json"} == {
            name: digest for name, digest in alone.manifest["files"].items() if name != "zarr.json"
        }


def test_a_store_of_the_first_format_still_opens(stores: dict[str, ActivationStore], tmp_path: Path) -> None:
    manifest = copy.deepcopy(stores["all"].manifest)
    for entry in manifest["sites"].values():
        del entry["tokens"]
    manifest |= {"format_version": 1, "tokens": "all"}
    del manifest["checksum"]
    (tmp_path / "train.zarr").symlink_to(stores["all"].path)
    (tmp_path / "train.json").write_text(json.dumps(manifest))
    old = ActivationStore.open(tmp_path / "train.json")
    assert old.tokens_of(SITES[0]) == "all"
    assert np.array_equal(old.rows(SITES[0], "cls")[:], stores["cls"].rows(SITES[0])[:])


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        ([{"site": "blocks.1.input", "tokens": "al"}], "sites: blocks.1.input cannot store 'al'; use cls, registers"),
        ([{"site": "blocks.1.input", "token": "all"}], "sites[0]: unknown key 'token'; did you mean 'tokens'?"),
        ([{"tokens": "all"}], "activations.sites[0]: the key 'site' is missing"),
        ([{"site": "blocks.x.input", "tokens": "all"}], "'blocks.x.input' is no site"),
        (["blocks.1.input="], "sites: blocks.1.input cannot store ''"),
        ([3], "activations.sites[0]: expected a site or {site: ..., tokens: ...}, got 3"),
        (["blocks.1.input", "blocks.1.input=all"], "sites: name at least one site, each once"),
        ([{"site": "embedding", "tokens": "all"}], "sites: embedding is one vector per image; leave out its tokens"),
    ],
)
def test_mistakes_in_sites_are_named(sites: list[Any], message: str) -> None:
    with pytest.raises(SparsightError) as caught:
        schema.parse(config.Activations, {"sites": sites}, "activations")
    assert message in str(caught.value)


def test_tokens_that_no_site_would_take_are_refused() -> None:
    with pytest.raises(SparsightError, match="tokens: would be ignored, because only a site without tokens of its own"):
        schema.parse(config.Activations, {"sites": ["blocks.1.input=cls", "embedding"], "tokens": "all"}, "activations")


def test_flags_give_sites_with_tokens_back() -> None:
    written = {"sites": [{"site": "blocks.1.input", "tokens": "all"}, "embedding"]}
    section = schema.parse(config.Activations, written, "activations")
    assert "blocks.1.input=all" in schema.to_flags(section)
    parser = argparse.ArgumentParser()
    schema.add_arguments(parser, config.Activations)
    arguments = parser.parse_args(shlex.split(schema.to_flags(section)))
    assert schema.from_arguments(config.Activations, arguments) == section
    assert section.tokens_by_site == {"blocks.1.input": "all", "embedding": "embedding"}


def with_sites(sites: list[Any], **saes: dict[str, Any]) -> dict[str, Any]:
    """The default configuration with these sites and changed sections of SAEs."""
    changed = copy.deepcopy(PARAMS)
    changed["activations"]["sites"] = sites
    for name, options in saes.items():
        changed["saes"][name] |= options
    return changed


ALL_AT_5 = [
    "blocks.1.input", "blocks.2.output", "blocks.3.input", "blocks.5.input=all", "blocks.5.output", "embedding",
]  # fmt: skip


def test_steering_takes_class_tokens_of_a_site_that_stores_all() -> None:
    chains = {"resae": {"tokens": "cls"}, "plain": {"tokens": "cls"}, "switch": {"tokens": "patches"}}
    run = load_run(with_sites(ALL_AT_5, topk={"tokens": "cls"}, **chains))
    assert [run.tokens_of(name) for name in ("topk", "switch", "resae", "final")] == ["cls", "patches", "cls", "cls"]
    with pytest.raises(SparsightError, match=r"pruning.steering: its SAE reads tokens all; head policies read cls"):
        load_run(with_sites(ALL_AT_5, **chains))


@pytest.mark.parametrize(
    ("sites", "saes", "message"),
    [
        (
            ALL_AT_5,
            {"topk": {"tokens": "cls"}, "switch": {"tokens": "cls"}},
            "saes.resae.tokens: a chain needs the same tokens at all its sites, stored are cls at blocks.1.input, "
            "cls at blocks.3.input, all at blocks.5.input; name them",
        ),
        (
            PARAMS["activations"]["sites"],
            {"switch": {"tokens": "patches"}},
            "saes.switch.tokens: blocks.5.input stores cls, not patches; store them there (activations.sites)",
        ),
        (
            PARAMS["activations"]["sites"],
            {"switch": {"site": "embedding", "tokens": "cls"}},
            "saes.switch.tokens: embedding is one vector per image and has no tokens 'cls'; leave it out",
        ),
    ],
)
def test_saes_of_tokens_that_are_not_stored_are_refused(sites: list[Any], saes: dict[str, Any], message: str) -> None:
    with pytest.raises(SparsightError) as caught:
        load_run(with_sites(sites, **saes))
    assert message in str(caught.value)
