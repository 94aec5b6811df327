"""End-to-end training of SAEs: its losses and gradients, what it trains on, and what it refuses."""

import copy
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, make_backbone, make_manifest, write_store
from extracted import extracted
from torch import Tensor

from sparsight import config, sae
from sparsight.activations.store import ActivationStore
from sparsight.backbones.backbone import Backbone
from sparsight.common.errors import SparsightError
from sparsight.common.seeds import derive_seed
from sparsight.common.work import Work
from sparsight.pipeline.run import load_run
from sparsight.sae import SAE
from sparsight.sae.base import Loss
from sparsight.sae.end_to_end import EndToEndLoss, EndToEndTrainer, RestOfModel, WholeImages
from sparsight.sae.evaluate import _decoded
from sparsight.sae.fit import fit
from sparsight.sae.metrics.splice import spliced

SITE, T, D = "blocks.1.input", 17, 48
POSITIONS = {"cls": [0], "patches": list(range(1, T)), "all": list(range(T))}
KINDS = sorted(sae.names())


class Recorded(EndToEndTrainer):
    """Keeps the gradients of the loss, and takes no step: Adam clips by a norm in float32."""

    def _gradients(self, i: int, total: Tensor) -> None:
        self.of_total = torch.autograd.grad(total, list(self.saes[i].parameters()), retain_graph=True)
        super()._gradients(i, total)

    def _update(self, i: int, clip: Tensor) -> None:
        pass


def rest_by_hand(backbone: Backbone, x_BTD: Tensor) -> list[Tensor]:
    """The streams after blocks 1 and 2, and the logits, by timm's own modules."""
    streams = [backbone.model.blocks[1](x_BTD)]
    streams.append(backbone.model.blocks[2](streams[0]))
    return [*streams, backbone.model.head(backbone.model.norm(streams[1])[:, 0])]


def loss_by_hand(one: SAE, backbone: Backbone, x_BTD: Tensor, positions: list[int], downstream: bool) -> Tensor:
    """The loss of a topk or relu SAE whose codes are in units of three times the model's."""
    rows = x_BTD[:, positions].flatten(0, 1) / 3
    pre = ((rows - one.b_dec) @ one.W_enc + one.b_enc).relu()
    kept = pre >= pre.topk(one.k).values[:, -1:] if one.kind == "topk" else pre > 0
    x_hat = (pre * kept) @ one.W_dec + one.b_dec
    spliced = x_BTD.clone()
    spliced[:, positions] = 3 * x_hat.view(len(x_BTD), -1, D)
    *clean, logits = rest_by_hand(backbone, x_BTD)
    *changed, changed_logits = rest_by_hand(backbone, spliced)
    log_p, log_q = logits.log_softmax(1), changed_logits.log_softmax(1)
    total = (log_p.exp() * (log_p - log_q)).sum(1).mean()
    if one.kind == "relu":
        total = total + 0.1 * one.loss_scale**0.5 * pre.sum() / len(pre)
    if downstream:
        for h, other in zip(clean, changed, strict=True):
            h_ND, other_ND = h.flatten(0, 1), other.flatten(0, 1)
            total = total + ((h_ND - other_ND) ** 2).sum() / ((h_ND - h_ND.mean(0)) ** 2).sum() / 2
    return total


@pytest.mark.parametrize("tokens", POSITIONS)
@pytest.mark.parametrize("downstream", [False, True])
@pytest.mark.parametrize("kind", ["topk", "relu"])
def test_losses_and_gradients_are_those_of_the_formula(kind: str, downstream: bool, tokens: str) -> None:
    backbone = make_backbone().double()
    x_BTD = torch.randn(3, T, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one = sae.create(kind, D, 24, 5).double()
    rest = RestOfModel(backbone, SITE, POSITIONS[tokens], 3.0, downstream)
    trainer = Recorded(rest, [one], 1e-3)
    one.start(2.0)
    before = copy.deepcopy(one)
    (loss,) = trainer.step(x_BTD)
    assert isinstance(loss, EndToEndLoss) and (loss.downstream is not None) == downstream
    by_hand = loss_by_hand(before, backbone, x_BTD, POSITIONS[tokens], downstream)
    torch.testing.assert_close(loss.total, by_hand, rtol=1e-7, atol=0)  # L1's weight is float32
    generator = torch.Generator().manual_seed(1)
    for parameter, gradient in zip(before.parameters(), trainer.of_total, strict=True):
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        ends = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                parameter.add_(direction, alpha=step)
                ends.append(loss_by_hand(before, backbone, x_BTD, POSITIONS[tokens], downstream))
                parameter.sub_(direction, alpha=step)
        slope = (ends[0] - ends[1]) / 2e-6
        assert abs(slope) > 1e-7, "a gradient that is zero would show nothing"
        torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-4, atol=1e-8)
    assert all(parameter.grad is None for parameter in backbone.parameters())


