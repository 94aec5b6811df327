"""Steering at several sites in one pass: the model run block by block, the configuration, the workflow.

Shapes: B batch, D width (d_in), F latents (d_sae).
"""

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, TINY, make_backbone, make_manifest, snakemake, workspace
from extracted import Stores, extracted
from torch import Tensor

from sparsight import config, sae
from sparsight.backbones.backbone import Backbone
from sparsight.common import tables
from sparsight.common.errors import SparsightError
from sparsight.common.work import Work
from sparsight.images.manifest import Manifest
from sparsight.images.split import Split
from sparsight.pipeline.run import load_run
from sparsight.sae import SAE
from sparsight.steering import controls, vs2
from sparsight.steering.class_latents import ClassLatents
from sparsight.steering.edits import Batch, Edits
from sparsight.steering.evaluate import steer
from sparsight.steering.intervention import Intervention, attribution
from sparsight.steering.runner import Planned, Row, Runner, run_together
from sparsight.steering.vs2pp import NeighbourSteering

PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text())
D, F, K = 48, 96, 6
SITES = ("blocks.1.input", "blocks.1.output", "blocks.2.output")
STARTS = (1, 2, 3)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_manifest(tmp_path_factory.mktemp("images"), per_class=20)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return make_backbone(classes=2)


