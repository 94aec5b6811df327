"""Configuration: what is accepted, what is refused and in which words."""

import argparse
import copy
import dataclasses
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT
from hypothesis import example, given
from hypothesis import strategies as st
from snakemake.utils import update_config

from sparsight.common.errors import SparsightError
from sparsight.config import (
    Activations,
    Attribution,
    Backbone,
    Compute,
    Disentangle,
    Images,
    Policy,
    Pruning,
    Report,
    Sae,
    Spurious,
    Steering,
    schema,
)
from sparsight.config.images import members
from sparsight.pipeline.run import load_run

PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text())
CLIP = {
    "model": "open_clip/ViT-B-32", "architecture": {"vision.layers": 4}, "epochs": 1, "training": "contrastive",
}  # fmt: skip
SECTIONS = [
    Compute,
    Images,
    Backbone,
    Activations,
    Sae,
    Policy,
    Steering,
    Disentangle,
    Attribution,
    Spurious,
    Pruning,
    Report,
]


def changed(path: str, value: Any) -> dict[str, Any]:
    config: dict[str, Any] = copy.deepcopy(PARAMS)
    *parents, last = path.split("/")
    section = config
    for name in parents:
        section = section[name]
    section[last] = value
    return config


def test_default_configuration_is_valid_and_names_its_saes() -> None:
    run = load_run(PARAMS)
    several = {name: [f"{name}-s{seed}" for seed in range(3)] for name in ("topk", "final")}
    assert list(run.sae_names) == [*several["topk"], "switch-s0", *several["final"], "patches-s0"]
    assert (run.tokens_of("patches"), run.tokens_of("topk")) == ("patches", "cls")
    assert list(run.chains) == ["resae-s0", "plain-s0"]
    assert run.grids["plain"] == [f"plain-s0/blocks.{i}.input" for i in (1, 3, 5)]


EXPERIMENTS = [path for path in sorted((ROOT / "experiments").glob("*.yaml")) if path.stem not in ("papers", "dvc")]


