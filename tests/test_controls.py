"""Controls beside a section of SAEs, backbones with random weights, and a foreign judge, from planning to report."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import yaml
import zarr
from conftest import ROOT, workspace, write_store
from runs import TINY_RUN, commands, copy_of, run_in_one_process
from snakemake.utils import update_config
from torch import Tensor

from sparsight import backbones, config, sae
from sparsight.activations.store import ActivationStore
from sparsight.backbones.fit import fit
from sparsight.common import tables
from sparsight.common.errors import SparsightError
from sparsight.common.seeds import derive_seed
from sparsight.common.work import Work
from sparsight.config.sae import Control
from sparsight.images.manifest import Manifest
from sparsight.pipeline.run import Run, load_run
from sparsight.report.cards.questions import main_sae
from sparsight.report.comparisons import comparisons, particulars
from sparsight.report.main_section import main_section, main_steering
from sparsight.sae.metrics.measure import measure
from sparsight.sae.metrics.monosemanticity import Monosemanticity, unit_rows
from sparsight.sae.metrics.sparse_codes import from_codes

PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text())
EVERY = list(get_args(Control))


def planned(**overlay: Any) -> Run:
    """The default configuration with an overlay."""
    merged = copy.deepcopy(PARAMS)
    update_config(merged, overlay)
    return load_run(merged)


def test_each_control_is_a_section_after_the_one_that_asks_for_it() -> None:
    run = planned(saes={"topk": {"controls": EVERY, "judge": "clip"}})
    own, names = run.saes["topk"], [f"topk-{control}" for control in EVERY]
    assert list(run.saes)[: 2 + len(EVERY)] == ["topk", *names, "switch"]
    frozen = dict(zip(names, ("decoder", "soft-decoder", "encoder", "none"), strict=True))
    for name in names:
        section = run.saes[name]
        assert (section.frozen, section.control_of, section.controls) == (frozen[name], "topk", ())
        same = dataclasses.replace(
            section, frozen="none", control_of=None, controls=own.controls, backbone=own.backbone
        )
        assert same == own, "nothing else differs, the judge neither"
    assert {name: run.saes[name].backbone for name in names} == dict.fromkeys(names[:3], "vit") | {
        "topk-random-weights": "vit-random"
    }
    assert set(run.grids) == set(run.saes) and run.grids[names[0]] == [f"{names[0]}-s{seed}" for seed in range(3)]


def test_a_backbone_has_one_twin_of_random_weights() -> None:
    sections = {name: {"controls": ["random-weights"]} for name in ("topk", "switch", "resae")}
    run = planned(saes=sections)
    assert list(run.backbones) == ["vit", "clip", "vit-random"]
    own, random = run.backbones["vit"], run.backbones["vit-random"]
    assert (random.model, random.architecture) == (own.model, own.architecture)
    assert (random.weights, random.training, random.epochs) == ("random", "none", 0)
    assert run.saes["resae-random-weights"].sites == run.saes["resae"].sites


def test_without_controls_nothing_is_added() -> None:
    run = planned()
    assert list(run.saes) == list(PARAMS["saes"]) and list(run.backbones) == list(PARAMS["backbones"])


def test_the_configuration_of_a_run_with_controls_can_be_read_again() -> None:
    run = planned(saes={"topk": {"controls": EVERY}})
    written = json.loads(json.dumps(dataclasses.asdict(run), sort_keys=True))
    again = load_run(
        {key: value for key, value in written.items() if value is not None} | {"pruning": written["pruning"]}
    )
    assert again.saes == run.saes and again.backbones == run.backbones


def test_null_removes_the_controls_of_a_section_and_what_depends_on_them() -> None:
    steered = {"of-control": {**PARAMS["steering"]["vs2"], "sae": "final-frozen-decoder"}}
    controls: dict[str, Any] = {"final": {"controls": ["frozen-decoder"]}}
    assert "of-control" in planned(saes=controls, steering=steered).steering
    run = planned(saes={"final": None}, steering=steered)
    assert "of-control" not in run.steering and not any(name.startswith("final") for name in run.saes)
    run = planned(saes={"topk": {"controls": EVERY}, "final": {"judge": "clip"}}, backbones={"clip": None})
    assert "final" not in run.saes and "topk-random-weights" in run.saes


def test_controls_and_the_judge_retrain_nothing() -> None:
    from sparsight.common.digests import digest
    from sparsight.config.schema import to_flags

    plain, asked = (planned(saes={"topk": more}).saes["topk"] for more in ({}, {"controls": EVERY, "judge": "clip"}))
    assert plain != asked and digest(plain) == digest(asked) and to_flags(plain) == to_flags(asked)


@pytest.mark.parametrize(
    ("overlay", "message"),
    [
        ({"topk": {"controls": ["frozen"]}}, r"saes.topk.controls\[0\]: 'frozen' is not one of frozen-decoder, soft-"),
        ({"topk": {"controls": ["soft-frozen"] * 2}}, "saes.topk.controls: name each once"),
        (
            {"topk": {"controls": ["frozen-decoder"]}, "topk-frozen-decoder": PARAMS["saes"]["topk"]},
            "saes.topk-frozen-decoder: is the name of a control of 'topk'; name this section otherwise",
        ),
        ({"topk": {"control_of": "final"}}, "saes.topk.control_of: is set by controls alone; leave it out"),
        (
            {"topk": {"kind": "archetypal", "controls": ["soft-frozen"]}},
            "saes.topk.controls: soft-frozen is not possible: frozen: the rows of archetypal begin at data",
        ),
        (
            {"topk": {"mutual": 0.1, "controls": ["frozen-decoder"]}},
            "saes.topk.controls: frozen-decoder is not possible: frozen: mutual makes decoders alike",
        ),
        (
            {"topk": {"loss": "e2e", "site": "blocks.2.output", "controls": ["random-weights"], "tokens": "patches"}},
            "saes.topk.loss: e2e runs the rest of the model on all tokens",
        ),
        ({"topk": {"backbone": "vti", "controls": ["random-weights"]}}, "saes.topk.backbone: there is no 'vti'; known"),
        ({"topk": {"judge": "vit"}}, "saes.topk.judge: 'vit' is the SAE's own backbone; name another one, or null"),
        ({"topk": {"judge": "dino"}}, "saes.topk.judge: there is no 'dino'; known: vit, clip"),
    ],
)
def test_mistakes_are_named_with_their_place(overlay: dict[str, Any], message: str) -> None:
    with pytest.raises(SparsightError, match=f"^{message}"):
        planned(saes=overlay)


def test_what_random_weights_and_the_judge_need_is_checked() -> None:
    taken = {"vit-random": PARAMS["backbones"]["vit"]}
    with pytest.raises(SparsightError, match=r"^backbones.vit-random: is the name of 'vit' with random weights"):
        planned(saes={"topk": {"controls": ["random-weights"]}}, backbones=taken)
    hub = {"model": "open_clip/hf-hub:a/b", "weights": "pretrained", "training": "contrastive"}
    merged = copy.deepcopy(PARAMS)
    update_config(merged, {"saes": {"topk": {"backbone": "clip", "controls": ["random-weights"]}}})
    merged["backbones"]["clip"] = hub
    with pytest.raises(SparsightError, match=r"^saes.topk.controls: random-weights is not possible: open_clip/hf-hub"):
        load_run(merged)
    stored = [site for site in PARAMS["activations"]["sites"] if site != "embedding"]
    with pytest.raises(SparsightError, match=r"^saes.topk.judge: compares embeddings of images; add embedding to"):
        planned(
            saes={"topk": {"judge": "clip"}}, activations={"sites": stored}, report={"words": None},
            steering={"neighbours": None},
        )  # fmt: skip
    e2e = {"site": "blocks.2.output", "loss": "e2e", "seeds": [0], "controls": ["random-weights"]}
    with pytest.raises(
        SparsightError, match=r"^saes.new-random-weights.loss: .* vit-random has neither classifier nor"
    ):
        planned(
            saes={"new": {**e2e, "backbone": "vit"}, "patches": None},
            activations={
                "sites": [{"site": "blocks.2.output", "tokens": "all"}, *stored[:1], *stored[2:], "embedding"]
            },
        )


def test_random_weights_are_neither_trained_nor_given() -> None:
    refused: list[dict[str, Any]] = [{"training": "supervised"}, {"training": "none", "epochs": 1}]
    for options in refused:
        with pytest.raises(SparsightError, match=r"^weights: random weights are a control that is not trained"):
            config.Backbone("timm/vit_tiny_patch16_224", "random", **options)


def fitted(section: config.Backbone, manifest: Manifest, folder: Path, name: str = "a", seed: int = 0) -> Any:
    with Work(folder / f"w-{name}-{seed}", "key") as work:
        fit(section, manifest, name, seed, work, torch.device("cpu"), 1, {})
        work.finish(folder / f"{name}-{seed}")
    return backbones.open_folder(folder / f"{name}-{seed}")


CLIP = {
    "embed_dim": 16, "vision.width": 24, "vision.layers": 2, "vision.head_width": 8, "vision.patch_size": 8,
    "vision.image_size": 16, "text.width": 16, "text.layers": 1, "text.heads": 2, "text.context_length": 12,
}  # fmt: skip
TIMM = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}


@pytest.mark.parametrize(
    ("model", "sizes"), [("timm/vit_tiny_patch16_224", TIMM), ("open_clip/ViT-B-32", CLIP)], ids=["timm", "open_clip"]
)
def test_a_backbone_of_random_weights_is_the_architecture_as_it_is_drawn(
    model: str, sizes: dict[str, int], labelled: Path, tmp_path: Path
) -> None:
    section, manifest = config.Backbone(model, "random", sizes, "none"), Manifest(labelled)
    (one, about), (again, _) = (fitted(section, manifest, tmp_path / str(turn)) for turn in range(2))
    others = [fitted(section, manifest, tmp_path, *other)[0] for other in (("b", 0), ("a", 1))]
    like = backbones.load(model, None, **sizes)
    pixels = one.normalize(manifest.split("test").batch(slice(0, 4), one.preprocess))
    assert one.preprocess == like.preprocess and (one.n_blocks, one.d_in) == (like.n_blocks, like.d_in)

    def embedded(backbone: backbones.Backbone) -> Tensor:
        with torch.no_grad():
            return backbone.features(pixels)

    assert torch.equal(embedded(one), embedded(again)) and embedded(one).std(dim=0).max() > 1e-4
    assert not any(torch.equal(embedded(one), embedded(other)) for other in others), "name and seed decide the weights"
    assert not one.n_classes and about["accuracy"] == {} and about["templates"] == []
    assert (about["training"], about["weights"], about["licence"]) == ("none", "random", "drawn by this run")


def test_random_weights_of_an_image_text_model_name_no_latents() -> None:
    saes = {"own": {"backbone": "clip", "site": "blocks.1.input", "controls": ["random-weights"]}}
    run = planned(saes=saes)
    assert run.namer_of("clip") == run.namer_of("clip-random") == run.namer_of("vit") == ["clip"]


def test_controls_are_told_apart_and_drawn_beside_their_section() -> None:
    saes = planned(saes={"topk": {"controls": EVERY}, "resae": {"controls": ["frozen-encoder"]}}).saes
    words = [particulars(saes[f"topk-{control}"]) for control in EVERY]
    assert words == [
        ("frozen decoder",), ("soft-frozen decoder",), ("frozen encoder",), ("backbone of random weights",)
    ]  # fmt: skip
    drawn = {one.name: one.members for one in comparisons(saes)}
    assert drawn["vit-blocks.5.input"] == ("topk", *(f"topk-{control}" for control in EVERY[:3]), "switch")
    assert drawn["resae"] == ("resae", "resae-frozen-encoder", "plain")


def test_the_first_screen_is_never_about_a_control() -> None:
    saes = {"topk": {}, "topk-soft-frozen": {"control_of": "topk"}}
    steering = {"first": {"sae": "topk-soft-frozen"}, "second": {"sae": "topk"}}
    run: dict[str, Any] = {"saes": saes, "steering": steering, "pruning": {"steering": "first"}}
    assert (main_steering(run), main_section(run)) == ("second", "topk")
    assert main_steering({**run, "steering": {"first": steering["first"]}}) is None


D, F, K, C = 12, 32, 4, 3
SITE = "blocks.1.input"
N = {"train": 200, "val": 80, "test": 120}


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ActivationStore]:
    """Of the SAE's backbone by split, and ``judge``: of another on the test split, in a folder of its name."""
    made, root = {}, tmp_path_factory.mktemp("activations")
    for seed, (name, n) in enumerate(N.items()):
        path = write_store(root / name, n, {SITE: (D,), "embedding": (7,)}, seed=seed, dtype="float32")
        made[name] = ActivationStore.open(path)
    path = write_store(root / "dino", N["test"], {"embedding": (5,)}, seed=9, dtype="float32")
    zarr.open_group(path, mode="r+")["embedding"][:] += 1
    return made | {"judge": ActivationStore.open(path)}