@pytest.fixture(scope="module")
def stores(backbone: Backbone, manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Stores:
    return extracted(backbone, manifest, tmp_path_factory.mktemp("store"), sites=(*SITES, "embedding"), tokens="all")


def make_saes(tokens: str = "all") -> list[SAE]:
    saes = [sae.create("topk", D, F, K, seed=seed).requires_grad_(False) for seed in range(3)]
    for one, site in zip(saes, SITES, strict=True):
        one.about = {"site": site, "tokens": tokens, "training": {"prototype_weight": 0.0}}
    return saes


def run(folder: Path, backbone: Backbone, stores: Stores, manifest: Manifest, saes: list[SAE], **options: Any) -> Path:
    section = config.Steering(**{"sae": "a", "layers": ("b", "c")[: len(saes) - 1], "strengths": (2.0,), **options})
    with Work(folder / "work", "key") as work:
        steer(section, {"s": saes}, backbone, stores, stores, manifest, 0, work, {})
        work.finish(folder / "out")
    return folder / "out"


def block_by_block(
    backbone: Backbone, x: Tensor, edits: Edits, row: Row, classes: Tensor | None, positions: list[int]
) -> Tensor:
    """The stream after the last block: at every site each token is edited by itself, then the next blocks run."""
    block = STARTS[0]
    for start, own in zip(STARTS, edits, strict=True):
        x, block = backbone.run_blocks(x, block, start)[0].clone(), start
        before = x.clone()
        for t in positions:
            batch = Batch(before[:, t], classes, row.labels, slice(0, len(x)))
            x[:, t] = own[row.method].apply(batch, row.strength)
    return x


@pytest.mark.parametrize(("tokens", "positions"), [("cls", [0]), ("patches", list(range(1, 17)))])
@pytest.mark.parametrize("kind", ["class-latents", "vs2", "vs2++"])
def test_every_method_edits_every_site_in_one_pass(
    kind: Any, tokens: Any, positions: list[int], backbone: Backbone, stores: Stores, manifest: Manifest, tmp_path: Path
) -> None:
    saes, truth = make_saes(), {name: manifest.split(name).labels for name in stores}
    options: dict[str, Any] = {"class-latents": {"latents": 4}, "vs2": {}, "vs2++": {"neighbours": 5}}[kind]
    out = run(tmp_path, backbone, stores, manifest, saes, kind=kind, tokens=tokens, **options)
    runner, path = Runner(saes, backbone, tokens), out / "s.safetensors"
    further, cpu, places = (None, *SITES[1:]), torch.device("cpu"), runner.where.places
    edits: Edits
    if kind == "class-latents":
        found = [ClassLatents.load(path, cpu, site) for site in further]
        edits = [controls.edits(one, own, "amplify") for one, own in zip(saes, found, strict=True)]
    elif kind == "vs2":
        gates = [vs2.Calibration.load(path, cpu, site) for site in further]
        assert not torch.equal(gates[0].permutation, gates[1].permutation)
        edits = vs2.edits_by_site(places, gates)
    else:
        edits = NeighbourSteering(5, places, backbone, stores, stores, truth, [1, 2, 3]).edits("test")
    images = backbone.normalize(manifest.split("test").batch(slice(None), backbone.preprocess))
    x = backbone.run_blocks(backbone.tokens(images), 0, STARTS[0])[0]
    classes = torch.from_numpy(truth["test"]).long()
    for method, edit in edits[0].items():
        if edit.at != "site":
            continue
        row = Row(method, 3.0, "oracle" if "oracle" in edit.labels else "none")
        given = classes if row.labels == "oracle" else None
        expected = block_by_block(backbone, x, edits, row, given, positions)
        with mock.patch.object(Backbone, "classify", lambda self, after: after):
            got = runner._steered(x, row, edits, given, slice(0, len(x)))
        torch.testing.assert_close(got, expected, atol=2e-3, rtol=1e-3)
        one_site = block_by_block(backbone, x, [edits[0], *[{method: _none()}] * 2], row, given, positions)
        assert (expected - one_site).abs().max() > 0.01, "the later sites are edited too"
    rows, summary = tables.read(out / "s.parquet"), json.loads((out / "s.json").read_text())
    assert {row["method"] for row in rows} >= {*edits[0], "reconstruct"} and summary["layers"] == ["b", "c"]
    tokens_edited = 3 * len(positions)
    assert summary["cost"]["edit_macs"] == tokens_edited * (D * F + K * D)


def _none() -> Any:
    return mock.Mock(apply=lambda batch, strength: batch.x)


@pytest.mark.parametrize("kind", ["class-latents", "vs2", "vs2++"])
def test_seeds_that_steer_together_get_the_files_that_each_gets_alone(
    kind: Any, backbone: Backbone, stores: Stores, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams, read = [0], Intervention.streams

    def counted(self: Intervention, split: Split) -> Iterator[tuple[slice, Tensor]]:
        streams[0] += 1
        return read(self, split)

    monkeypatch.setattr(Intervention, "streams", counted)
    options: dict[str, Any] = {"class-latents": {"latents": 4}, "vs2": {}, "vs2++": {"neighbours": 5}}[kind]
    section = config.Steering(sae="a", layers=("b",), kind=kind, strengths=(0.5, 2.0), tokens="patches", **options)
    seeds: dict[str, list[SAE]] = {}
    for seed in range(3):
        seeds[f"s-s{seed}"] = make_saes()[:2]
        for one in seeds[f"s-s{seed}"]:
            one.W_enc.copy_(one.W_enc.roll(seed, dims=0))

    def made(saes: dict[str, list[SAE]], name: str) -> Path:
        with Work(tmp_path / "work", name) as work:
            steer(section, saes, backbone, stores, stores, manifest, 0, work, {})
            work.finish(tmp_path / name)
        return tmp_path / name

    together = made(seeds, "together")
    assert streams == [2], "val and test, once for all seeds"
    for name, saes in seeds.items():
        for file in made({name: saes}, name).iterdir():
            assert file.read_bytes() == (together / file.name).read_bytes(), file.name
    first, second = ((together / f"s-s{seed}.parquet").read_bytes() for seed in range(2))
    assert first != second and len(list(together.iterdir())) == 3 * 4


def test_the_gate_asks_every_site(backbone: Backbone, stores: Stores, manifest: Manifest, tmp_path: Path) -> None:
    saes = make_saes()[:2]
    options: dict[str, Any] = {"kind": "vs2", "tokens": "cls", "quantiles": (0.6,)}
    out = run(tmp_path / "both", backbone, stores, manifest, saes, **options)
    below = []
    for i, one in enumerate(saes):
        alone = run(tmp_path / str(i), backbone, stores, manifest, [one], **options)
        found = vs2.Calibration.load(alone / "s.safetensors", torch.device("cpu"))
        gates = [found]
        ((_, (fvu,)),) = run_together(
            [Planned(Runner([one], backbone, "cls"), [], [{}], gates)], manifest.split("test")
        )
        below.append(fvu <= found.threshold(0.6))
    (line,) = (line for line in json.loads((out / "s.json").read_text())["gate"] if line["split"] == "test")
    assert line["steered"] == pytest.approx(np.mean(below[0] & below[1])) and len(line["thresholds"]) == 2


def test_attribution_at_each_site_is_that_of_the_site_alone(backbone: Backbone, manifest: Manifest) -> None:
    saes, train = make_saes(), manifest.split("train")
    together = attribution(Intervention(saes, backbone, "all"), train, 2)
    for one, got in zip(saes, together, strict=True):
        (alone,) = attribution(Intervention([one], backbone, "all"), train, 2)
        torch.testing.assert_close(got, alone, atol=1e-5, rtol=1e-3)


def test_sites_out_of_order_are_refused(backbone: Backbone) -> None:
    first, second, third = make_saes()
    for saes in ([second, first], [first, third, third]):
        with pytest.raises(SparsightError, match=r"the sites are blocks.*; give each once, in the order of the model"):
            Intervention(saes, backbone)


LATER = {"kind": "topk", "backbone": "clip", "site": "blocks.5.output", "d_sae": 256, "k": 8, "seeds": [0, 1, 2]}
EARLIER = {**LATER, "site": "blocks.3.input"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steering.vs2.layers": ["finall"]}, "steering.vs2.layers: there is no 'finall'; known: topk"),
        ({"steering.vs2.layers": ["resae"]}, "steering.vs2.layers: 'resae' is a chain"),
        ({"steering.vs2.layers": ["topk"]}, "steering.vs2.layers: 'topk' is of backbone 'vit', not of 'clip'"),
        (
            {"saes.more": {**LATER, "seeds": [0, 1]}, "steering.vs2.layers": ["more"]},
            "steering.vs2.layers: 'more' has no seed 2, which 'final' has; add it",
        ),
        (
            {"saes.early": EARLIER, "steering.vs2.layers": ["early"]},
            "steering.vs2.layers: the sites are blocks.5.output, blocks.3.input; give each once, in the order of",
        ),
        (
            {"saes.more": LATER, "steering.vs2.layers": ["more"]},
            "steering.vs2.layers: the sites are blocks.5.output, blocks.5.output; give each once",
        ),
        (
            {"saes.early": {**EARLIER, "backbone": "vit", "d_sae": 384}, "steering.class-latents.sae": "early",
             "steering.class-latents.layers": ["topk"]},
            "pruning.steering: 'class-latents' has layers, but heads are steered at the last block's input alone",
        ),
        ({"steering.vs2.tokens": "patches"}, "steering.vs2.sae: 'final' reads tokens cls and cannot steer tokens"),
        ({"steering.vs2.tokens": "mean"}, "steering.vs2.tokens: .*mean"),
        ({"activations.tokens": "patches"}, "pruning.steering: its SAE reads tokens patches; head policies read cls"),
    ],
)  # fmt: skip
def test_what_does_not_fit_together_is_one_line(changes: dict[str, Any], message: str) -> None:
    values = copy.deepcopy(PARAMS)
    for path, value in changes.items():
        *above, key = path.split(".")
        section = values
        for name in above:
            section = section[name]
        section[key] = value
    with pytest.raises(SparsightError, match=message) as caught:
        load_run(values)
    assert "\n" not in str(caught.value)


def test_a_dropped_layer_drops_what_steers_with_it() -> None:
    values = copy.deepcopy(PARAMS)
    values["saes"] |= {"early": {**EARLIER}, "gone": None}
    values["steering"]["vs2"] |= {"sae": "early", "layers": ["final"]}
    run = load_run(values)
    assert run.steering["vs2"].layers == ("final",) and run.steering["neighbours"].layers == ()
    values["steering"]["vs2"]["layers"] = ["gone"]
    assert "vs2" not in load_run(values).steering


def test_the_workflow_waits_for_the_saes_of_every_layer(tmp_path: Path) -> None:
    overlay = tmp_path / "layers.yaml"
    early = "  early: {kind: switch, experts: 2, backbone: clip, site: blocks.1.input, d_sae: 48, k: 4, seeds: [0]}\n"
    text = TINY.read_text().replace("saes:\n", "saes:\n" + early)
    overlay.write_text(text.replace("vs2: {strengths", "vs2: {sae: early, layers: [final], strengths"))
    plan = snakemake(workspace(tmp_path / "w", overlay), "--dry-run", "--printshellcmds", "--forceall")
    assert plan.returncode == 0, plan.stderr
    (command,) = re.findall(r"python \S*steering.py .*--name vs2 .*", plan.stdout + plan.stderr)
    assert "--from-saes results/tiny/saes/early-s0/sae.safetensors" in command
    assert "--from-layers results/tiny/saes/final-s0/sae.safetensors --name" in command
    assert "--layers=final" in command
