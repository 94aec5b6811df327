"""The stage that imports an SAE of another tool: what it writes, and how it says why a file does not fit."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import foreign_files as files
import numpy as np
import pytest
import torch
from conftest import TINY
from foreign_files import draw
from torch import Tensor

from sparsight import config, sae
from sparsight.activations.store import ActivationStore
from sparsight.activations.writer import Plan, StoreWriter, finish_store
from sparsight.common.errors import SparsightError
from sparsight.common.work import Work
from sparsight.config.schema import parse
from sparsight.pipeline.run import load_run
from sparsight.sae.foreign import hub
from sparsight.sae.foreign.importing import import_sae

D, F, N, RANK = 12, 20, 600, 5
RIGHT, WRONG, WIDE = "blocks.1.output", "blocks.1.input", "blocks.0.output"
NEAR = "blocks.2.output"  # as RIGHT, with as much variance that the weights do not reconstruct


def subspace(seed: int) -> tuple[Tensor, Tensor]:
    """Orthonormal rows (RANK, D), and a mean (D,) far from zero."""
    return torch.linalg.qr(draw(D, RANK, seed=seed))[0].T, 5 * draw(D, seed=seed)


def activations(seed: int) -> Tensor:
    rows, mean = subspace(seed)
    return 3 * draw(N, RANK, seed=seed) @ rows + mean


def fitting(scale: float = 3.0, centred: bool = True, size: int = F) -> dict[str, Tensor]:
    """Weights that reconstruct ``RIGHT``, but for a small bias: a latent for each end of each direction."""
    rows, mean = subspace(1)
    W_dec = torch.zeros(size, D)
    W_dec[: 2 * RANK] = torch.cat([rows, -rows])
    b_enc = torch.where(W_dec.any(dim=1), -0.1 * scale, -1.0)
    return {"W_enc": 4 * W_dec.T, "W_dec": W_dec / 4, "b_enc": 4 * b_enc, "b_dec": mean if centred else torch.zeros(D)}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    folder = tmp_path_factory.mktemp("store")
    x = activations(1)
    values = {RIGHT: x, WRONG: activations(2), WIDE: draw(N, D + 4), NEAR: x + x.std() / 2 * draw(N, D, seed=3)}
    plan = Plan(N, {site: x.shape[1:] for site, x in values.items()}, "float32", N, dict.fromkeys(values, "cls"))
    writer = StoreWriter(folder / "train.zarr", plan, folder)
    record = writer.write(0, {site: x.numpy() for site, x in values.items()}, [])
    about = {"split": "train", "token_positions": {"class": [0], "register": [], "patches": [1, 1]}, "backbone": "vit"}
    part = folder / "part.json"
    part.write_text(json.dumps({"plan": dataclasses.asdict(plan), "about": about, "shards": {0: record}}))
    finish_store(folder / "train.zarr", [part], folder / "train.json")
    return ActivationStore.open(folder / "train.zarr")


def imported(store: ActivationStore, folder: Path, path: Path, form: str = "prisma", **options: Any) -> Path:
    section = config.Sae(**{"backbone": "vit", "site": RIGHT, "weights": str(path), "format": form, **options})
    with Work(folder / "work", "key") as work:
        import_sae(section, store, "theirs", work, torch.device("cpu"), {"seed": 0})
        work.finish(folder / "saes")
    return folder / "saes" / f"theirs-s{section.seeds[0]}"


def prisma(folder: Path, weights: dict[str, Tensor], **settings: Any) -> Path:
    return files.prisma(folder, weights, hook_point_layer=1, d_in=D, **settings).path


def test_the_folder_is_that_of_an_sae_with_the_files_weights(store: ActivationStore, tmp_path: Path) -> None:
    w = fitting()
    folder = imported(store, tmp_path, prisma(tmp_path, w))
    one, x = sae.load(folder), activations(1)
    z = ((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu()
    torch.testing.assert_close(one.encode(x).dense(), z)
    about = json.loads((folder / "config.json").read_text())
    assert {key: about[key] for key in ("kind", "d_in", "d_sae", "site", "tokens", "backbone", "name")} == {
        "kind": "relu", "d_in": D, "d_sae": F, "site": RIGHT, "tokens": "cls", "backbone": "vit", "name": "theirs-s0",
    }  # fmt: skip
    assert about["k"] == round(float((z > 0).sum(dim=1).double().mean()))
    x_hat = z @ w["W_dec"] + w["b_dec"]
    fvu = float((x - x_hat).square().sum() / (x - x.mean(dim=0)).square().sum())
    assert about["imported"]["fvu"] == pytest.approx(fvu, rel=1e-4) and 0 < fvu < 0.1
    assert about["imported"]["place"] == "blocks.1.hook_resid_post"
    assert "epochs" not in about["training"] and (folder / "training.jsonl").read_text() == ""
    # The report makes the section of it.
    section = config.Sae.recorded(about["training"])
    assert (section.kind, section.d_sae, section.k, section.format) == ("relu", F, about["k"], "prisma")


def test_imports_are_equal_to_the_byte(store: ActivationStore, tmp_path: Path) -> None:
    path = prisma(tmp_path, fitting())
    a, b = (imported(store, tmp_path / name, path) for name in "ab")
    assert {f.name: f.read_bytes() for f in a.iterdir()} == {f.name: f.read_bytes() for f in b.iterdir()}


def test_normalized_folds_the_scaling_of_the_train_split_into_the_weights(
    store: ActivationStore, tmp_path: Path
) -> None:
    """In saev 0.1.0, inputs are (x - mean) / (mean ||x - mean|| / sqrt(D)); the file does not hold these numbers."""
    w, x = fitting(scale=1.0, centred=False), activations(1)
    header = {"d_vit": D, "exp_factor": 1}
    path = files.saev(tmp_path, header, "Relu", True, w).path
    one = sae.load(imported(store, tmp_path, path, "saev", normalized=True))
    mean = x.mean(dim=0)
    scale = (x - mean).norm(dim=1).mean() / D**0.5
    z = (((x - mean) / scale) @ w["W_enc"] + w["b_enc"]).relu()
    torch.testing.assert_close(one.encode(x).dense(), z, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(one(x), z @ w["W_dec"] * scale + mean, rtol=1e-4, atol=1e-4)
    with pytest.raises(
        SparsightError, match=rf"FVU \S+ at {RIGHT}, worse than .*; with normalized: true it would be 0\.0"
    ):
        imported(store, tmp_path / "raw", path, "saev")


def test_the_wrong_block_is_named(store: ActivationStore, tmp_path: Path) -> None:
    path = files.saev(tmp_path, {"d_vit": D, "exp_factor": 1}, "Relu", True, fitting()).path
    with pytest.raises(SparsightError, match=rf"FVU \S+ at {WRONG}, worse than .*; at {RIGHT} it would be 0\.0"):
        imported(store, tmp_path, path, "saev", site=WRONG)


@pytest.mark.parametrize("names", [("W_enc",), ("W_enc", "W_dec")])
def test_transposed_weights_are_named(
    names: tuple[str, ...], store: ActivationStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where d_sae = d_in, shapes do not show it."""
    w = fitting(size=D)
    path = prisma(tmp_path, w | {name: w[name].T.contiguous() for name in names})
    what = "the encoder" if len(names) == 1 else "encoder and decoder"
    try:
        imported(store, tmp_path, path)  # an FVU below 1 stops nothing
    except SparsightError as error:
        assert f"with {what} transposed it would be 0.0" in str(error)
    else:
        assert f"is this right? with {what} transposed it would be 0.0" in capsys.readouterr().err