def measured(stores: dict[str, ActivationStore], judge: ActivationStore | None, kind: str = "topk") -> Any:
    one = sae.create(kind, D, F, K).requires_grad_(False)
    labels = {name: np.arange(n) % C for name, n in N.items()}
    return one, measure([one], SITE, {name: stores[name] for name in N}, labels, C, 0, judge=judge)[0]


@pytest.mark.parametrize("kind", ["topk", "relu"])
def test_a_judge_adds_its_scores_and_changes_nothing_else(stores: dict[str, ActivationStore], kind: str) -> None:
    _, plain = measured(stores, None, kind)
    one, judged = measured(stores, stores["judge"], kind)
    methods = ("random", "kmeans", "neurons")
    added = {"judge", "monosemanticity_judge", "monosemanticity_judge_of_all_images",
             *(f"monosemanticity_judge_{method}" for method in methods)}  # fmt: skip
    assert judged.metrics.keys() - plain.metrics.keys() == added and judged.metrics["judge"] == "dino"
    assert {key: judged.metrics[key] for key in plain.metrics} == plain.metrics
    for with_judge, without in ((judged.latents, plain.latents), (judged.baselines, plain.baselines)):
        for row, own in zip(with_judge, without, strict=True):
            score = row.pop("monosemanticity_judge")
            assert repr(row) == repr(own) and isinstance(score, float)
            row["monosemanticity_judge"] = score
    assert list(judged.baselines[0])[-1] == "monosemanticity_judge"
    assert judged.probing == plain.probing

    embeddings = unit_rows(stores["judge"].rows("embedding")[:])
    reference = Monosemanticity(F, 5)
    reference.update(from_codes(one.encode(stores["test"].rows(SITE)[:])), embeddings)
    scores = reference.scores()
    np.testing.assert_allclose([row["monosemanticity_judge"] for row in judged.latents], scores, rtol=1e-9)
    assert judged.metrics["monosemanticity_judge"] == pytest.approx(np.nanmean(scores))
    cosines = (embeddings @ embeddings.T)[np.triu_indices(N["test"], 1)]
    assert judged.metrics["monosemanticity_judge_of_all_images"] == pytest.approx(cosines.mean())
    by_method = {row["method"]: row["monosemanticity_judge"] for row in judged.baselines}
    assert {method: judged.metrics[f"monosemanticity_judge_{method}"] for method in methods} == {
        method: by_method[method] for method in methods
    }