def test_tokens_that_are_not_read_pass_unchanged() -> None:
    backbone, x_BTD = make_backbone(), torch.randn(2, T, D)
    rest = RestOfModel(backbone, SITE, POSITIONS["patches"], 2.0)
    assert torch.equal(rest.rows(x_BTD), x_BTD[:, 1:].reshape(-1, D) / 2)
    spliced = rest.spliced(x_BTD, torch.zeros(2 * 16, D))
    assert torch.equal(spliced[:, 0], x_BTD[:, 0]) and not spliced[:, 1:].any()
    assert torch.equal(rest.spliced(x_BTD, rest.rows(x_BTD)), x_BTD)


def test_whole_images_are_rows_of_all_their_tokens(tmp_path: Path) -> None:
    rows = ActivationStore.open(write_store(tmp_path, 9, {SITE: (T, D)}, "all")).rows(SITE)
    images, out = WholeImages(rows), np.empty((3, T * D), np.float16)
    assert images.shape == (9, T * D)
    expected = rows[:].reshape(9, -1)[2:5]
    assert np.array_equal(images.images(2, 5), expected)
    images.images(2, 5, out)
    assert np.array_equal(out, expected)


@pytest.fixture(scope="module")
def random_store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    return ActivationStore.open(write_store(tmp_path_factory.mktemp("store"), 32, {SITE: (T, D)}, "all"))


def trained(store: ActivationStore, folder: Path, backbone: Backbone, **options: Any) -> Path:
    values = {"site": SITE, "d_sae": 96, "k": 4, "epochs": 2, "batch_size": 8 * T + 3, "lr": 3e-3, "seeds": (0,)}
    section = config.Sae("vit", **{**values, **options})
    with Work(folder / "work", "key") as work:
        labels = np.arange(len(store.rows(SITE)) // T) % 3 if section.prototype_weight else None
        fit(section, store, labels, "one", 0, work, torch.device("cpu"), {}, backbone=backbone)
        work.finish(folder / "saes")
    return folder / "saes"


def log_of(folder: Path, name: str = "one-s0") -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / name / "training.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("kind", "loss"), [("topk", "e2e"), *((kind, "e2e-downstream") for kind in KINDS)])
def test_every_variant_trains(kind: str, loss: str, random_store: ActivationStore, tmp_path: Path) -> None:
    folder = trained(random_store, tmp_path, make_backbone(), kind=kind, loss=loss, epochs=6)
    first, *_, last = log_of(folder)
    assert last["step"] == 6 * 32 // 8, "whole images: eight for a batch of 8.2"
    assert last["kl"] < first["kl"] and ("downstream" in last) == (loss == "e2e-downstream")
    one = sae.load(folder / "one-s0")
    start = sae.create(kind, D, 96, 4)
    for (name, parameter), old in zip(one.named_parameters(), start.parameters(), strict=True):
        if kind != "gated" or name != "b_gate":
            assert not torch.equal(parameter, old), name


@pytest.mark.parametrize("frozen", ["decoder", "soft-decoder", "encoder"])
def test_a_frozen_sae_trains(frozen: Any, random_store: ActivationStore, tmp_path: Path) -> None:
    folder = trained(random_store, tmp_path, make_backbone(), loss="e2e", frozen=frozen, epochs=6, lr=3e-2)
    first, *_, last = log_of(folder)
    assert last["kl"] < first["kl"]
    one, drawn = (
        sae.load(folder / "one-s0"),
        sae.create("topk", D, 96, 4, derive_seed(0, "sae", "one-s0", "init")),
    )
    assert torch.equal(one.W_dec, drawn.W_dec) == (frozen == "decoder")
    assert torch.equal(one.W_enc, drawn.W_enc) == (frozen == "encoder")
    assert (one.W_dec * drawn.W_dec).sum(dim=1).min() > 0.8 - 1e-5 or frozen == "encoder"


@pytest.mark.parametrize("tokens", ["cls", "patches"])
def test_saes_of_a_grid_have_the_bytes_that_each_has_alone(
    tokens: Any, random_store: ActivationStore, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"loss": "e2e-downstream", "tokens": tokens, "prototype_weight": 0.5}
    both = trained(random_store, tmp_path / "both", make_backbone(), seeds=(0, 1), **options)
    alone = trained(random_store, tmp_path / "alone", make_backbone(), seeds=(1,), **options)
    for name in ("sae.safetensors", "training.jsonl"):
        assert (both / "one-s1" / name).read_bytes() == (alone / "one-s1" / name).read_bytes()
    n_tokens = len(POSITIONS[tokens])
    assert log_of(both)[-1]["step"] == 2 * -(-32 // ((8 * T + 3) // n_tokens))


def test_training_that_was_killed_ends_with_the_same_bytes(
    random_store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"loss": "e2e-downstream", "kind": "relu", "seeds": (0, 1)}
    whole = trained(random_store, tmp_path / "whole", make_backbone(), **options)
    steps: Iterator[int] = iter(range(100))
    step = EndToEndTrainer.step

    def killed(self: EndToEndTrainer, *rest: Any) -> list[Loss]:
        if next(steps) in (3, 6):
            raise KeyboardInterrupt
        return step(self, *rest)

    monkeypatch.setattr(EndToEndTrainer, "step", killed)
    monkeypatch.setattr("sparsight.training.loop.Checkpoint.due", True)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            trained(random_store, tmp_path / "killed", make_backbone(), **options)
    folder = trained(random_store, tmp_path / "killed", make_backbone(), **options)
    assert next(steps) == 2 * 4 + 2, "no step was taken twice"
    for name in ("sae.safetensors", "training.jsonl", "config.json"):
        for seed in range(2):
            assert (folder / f"one-s{seed}" / name).read_bytes() == (whole / f"one-s{seed}" / name).read_bytes()


@torch.no_grad()
def test_end_to_end_the_model_changes_less_than_with_a_local_sae(tmp_path: Path) -> None:
    backbone, manifest = make_backbone(classes=2), make_manifest(tmp_path, per_class=30)
    images = backbone.normalize(manifest.split("train").batch(slice(None), backbone.preprocess))
    backbone.model.head.bias -= backbone(images).mean(dim=0)
    for parameter in backbone.model.head.parameters():
        parameter *= 20  # else hardly any output depends on the image
    stores = extracted(backbone, manifest, tmp_path, sites=(SITE,), tokens="all")
    modes, fvu = {}, {}
    x = torch.from_numpy(stores["test"].rows(SITE)[:])
    for loss in ("local", "e2e", "e2e-downstream"):
        options: dict[str, Any] = {"loss": loss, "d_sae": 24, "k": 2, "epochs": 10, "batch_size": 7 * T}
        with torch.enable_grad():
            folder = trained(stores["train"], tmp_path / loss, backbone, **options)
        one = sae.load(folder / "one-s0")
        modes[loss] = partial(_decoded, one)
        fvu[loss] = float((x - one(x)).square().sum() / (x - x.mean(0)).square().sum())
    kl = spliced(backbone, manifest.split("test"), [SITE], {"all": POSITIONS["all"]}, modes).kl
    assert max(kl["e2e"], kl["e2e-downstream"]) < 0.6 * kl["local"]
    assert fvu["local"] < fvu["e2e-downstream"] < fvu["e2e"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"site": None, "sites": (SITE, "blocks.2.input")}, "loss: e2e is of an SAE of one site, not of a chain"),
        ({"site": "blocks.1.attn"}, r"loss: e2e replaces the residual stream, .* not blocks\.1\.attn; choose"),
        ({"site": "embedding"}, r"loss: e2e replaces the residual stream, .* not embedding; choose"),
        ({"tokens": "mean"}, "loss: e2e replaces tokens, and the mean is none; read cls, patches or all"),
        ({"processes": 2, "d_sae": 64}, "loss: e2e cannot split an SAE over processes; set processes to at most 1"),
    ],
)
def test_sections_that_cannot_train_end_to_end_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SparsightError, match=message):
        config.Sae(**{"backbone": "vit", "site": SITE, "seeds": (0,), "loss": "e2e", **options})