def test_a_better_site_is_told_even_if_the_fit_is_not_bad(
    store: ActivationStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = files.saev(tmp_path, {"d_vit": D, "exp_factor": 1}, "Relu", True, fitting()).path
    imported(store, tmp_path, path, "saev", site=NEAR)
    assert f"is this right? at {RIGHT} it would be 0.0" in capsys.readouterr().err
    imported(store, tmp_path / "right", path, "saev")
    assert "would be" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("site", "settings", "message"),
    [
        (WRONG, {}, rf"it reads blocks.1.hook_resid_post \({RIGHT} here\), but site is {WRONG}; set site to {RIGHT}"),
        (
            WIDE,
            {"hook_point_layer": 0},
            rf"of {D} dimensions, but {WIDE} has {D + 4}; stored sites of that width: {WRONG}, {RIGHT}",
        ),
    ],
)
def test_a_file_that_contradicts_the_site_is_refused(
    site: str, settings: dict[str, Any], message: str, store: ActivationStore, tmp_path: Path
) -> None:
    path = files.prisma(tmp_path, fitting(), **{"hook_point_layer": 1, **settings}).path
    with pytest.raises(SparsightError, match=message):
        imported(store, tmp_path, path, site=site)


def test_the_next_blocks_input_is_the_same_place(store: ActivationStore, tmp_path: Path) -> None:
    path = files.prisma(tmp_path, fitting(), hook_point_layer=2, layer_subtype="hook_resid_pre").path
    assert imported(store, tmp_path, path).is_dir()