def test_a_judge_of_other_images_is_refused(stores: dict[str, ActivationStore]) -> None:
    with pytest.raises(SparsightError, match="80 images, but the manifest of images lists 120; extract again"):
        measured(stores, stores["val"])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of tiny-controls.yaml."""
    folder = workspace(tmp_path_factory.mktemp("controls") / "run", ROOT / "tests" / "tiny-controls.yaml")
    return run_in_one_process(folder) / TINY_RUN


@pytest.mark.slow
def test_a_run_trains_and_measures_every_control(run: Path) -> None:
    frozen = {"frozen-decoder": "decoder", "soft-frozen": "soft-decoder", "frozen-encoder": "encoder"}
    own = json.loads((run / "saes" / "topk-s0" / "metrics.json").read_text())
    for control in EVERY:
        for seed in (0, 1):
            folder = run / "saes" / f"topk-{control}-s{seed}"
            about = json.loads((folder / "config.json").read_text())
            assert about["training"]["control_of"] == "topk" and "judge" not in about["training"]
            assert about["training"]["frozen"] == frozen.get(control, "none")
            metrics = json.loads((folder / "metrics.json").read_text())
            assert metrics["judge"] == "clip" and 0 < metrics["monosemanticity_judge"] <= 1
            assert own.keys() - metrics.keys() == (
                {
                    key
                    for key in own
                    if "spliced" in key or "mean_instead" in key or key in ("accuracy_untouched", "kl_recovered")
                }
                if control == "random-weights"
                else set()
            )
            columns = tables.read(folder / "latents.parquet")[0], tables.read(folder / "baselines.parquet")[0]
            assert all("monosemanticity_judge" in row for row in columns)
            W_dec = sae.load(folder).W_dec
            drawn = sae.create("topk", 24, 48, 4, derive_seed(0, "sae", folder.name, "init")).W_dec
            cosine = (W_dec * drawn).sum(dim=1).min()
            assert torch.equal(W_dec, drawn) == (control == "frozen-decoder")
            assert cosine > 0.8 - 1e-5 or control in ("frozen-encoder", "random-weights")
        assert (run / "saes" / f"topk-{control}-stability.json").is_file()
    assert json.loads((run / "saes" / "topk-random-weights-s0" / "config.json").read_text())["backbone"] == "vit-random"
    for site in ("blocks.1.input", "blocks.2.input"):
        metrics = json.loads((run / "saes" / "resae-frozen-decoder-s0" / site / "metrics.json").read_text())
        assert metrics["judge"] == "clip" and metrics["monosemanticity_judge_random"]


@pytest.mark.slow
def test_the_report_shows_the_controls_beside_their_section(run: Path) -> None:
    page = (run / "report" / "index.html").read_text()
    for words in ("frozen decoder", "soft-frozen decoder", "frozen encoder", "backbone of random weights"):
        assert f"topk, {words}, 48 latents" in page, words
    assert "Another judge." in page and "resae-frozen-decoder, blocks.1.input" in page
    inputs = {
        "configuration": run / "configuration.json",
        "saes": sorted((run / "saes").glob("topk*-s*/metrics.json"), key=lambda path: len(path.parent.name)),
        "chains": [],
    }
    main = main_sae(inputs)
    assert main is not None and main.name == "topk"
    flat = json.loads((run / "metrics.json").read_text())
    assert flat["sae.topk-soft-frozen-s1.monosemanticity_judge"] > 0
    assert not any(key.startswith("backbone.vit-random") for key in flat)


@pytest.mark.slow
def test_controls_and_a_judge_that_come_or_go_leave_training_as_it_was(run: Path, tmp_path: Path) -> None:
    folder = copy_of(run.parent.parent, tmp_path / "own")
    assert not any("/sae.py" in command or "/evaluate" in command for command in commands(folder))
    overlay = yaml.safe_load((folder / "tiny.yaml").read_text())
    for section in ("topk", "resae"):
        del overlay["saes"][section]["controls"], overlay["saes"][section]["judge"]
    (folder / "tiny.yaml").write_text(yaml.safe_dump(overlay))
    plan = commands(folder)
    assert not any("/sae.py" in command or "/backbone.py" in command for command in plan)
    again = {command.split("--name ")[1].split()[0] for command in plan if "/evaluate" in command}
    assert again == {"topk", "resae"}, "the judge's store is an input"