@pytest.mark.parametrize(
    ("section", "site", "message"),
    [
        ({"loss": "e2e"}, "blocks.3.input", r"x\.loss: e2e runs the rest .*, but blocks\.3\.input stores cls; store"),
        (
            {"loss": "e2e-downstream", "site": "blocks.5.output"},
            {"site": "blocks.5.output", "tokens": "all"},
            r"x\.loss: no block comes after blocks\.5\.output; use e2e",
        ),
        (
            {"loss": "e2e", "backbone": "bare"},
            {"site": "blocks.3.input", "tokens": "all"},
            r"x\.loss: e2e compares outputs, and bare has neither classifier nor prompts",
        ),
    ],
)
def test_runs_without_what_the_loss_needs_are_refused_at_planning(
    section: dict[str, Any], site: Any, message: str, tmp_path: Path
) -> None:
    run: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text())
    (tmp_path / "weights").touch()
    bare = {"model": "timm/vit_tiny_patch16_224", "weights": str(tmp_path / "weights"), "training": "none"}
    run["backbones"]["bare"] = bare
    run["saes"] = {"x": {"backbone": "vit", "site": "blocks.3.input", "seeds": [0], **section}}
    run |= {"activations": {"sites": [site]}, "policies": {}, "steering": {}, "pruning": None}
    with pytest.raises(SparsightError, match=message):
        load_run(run)


def test_what_only_the_stage_can_see_is_refused_there(random_store: ActivationStore, tmp_path: Path) -> None:
    with pytest.raises(SparsightError, match="batch_size: 16 activations are less than the 17 of one image"):
        trained(random_store, tmp_path / "a", make_backbone(), loss="e2e", batch_size=16)
    headless = make_backbone()
    headless.model.reset_classifier(0)
    with pytest.raises(SparsightError, match="e2e compares outputs, and vit has neither classifier nor prompts"):
        trained(random_store, tmp_path / "b", headless, loss="e2e")
