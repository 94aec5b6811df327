"""The evaluation of a policy: its tables, its choices, what it refuses."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_backbone
from safetensors.torch import load_file
from studies import SECTION, Study, last_inputs, random_policy, random_sae, two_class_images, two_classes
from torch import Tensor

from sparsight import config
from sparsight.common import tables
from sparsight.common.errors import SparsightError
from sparsight.common.work import Work
from sparsight.images.manifest import Manifest
from sparsight.pruning import evaluate, last_block, outcomes, per_class
from sparsight.pruning.last_block import last_block_inputs
from sparsight.pruning.masks import unpack
from sparsight.pruning.selection import points
from sparsight.pruning.strategies import KINDS, LABELS, NONE, Row
from sparsight.steering import class_latents
from sparsight.steering.evaluate import steer


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return two_class_images(tmp_path)


@pytest.mark.parametrize("at_least", [1000, 5])
def test_class_configurations_follow_val_and_are_counted_on_images_of_all_classes(
    at_least: int, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(per_class, "_ON_ALL", 0)
    monkeypatch.setattr(per_class, "_AT_LEAST", at_least)
    study = Study(manifest)
    val = last_block_inputs(study.backbone, study.policy, manifest.split("val"), 7)
    routes = evaluate._routes(study.probe, val)
    rows = [row for row in study.rows if row.target < 0]
    on_val = dict(outcomes.run(study.strategies, rows, val, routes))
    chosen = per_class.configurations(on_val, val, 2, 0.2)
    assert set(chosen) == {name for name, kind in KINDS.items() if kind.by_class}
    for strategy, own in chosen.items():
        for c, one in own.items():
            mine, none = val.labels == c, on_val[NONE]
            candidates = [
                (group, np.mean([on_val[row].hits[mine].mean() for row in group]),
                 np.mean([on_val[row].usage[mine].mean() for row in group]))
                for (name, labels), found in points(on_val).items()
                if (name, labels) == (strategy, "oracle") for group in (point.rows for point in found)
            ]  # fmt: skip
            floor = none.hits[mine].mean() - 0.2 - 1e-9
            allowed = [usage for _, accuracy, usage in candidates if accuracy >= floor]
            (accuracy, usage), = [(a, u) for group, a, u in candidates if group == one.point.rows]  # fmt: skip
            if allowed:
                assert accuracy >= floor and usage == pytest.approx(min(allowed))
            assert one.selected == (accuracy >= floor and usage <= 0.5 * none.usage[mine].mean())
    none = study.run([NONE])[NONE]
    made = per_class.evaluate(study.strategies, chosen, study.test, none, study.routes, ["a", "b"], SECTION, 0)
    labels = study.test.labels
    first = np.arange(len(labels)) < at_least
    assert first.all() == (at_least == 1000)
    for subset, counted in zip(made.subsets, made.false_positives, strict=True):
        c = subset["class"]
        row = Row(**{key: subset[key] for key in Row._fields})
        everywhere = {"oracle": np.full(len(labels), c)}
        ((_, expected),) = outcomes.run(study.strategies, [row], study.test, everywhere)
        own = labels == c
        assert subset["accuracy"] == counted["recall"] == expected.hits[own].mean()
        assert subset["usage_last"] == pytest.approx(expected.usage[own].mean())
        assert counted["n_others"] == (first & ~own).sum()
        assert counted["false_positives"] == ((expected.predicted == c) & ~own & first).sum()
        assert counted["false_positives_none"] == ((none.predicted == c) & ~own & first).sum()
        assert counted["accuracy"] == expected.hits[first].mean()
        kept = unpack(expected.codes[own], 6).mean(axis=0) >= 0.5
        assert subset["heads"] == ", ".join(f"h{h}" for h in range(6) if kept[h])
    assert any(one.selected for own in chosen.values() for one in own.values())
    for line in made.deployed:
        route, own = study.routes[line["labels"]], chosen[line["strategy"]]
        saes = own[0].point.rows
        hits = np.stack([none.hits] * len(saes)).astype(float)
        for c in (c for c, one in own.items() if one.selected):
            everywhere = {"oracle": np.full(len(labels), c)}
            found = dict(outcomes.run(study.strategies, list(own[c].point.rows), study.test, everywhere))
            for i, row in enumerate(own[c].point.rows):
                hits[i, route == c] = found[row].hits[route == c]
        assert line["accuracy"] == pytest.approx(hits.mean())


@pytest.mark.parametrize("tabulated", [True, False])
def test_images_that_are_not_asked_for_cost_no_pass(
    tabulated: bool, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, n_run = Study(manifest), [0]
    test = study.test if tabulated else dataclasses.replace(study.test, table=None)
    edited = last_block._BlockRunner._edited

    def counted(self: Any, x_BTD: Tensor, fixed: Any, images_P: Tensor, *arguments: Any) -> np.ndarray:
        n_run[0] += len(images_P)
        return edited(self, x_BTD, fixed, images_P, *arguments)

    monkeypatch.setattr(last_block._BlockRunner, "_edited", counted)
    rows = [row for row in study.rows if row.strategy in ("class-latents-in-stream", "logit-bias")]
    wanted = np.arange(len(test)) % 4 == 0
    every: dict[Any, Any] = {}
    some: dict[Any, Any] = {}
    for found, mask in ((every, None), (some, wanted)):
        n_run[0], jobs = 0, [outcomes.Job(0, rows, study.routes, mask)]
        found |= {row: outcome for _, row, outcome in outcomes.run_several(study.strategies, jobs, test)}
        found["runs"] = n_run[0]
    assert 0 < some.pop("runs") < every.pop("runs") / 2
    for row, outcome in every.items():
        assert np.array_equal(some[row].predicted[wanted], outcome.predicted[wanted])
        assert np.array_equal(some[row].usage[wanted], outcome.usage[wanted])


def test_tables_of_the_evaluation_follow_the_contract(manifest: Manifest, tmp_path: Path) -> None:
    backbone = two_classes()
    saes = {f"sae-s{seed}": random_sae(seed) for seed in (0, 1)}
    with Work(tmp_path / "w", "key") as work:
        evaluate.evaluate(SECTION, backbone, random_policy(), saes, manifest, 0, work, 2, {})
        work.finish(tmp_path / "out")
    read = {path.stem: tables.read(path) for path in (tmp_path / "out").glob("*.parquet")}
    overall, per_class, per_head = read["overall"], read["per_class"], read["per_head"]
    numbers = {"n", "accuracy", "lo", "hi", "usage_last", "usage_all", "macs"}
    key = list(Row._fields)
    for table, more in (
        (overall, ()),
        (per_class, ("class",)),
        (per_head, ("class", "head")),
        (read["validation"], ()),
    ):
        names = [*key, *more]
        assert numbers | set(names) <= table[0].keys()
        assert len({tuple(row[k] for k in names) for row in table}) == len(table), "keys are unique"
    for strategy, kind in KINDS.items():
        own = [row for row in overall if row["strategy"] == strategy]
        assert len(own) == (3 if kind.by_class else 1) * (2 if kind.sae else 1), "one strength each"
        assert {row["labels"] for row in own} == (set(LABELS) if kind.by_class else {"none"})
    assert len(per_head) == 6 * len(per_class) == 6 * 2 * len(overall)
    for row in overall:
        parts = [r for r in per_class if all(r[k] == row[k] for k in key)]
        assert sum(r["n"] for r in parts) == row["n"] == len(manifest.split("test"))
        for name in ("accuracy", "usage_last", "usage_all", "macs"):
            assert np.average([r[name] for r in parts], weights=[r["n"] for r in parts]) == pytest.approx(row[name])
    for row in per_class:
        heads = [r for r in per_head if all(r[k] == row[k] for k in (*key, "class"))]
        assert np.mean([r["usage_last"] for r in heads]) == pytest.approx(row["usage_last"])
        assert np.mean([r["usage_all"] for r in heads]) == pytest.approx(row["usage_all"])
    macs = {row["strategy"]: row["macs"] for row in overall if row["labels"] == "none"}
    tokens, mlp = 17, 2 * 4 * 48 * 48 * 17
    assert macs["all-heads"] - macs["zero-heads"] == pytest.approx(6 * 8 * tokens * (4 * 48 + 2 * tokens))
    assert macs["zero-heads"] - macs["skip-block"] == mlp
    test_points = [row for row in read["frontier"] if row["split"] == "test"]
    assert len({(r["strategy"], r["labels"]) for r in test_points if r["chosen"]}) == len(
        {(r["strategy"], r["labels"]) for r in overall}
    )
    assert all(row["on_frontier"] or row["chosen"] for row in test_points)
    for row in test_points:
        mean = [r for r in overall if all(r[k] == row[k] for k in ("strategy", "labels", "strength", "latents"))]
        if mean:
            assert row["accuracy"] == pytest.approx(np.mean([r["accuracy"] for r in mean]))
            assert row["usage"] == pytest.approx(np.mean([r["usage_last"] for r in mean]))
    pushes = load_file(tmp_path / "out" / "head_latents.safetensors")
    torch.testing.assert_close(pushes["sae-s1"], random_policy().weight[1] @ saes["sae-s1"].W_dec.T)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["gathered_against_masked"]["max_abs_logit_difference"] < 1e-5
    assert metrics["static_policy"] is False and metrics["tabulated_masks"] == 64
    assert {line["control"] for line in metrics["matched_usage"]} == set(KINDS) - {
        "none", "reconstruct", "class-latents", "class-latents-in-stream", "skip-block", "zero-heads", "all-heads"
    }  # fmt: skip


def test_none_comes_first_wherever_the_configuration_names_it(manifest: Manifest) -> None:
    study = Study(manifest, saes=1)
    section = dataclasses.replace(SECTION, strategies=("class-latents-in-stream", "zero-heads", "logit-bias", "none"))
    choices = evaluate._choices(section, study.strategies, study.test, study.routes)
    order = [row.strategy for row in choices.outcomes]
    assert order[0] == "none" and order == sorted(order, key=["none", *section.strategies].index)
    assert next(iter(choices.chosen)) == ("none", "none")


def test_a_policy_or_an_sae_of_another_model_is_refused(manifest: Manifest, tmp_path: Path) -> None:
    backbone = two_classes()
    one = random_sae(0)
    narrow = make_backbone(classes=2, embed_dim=36, num_heads=6)
    with Work(tmp_path / "w", "key") as work:
        with pytest.raises(SparsightError, match=r"another model \(width 48, 6 heads, 3 blocks\) than this .*width 36"):
            evaluate.evaluate(SECTION, narrow, random_policy(), {"sae-s0": one}, manifest, 0, work, 2, {})
        one.about["site"] = "blocks.1.input"
        with pytest.raises(SparsightError, match=r"the SAE reads blocks\.1\.input.* steered at blocks\.2\.input"):
            evaluate.evaluate(SECTION, backbone, random_policy(), {"sae-s0": one}, manifest, 0, work, 2, {})
    with pytest.raises(SparsightError, match="the head policy is for a model of width 48, not 36"):
        narrow(torch.zeros(1, 1, 16, 16), policy=random_policy())


def test_in_stream_steering_equals_editing_the_input_of_the_last_block(manifest: Manifest, tmp_path: Path) -> None:
    backbone, one = two_classes(), random_sae(0)
    section = config.Steering(sae="topk", latents=5, strengths=(2.0, 30.0))
    x_train = last_inputs(backbone, manifest, "train")[:, 0].numpy()

    class Store:
        tokens = "cls"
        path = tmp_path

        def rows(self, site: str, tokens: str) -> np.ndarray:
            assert (site, tokens) == ("blocks.2.input", "cls")
            return x_train

    stores: Any = {"train": Store()}

    with Work(tmp_path / "w", "key") as work:
        steer(section, {"s": [one]}, backbone, stores, {}, manifest, 0, work, {})
        work.finish(tmp_path / "out")
    table = tables.read(tmp_path / "out" / "s.parquet")
    found = class_latents.ClassLatents.load(tmp_path / "out" / "s.safetensors", torch.device("cpu"))
    val = manifest.split("val")
    x, truth = last_inputs(backbone, manifest, "val"), torch.tensor(val.labels).long()

    def accuracy(cls: Tensor) -> float:
        edited = torch.cat([cls[:, None], x[:, 1:]], dim=1)
        logits = backbone.classify(backbone.run_blocks(edited, 2, 3)[0])
        return float((logits.argmax(dim=1) == truth).float().mean())

    def row(**wanted: Any) -> dict[str, Any]:
        (found_row,) = [r for r in table if all(r[k] == v for k, v in wanted.items())]
        return found_row

    edit = class_latents.class_edit(one, one.encode(x[:, 0]).dense(), truth, found)
    for strength in section.strengths:
        got = row(method="class-latents", labels="oracle", split="val", strength=strength)["accuracy"]
        assert got == pytest.approx(accuracy(x[:, 0] + (strength - 1) * edit))
    assert row(method="none", split="val")["accuracy"] == pytest.approx(accuracy(x[:, 0]))
    assert row(method="reconstruct", split="val")["accuracy"] == pytest.approx(accuracy(one(x[:, 0])))
    for method in ("class-latents", "random-latents", "mean-difference"):
        for labels in ("predicted", "oracle"):
            best = max(
                (r for r in table if (r["method"], r["labels"], r["split"]) == (method, labels, "val")),
                key=lambda r: (r["accuracy"], -r["strength"]),
            )
            assert row(method=method, labels=labels, split="test")["strength"] == best["strength"]


def test_the_unpruned_model_is_the_one_before_fine_tuning(manifest: Manifest) -> None:
    whole, policy, test = two_classes(), random_policy(), manifest.split("test")
    policy.finetuned = {name: -value for name, value in whole.model.state_dict().items()}
    hits, difference = evaluate._other_ways(whole, policy.own(whole), policy, test, 7)
    images = whole.normalize(test.batch(slice(None), whole.preprocess))
    assert np.array_equal(hits, whole(images).argmax(dim=1).numpy() == test.labels)
    assert difference["max_abs_logit_difference"] < 1e-5 * max(1.0, difference["max_abs_logit"])
    logits = policy.own(whole)(images, policy=policy)
    assert difference["max_abs_logit"] == pytest.approx(float(logits.detach().abs().max()), rel=1e-4)