def test_topk_that_keeps_negative_codes_is_refused(store: ActivationStore, tmp_path: Path) -> None:
    """The TopK of saev has no ReLU, ours has one."""
    w = fitting()
    w["b_enc"] = w["b_enc"] - 6  # saev() adds 6
    header = {"schema": 1, "cfg": {"activation": {"cls": "TopK", "params": {"top_k": 8}}}}
    path = files.saev(tmp_path, header, "TopK", True, w).path
    with pytest.raises(SparsightError, match=rf"{N} of {N} activations have fewer than k = 8 positive"):
        imported(store, tmp_path, path, "saev")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 3}, "epochs: would be ignored, because only training"),
        ({"d_sae": 32, "k": 4}, "d_sae, k: would be ignored"),
        ({"kind": "relu"}, "kind: would be ignored"),
        ({"processes": 2}, "processes: would be ignored"),
        ({"format": None}, "format: say which tool wrote the weights: saev, prisma, visaebench"),
        ({"seeds": [0, 1]}, "seeds: weights are one SAE; leave seeds out, or name one"),
        ({"weights": "hf:owner/name"}, "expected hf:<owner>/<repository>/<file>, got 'hf:owner/name'"),
        ({"weights": None}, "format: would be ignored, because only an SAE of another tool"),
        ({"format": "keras"}, "'keras' is not one of saev, prisma"),
        ({"site": None, "sites": ["blocks.0.input", "blocks.1.input"]}, "sites: would be ignored"),
    ],
)
def test_settings_of_training_are_refused(options: dict[str, Any], message: str) -> None:
    section = {"backbone": "vit", "site": RIGHT, "weights": "sae.pt", "format": "saev", **options}
    with pytest.raises(SparsightError, match=message):
        parse(config.Sae, section, "saes.theirs")


def test_such_a_section_has_one_seed() -> None:
    section = {"backbone": "vit", "site": RIGHT, "weights": "sae.pt", "format": "saev"}
    assert parse(config.Sae, section, "saes.theirs").seeds == (0,)
    assert parse(config.Sae, {**section, "seeds": [3]}, "saes.theirs").seeds == (3,)


def run(path: str, latents: int = 400) -> Any:
    import yaml

    values = yaml.safe_load(Path(TINY.parent.parent / "params.yaml").read_text())
    values["saes"]["theirs"] = {"backbone": "vit", "site": "blocks.5.input", "weights": path, "format": "prisma"}
    values["steering"]["theirs"] = {"sae": "theirs", "latents": latents, "strengths": [2]}
    return load_run(values)


def test_planning_leaves_to_the_stages_what_only_the_file_tells(tmp_path: Path) -> None:
    """The default d_sae would not hold twice 400 latents, but the file's may."""
    path = prisma(tmp_path, fitting())
    section = run(str(path)).saes["theirs"]
    assert section.kinds == ("relu", "topk", "gated")
    assert section.files == [str(path), str(path.with_name("config.json"))]
    with pytest.raises(SparsightError, match=r"saes\.theirs\.weights: there is no file 'missing.pt'"):
        run("missing.pt")


def test_files_of_the_hub_are_fetched_with_what_lies_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prisma(tmp_path, fitting())
    asked = []

    def download(repository: str, file: str) -> str:
        asked.append((repository, file))
        if not (tmp_path / Path(file).name).is_file():
            raise FileNotFoundError(f"no {file}")
        return str(tmp_path / Path(file).name)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    assert hub.fetch("o/r", "a/weights.pt", ("config.yaml", "config.json")) == tmp_path / "weights.pt"
    assert asked == [("o/r", "a/weights.pt"), ("o/r", "a/config.yaml"), ("o/r", "a/config.json")]
    with pytest.raises(SparsightError, match=r"hf:o/r/b.pt is not cached and could not be downloaded \(no b.pt\)"):
        hub.fetch("o/r", "b.pt", ())


def test_the_hubs_cache_needs_no_network(
    store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the layout of the package's cache; what is not there is refused with the way out."""
    from huggingface_hub import constants

    snapshot = tmp_path / "models--owner--name" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("0" * 40)
    prisma(snapshot, fitting())
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    path = imported(store, tmp_path / "out", Path("hf:owner/name/weights.pt"))
    assert np.isfinite(json.loads((path / "config.json").read_text())["imported"]["fvu"])
    with pytest.raises(SparsightError, match=r"hf:owner/name/other\.pt is not cached and could not"):
        imported(store, tmp_path / "out", Path("hf:owner/name/other.pt"))