@pytest.mark.parametrize("overlay", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_is_valid_laid_over_the_default_configuration(
    overlay: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = copy.deepcopy(PARAMS)
    update_config(config, yaml.safe_load(overlay.read_text()))
    monkeypatch.chdir(make_data(tmp_path / "here", config))
    assert load_run(config).run == overlay.stem


def make_data(here: Path, config: dict[str, Any]) -> Path:
    """A folder in which the data and the weights of a configuration seem to lie."""
    here.mkdir()
    for section in (config["images"], *config["other_images"].values()):
        source, path = section["source"], section.get("path")
        for _, folder in members(str(path)) if source == "union" else [(source, path)]:
            (here / (folder or ".")).mkdir(parents=True, exist_ok=True)
    for section in filter(None, config["backbones"].values()):
        if section.get("weights") not in (None, "pretrained"):
            weights = here / section["weights"]
            weights.parent.mkdir(parents=True, exist_ok=True)
            weights.touch()
    return here


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("saes/topk/d_seo", 64, "saes.topk: unknown key 'd_seo'; did you mean 'd_sae'?"),
        (
            "steering/neighbours/neighbour_backbone",
            "dino",
            "steering.neighbours.neighbour_backbone: there is no 'dino'",
        ),
        (
            "activations/sites",
            ["blocks.1.input", "blocks.2.output", "blocks.3.input", "blocks.5.input", "blocks.5.output"],
            "steering.neighbours: kind vs2++ compares embeddings; add embedding to activations.sites",
        ),
        ("steering/neighbours/neighbours", 0, "neighbours: must be 1 or more, got 0"),
        ("steering/class-latents/edit", "clamp", "heads need class-latents, amplify, mean-difference"),
        ("steering/class-latents/ranking", "mean", "heads need class-latents, amplify, mean-difference"),
        ("steering/class-latents/ranking", "best", "steering.class-latents.ranking: 'best' is not one of mean-diff"),
        ("backbones/clip/templates", ["published", "a {}."], "templates: 'published' needs one {} for the class name"),
        ("steerings", {}, "configuration: unknown key 'steerings'; did you mean 'steering'?"),
        ("saes/topk/d_sae", "wide", "saes.topk.d_sae: expected int, got 'wide'"),
        ("compute/threads", True, "compute.threads: expected int, got True"),
        ("compute/threads", 0, "compute.threads: must be 1 or more, got 0"),
        ("compute/device", "tpu", "compute.device: 'tpu' is not one of cpu, cuda"),
        ("images/source", "folder", "images.path: source 'folder' needs path"),
        ("saes/topk/k", 1000, "saes.topk.k: 1000 active latents are more than d_sae = 384"),
        ("saes/topk/kind", "tpok", "saes.topk.kind: there is no SAE 'tpok'; known: archetypal, batchtopk"),
        (
            "saes/topk",
            {"kind": "archetypal", "backbone": "vit", "site": "blocks.5.input", "mutual": 0.5},
            "saes.topk.mutual: is for kinds that train decoder rows directly, not archetypal; leave it out",
        ),
        (
            "saes/topk/site",
            "blocks.2.input",
            "saes.topk: activations.sites has no 'blocks.2.input'; add it there, or set",
        ),
        ("saes/topk/backbone", "vti", "saes.topk.backbone: there is no 'vti'; known: vit"),
        (
            "saes/topk/sites",
            ["blocks.1.input", "blocks.5.input"],
            "saes.topk.site: give either site (one SAE) or sites",
        ),
        ("saes/topk/affine", "zero", "saes.topk.affine: would be ignored, because only a chain (sites) reads it"),
        ("saes/resae/sites", ["blocks.5.input", "blocks.1.input"], "two or more sites in the order of the model"),
        ("saes/resae/sites", ["blocks.0.output", "blocks.1.input"], "two or more sites in the order of the model"),
        (
            "saes/resae/sites",
            ["blocks.1.input", "blocks.2.input"],
            "saes.resae: activations.sites has no 'blocks.2.input'",
        ),
        ("saes/resae/ridge", -1, "saes.resae.ridge: must be 0 or more, got -1"),
        ("steering/class-latents/sae", "resae", "'resae' is a chain; steering takes an SAE of one site"),
        ("activations/sites", ["blocks.five.input"], "'blocks.five.input' is no site"),
        ("activations/sites", ["blocks.6.input"], "'blocks.6.input' does not exist; the blocks are numbered 0 to 5"),
        ("backbones/vit", CLIP, "'blocks.5.input' does not exist; the blocks are numbered 0 to 3"),
        ("backbones/vit/weights", "nowhere.safetensors", "backbones.vit.weights: there is no file"),
        ("backbones/vit/epochs", 0, "backbones.vit.epochs: random weights need training"),
        ("steering/class-latents/sae", "topk-s0", "steering.class-latents.sae: there is no 'topk-s0'; known: topk"),
        ("steering/class-latents/latents", 200, "do not fit into d_sae = 384"),
        ("pruning/strategies", ["class-latents"], "pruning.strategies: 'none' must be among them"),
        ("pruning/strengths", [3, 2], "pruning.strengths: give at least one, rising"),
        ("pruning/latents", [0, 3], "pruning.latents[0]: must be 1 or more, got 0"),
        ("pruning/latents", [200], "pruning.latents: 200 latents and as many random others do not fit"),
        ("policies/heads/target", 0, "policies.heads.target: must be more than 0 and at most 1, got 0"),
        ("policies/heads/target", 1.5, "policies.heads.target: must be more than 0 and at most 1, got 1.5"),
        ("pruning/tolerance", "much", "pruning.tolerance: expected float, got 'much'"),
        ("run", "../up", "the name '../up' becomes a folder"),
        ("seed", "zero", "seed: expected int, got 'zero'"),
        ("seed", -1, "configuration: seed: must be 0 or more, got -1"),
        ("saes/topk/lr", float("nan"), "saes.topk.lr: must be more than 0 and finite, got nan"),
        ("saes/topk/lr", "1e400", "saes.topk.lr: must be more than 0 and finite, got inf"),
        ("saes/topk/k", "1e400", "saes.topk.k: expected int, got '1e400'"),
        ("saes/topk/seeds", [0, -1], "saes.topk.seeds[1]: must be 0 or more, got -1"),
        ("saes/topk/dead_after", 2**63, "saes.topk.dead_after: must be 1 or more and less than 2^63, got 9223"),
        ("backbones/vit/architecture", {"depth": -1}, "backbones.vit.architecture.depth: must be 0 or more, got -1"),
    ],
)
def test_mistakes_are_named_with_their_place(path: str, value: Any, message: str) -> None:
    with pytest.raises(SparsightError) as caught:
        load_run(changed(path, value))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_image_folder_is_found_before_any_work() -> None:
    config = changed("images", {"source": "folder", "path": "no/such/folder"})
    with pytest.raises(SparsightError, match="there is no folder 'no/such/folder'"):
        load_run(config)


def test_overlay_drops_a_named_section_with_null() -> None:
    config = changed("backbones/other", PARAMS["backbones"]["vit"])
    assert set(load_run(config).backbones) == {"vit", "clip", "other"}
    config["backbones"]["other"] = None
    assert set(load_run(config).backbones) == {"vit", "clip"}


def test_what_reads_a_dropped_section_goes_with_it() -> None:
    config = changed("backbones/clip", None)
    run = load_run(config)
    assert "final" not in run.saes and list(run.steering) == ["class-latents"]
    config["saes"]["final"]["backbone"] = "vit"
    assert list(load_run(config).steering) == ["class-latents", "vs2", "neighbours"]
    with pytest.raises(SparsightError, match=r"pruning\.steering: there is no 'class-latents'; known: vs2"):
        load_run(changed("saes/topk", None))


def test_without_policies_there_need_be_no_pruning() -> None:
    config = changed("policies/heads", None) | {"pruning": None}
    run = load_run(config)
    assert run.pruning is None and not run.policies
    assert load_run(changed("policies/heads", None)).pruning is not None
    with pytest.raises(SparsightError, match=r"pruning: says how the policy 'heads' is evaluated; set policies\.heads"):
        load_run(changed("pruning", None))


def test_number_without_dot_is_a_float_although_yaml_reads_a_string() -> None:
    section = yaml.safe_load("{backbone: vit, site: embedding, lr: 1e-3}")
    assert schema.parse(Sae, section, "sae").lr == 1e-3


@pytest.mark.parametrize("cls", SECTIONS)
def test_every_field_has_a_docstring(cls: type) -> None:
    assert set(schema.field_docs(cls)) == {field.name for field in dataclasses.fields(cls)}


def through_flags(section: Any) -> Any:
    parser = argparse.ArgumentParser()
    schema.add_arguments(parser, type(section))
    return schema.from_arguments(type(section), parser.parse_args(shlex.split(schema.to_flags(section))))


def test_flags_of_the_default_run_give_its_sections_back() -> None:
    run = load_run(PARAMS)
    sections: list[Any] = [run.compute, run.images, run.activations, run.pruning, run.report]
    for named in (run.backbones, run.saes, run.policies, run.steering, run.disentangle, run.attribution, run.spurious):
        sections += named.values()
    for section in sections:
        assert through_flags(section) == section


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_categories=["C"]), max_size=8), unique=True))
@example(["-1", "--limit", "", "a b", "k=v"])
def test_flags_carry_any_class_names(names: list[str]) -> None:
    section = Images(classes=tuple(names), images_per_class=3, limit=9)
    assert through_flags(section) == section


@given(title=st.text(st.characters(codec="utf-8", exclude_categories=["C"]), max_size=30), images=st.integers(1, 99))
def test_flags_carry_any_text(title: str, images: int) -> None:
    section = Report(title=title, images=images)
    assert through_flags(section) == section


def test_other_images_need_steering_that_can_be_tried_on_them(tmp_path: Path) -> None:
    other = {"source": "folder", "path": str(tmp_path)}
    config = changed("other_images", {"more": other})
    assert load_run(config).transfers == ["vs2-s0", "vs2-s1", "vs2-s2"]
    config["steering"]["vs2"] = None
    with pytest.raises(
        SparsightError, match="other_images: only steering of kind vs2 on a model that classifies is tried"
    ):
        load_run(config)
    with pytest.raises(SparsightError, match=r"other_images\.more\.path: source 'folder' needs path"):
        load_run(changed("other_images", {"more": {"source": "folder"}}))


def test_dropping_the_model_that_finds_neighbours_drops_what_asks_it() -> None:
    config = changed("steering/neighbours/neighbour_backbone", "vit")
    config["backbones"]["vit"] = None
    config["pruning"]["steering"] = "again"
    config["steering"]["again"] = {"sae": "again"}
    config["saes"]["again"] = {**config["saes"]["topk"], "backbone": "clip", "site": "blocks.5.input"}
    config["policies"]["heads"]["backbone"] = "clip"
    assert list(load_run(config).steering) == ["vs2", "again"]
