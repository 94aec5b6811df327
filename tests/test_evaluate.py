"""What the evaluation says of SAEs and chains, against numpy and plain forward passes with hooks."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from conftest import make_backbone, make_folder, write_store
from sklearn.metrics.pairwise import cosine_similarity
from torch import Tensor

from sparsight import config, sae
from sparsight.activations.store import ActivationStore
from sparsight.backbones.backbone import Backbone
from sparsight.common import tables
from sparsight.common.work import Work
from sparsight.images.manifest import Manifest, write_manifest
from sparsight.images.split import Split
from sparsight.sae import SAE
from sparsight.sae import evaluate as sae_evaluate
from sparsight.sae.evaluate import chain_errors, evaluate, evaluate_chains, redundancies
from sparsight.sae.metrics.measure import measure
from sparsight.sae.metrics.splice import Clean, Replacement, spliced
from sparsight.sae.moments import by_group, fit_moments
from sparsight.sae.resae import ReSAE, fit_maps

D, F, K = 48, 96, 4
SITES = ["blocks.1.input", "blocks.2.input"]
CPU = torch.device("cpu")
SPLITS = ("train", "val", "test")
Stores = dict[str, ActivationStore]


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Split:
    folder = tmp_path_factory.mktemp("images")
    make_folder(folder / "images", per_class=30)
    write_manifest(config.Images(source="folder", path=str(folder / "images")), 0, {}, 2, folder / "m.parquet")
    return Manifest(folder / "m.parquet").split("train")


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Stores:
    """By split: 17 tokens (class, register, patches) at both sites, the second one partly a map of the first."""
    made = {}
    for seed, name in enumerate(SPLITS):
        path = write_store(
            tmp_path_factory.mktemp("store"), 64, dict.fromkeys(SITES, (17, D)), "all", seed, dtype="float32"
        )
        group = zarr.open_group(path, mode="r+")
        maps = np.random.default_rng(5).standard_normal((D, D)).astype(np.float32) / 7
        group[SITES[1]][:] = group[SITES[0]][:] @ maps + 0.5 * group[SITES[1]][:] + 3
        made[name] = ActivationStore.open(path)
    return made


def random_sae(seed: int) -> SAE:
    one = sae.create("topk", D, F, K, seed=seed).requires_grad_(False)
    one.about = {"tokens": "all"}
    return one


def random_chain(train: ActivationStore) -> ReSAE:
    maps = fit_maps(SITES, fit_moments(by_group(train, SITES, CPU), SITES))
    return ReSAE(SITES, {site: random_sae(i) for i, site in enumerate(SITES)}, maps)


def fvu(x: np.ndarray, x_hat: np.ndarray) -> float:
    x, x_hat = (a.reshape(-1, D).astype(np.float64) for a in (x, x_hat))
    return float(np.square(x - x_hat).sum() / np.square(x - x.mean(axis=0)).sum())


def test_reconstruction_metrics_are_those_of_all_rows_at_once(stores: Stores) -> None:
    one = random_sae(0)
    labels = dict.fromkeys(SPLITS, np.arange(64) % 2)
    (measured,) = measure([one], SITES[1], stores, labels, 2, 0)
    found = measured.metrics
    train, test = (
        np.asarray(stores[name].rows(SITES[1])[:]).reshape(-1, D).astype(np.float64) for name in ("train", "test")
    )
    codes = one.encode(test.astype(np.float32))
    assert found["n"] == len(test) == 64 * 17
    assert found["fvu"] == pytest.approx(fvu(test, one.decode(codes).numpy()), rel=1e-6)
    components = np.linalg.svd(train - train.mean(axis=0))[2][:K]
    pca = train.mean(axis=0) + (test - train.mean(axis=0)) @ components.T @ components
    assert found["fvu_pca_k"] == pytest.approx(fvu(test, pca), rel=1e-6)
    assert found["l0"] == pytest.approx(float((codes.dense() > 0).sum(dim=1).double().mean()))
    assert found["dead_test"] == int((~(codes.dense() > 0).any(dim=0)).sum())


def test_saes_measured_together_are_measured_as_alone(stores: Stores) -> None:
    labels = dict.fromkeys(SPLITS, np.arange(64) % 2)
    saes = [random_sae(seed) for seed in range(3)]
    together = measure(saes, SITES[1], stores, labels, 2, 0)
    alone = [measure([one], SITES[1], stores, labels, 2, 0)[0] for one in saes]
    assert repr(together) == repr(alone), "not a number included"
    assert len({found.metrics["fvu"] for found in together}) == 3


def test_chain_metrics_are_those_of_all_rows_at_once(stores: Stores) -> None:
    chain = random_chain(stores["train"])
    labels = dict.fromkeys(SPLITS, np.arange(64) % 2)
    found = chain_errors(chain, stores["test"])
    seen_by = {site: measure([chain.saes[site]], site, stores, labels, 2, 0, chain)[0] for site in SITES}
    x = {site: torch.from_numpy(np.asarray(zarr.open_group(stores["test"].path)[site][:])) for site in SITES}
    hat: dict[str, list[np.ndarray]] = {"fvu": [], "fvu_unchained": [], "fvu_affine": []}
    residuals = []
    for group, at in {"cls": slice(0, 1), "registers": slice(1, 2), "patches": slice(2, 17)}.items():
        h, after = (x[site][:, at].reshape(-1, D) for site in SITES)
        A, c = (t.float() for t in chain.maps[group][0])
        residual = after - h @ A.T - c
        mine, first = chain.saes[SITES[1]](residual), chain.saes[SITES[0]](h)
        hat["fvu"].append((first @ A.T + c + mine).reshape(64, -1, D).numpy())
        hat["fvu_unchained"].append((h @ A.T + c + mine).reshape(64, -1, D).numpy())
        hat["fvu_affine"].append((h @ A.T + c).reshape(64, -1, D).numpy())
        residuals.append((residual.numpy(), mine.numpy()))
    truth = x[SITES[1]].numpy()
    for key, parts in hat.items():
        assert found[SITES[1]][key] == pytest.approx(fvu(truth, np.concatenate(parts, axis=1)), rel=1e-4), key
    seen, rebuilt = (np.concatenate(parts) for parts in zip(*residuals, strict=True))
    assert seen_by[SITES[1]].metrics["fvu"] == pytest.approx(fvu(seen, rebuilt), rel=1e-4)
    assert seen_by[SITES[0]].metrics["fvu"] == pytest.approx(found[SITES[0]]["fvu"], rel=1e-5)
    alone = measure([chain.saes[SITES[1]]], SITES[1], stores, labels, 2, 0)[0].metrics
    images = "monosemanticity_of_all_images"
    assert seen_by[SITES[1]].metrics[images] == pytest.approx(alone[images]), "images are told apart as without a chain"
    assert "fvu_affine" not in found[SITES[0]]
    found[SITES[1]] |= redundancies(chain, 1, 0)
    earlier, later = (chain.saes[site].W_dec.numpy() for site in SITES)
    assert found[SITES[1]]["redundancy"] == pytest.approx(
        cosine_similarity(later, earlier).max(axis=1).mean(), rel=1e-5
    )
    carried = [earlier @ pairs[0][0].T.numpy() for pairs in chain.maps.values()]
    transported = np.mean([cosine_similarity(later, rows).max(axis=1).mean() for rows in carried])
    assert found[SITES[1]]["redundancy_transported"] == pytest.approx(transported, rel=1e-5)
    assert found[SITES[1]]["redundancy_random"] == pytest.approx(found[SITES[1]]["redundancy"], abs=0.05)
    assert found[SITES[1]]["redundancy_over_0.9"] == 0
    assert found[SITES[1]]["fvu_affine"] < 0.5


def test_a_chain_without_maps_transports_nothing_and_equal_decoders_are_redundant(
    stores: Stores,
) -> None:
    moments = fit_moments(by_group(stores["train"], SITES, CPU), SITES)
    chain = ReSAE(SITES, dict.fromkeys(SITES, random_sae(0)), fit_maps(SITES, moments, "zero"))
    found = redundancies(chain, 1, 0)
    assert "redundancy_transported" not in found and found["redundancy_over_0.9"] == 1
    chain.maps = fit_maps(SITES, moments, "identity")
    assert redundancies(chain, 1, 0)["redundancy_transported"] == pytest.approx(found["redundancy"]) == pytest.approx(1)


def test_random_decoders_of_the_redundancy_follow_the_seed_of_the_run(
    stores: Stores,
) -> None:
    chain = random_chain(stores["train"])
    found = [redundancies(chain, 1, seed) for seed in (0, 0, 1)]
    assert found[0] == found[1]
    assert found[2]["redundancy_random"] != found[0]["redundancy_random"]
    assert found[2]["redundancy"] == found[0]["redundancy"]


def hooked(backbone: Backbone, images: Tensor, inserted: Mapping[int, Tensor], positions: list[int]) -> Tensor:
    """Logits of timm's own forward pass with tokens replaced at the input of blocks."""

    def hook(block: int) -> Any:
        def replace(_: Any, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x = arguments[0].clone()
            x[:, positions] = inserted[block].unflatten(0, (len(x), -1))
            return (x, *arguments[1:])

        return replace

    handles = [backbone.model.blocks[block].register_forward_pre_hook(hook(block)) for block in inserted]
    try:
        logits: Tensor = backbone.model(images)
        return logits
    finally:
        for handle in handles:
            handle.remove()


def test_spliced_values_are_those_of_a_hooked_forward_pass(split: Split) -> None:
    backbone = make_backbone(classes=2)
    images = backbone.normalize(split.batch(slice(None), backbone.preprocess))
    given = {1: torch.randn(len(split), D), 2: torch.randn(len(split), D)}
    logits, changed = backbone.model(images).double(), hooked(backbone, images, given, [0]).double()
    modes = {
        "same": lambda clean: lambda m, group, h, before: h,
        "given": lambda clean: lambda m, group, h, before: given[m + 1],
    }
    found = spliced(backbone, split, SITES, {"cls": [0]}, modes).metrics({mode: mode for mode in modes})
    right = logits.argmax(dim=1).numpy() == split.labels
    assert found["accuracy_untouched"] == found["accuracy_same"] == right.mean() and found["kl_same"] == 0
    assert found["accuracy_given"] == (changed.argmax(dim=1).numpy() == split.labels).mean()
    log_p, log_q = logits.log_softmax(dim=1), changed.log_softmax(dim=1)
    assert found["kl_given"] == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(dim=1).mean()), rel=1e-4)
    assert found["given_delta"] == pytest.approx(found["accuracy_given"] - found["accuracy_untouched"])
    assert spliced(backbone, split, ["blocks.1.mlp"], {"cls": [0]}, modes).metrics({"same": "same"}) == {}


@pytest.mark.parametrize("positions", [{"cls": [0]}, {"cls": [0], "patches": list(range(1, 17))}])
def test_fixed_replacements_of_every_token_need_the_model_from_the_last_site_on_alone(
    split: Split, positions: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, run, blocks = make_backbone(classes=2), Backbone.run_blocks, []
    generator = torch.Generator().manual_seed(0)
    given = {
        (m, group): torch.randn(len(split) * len(tokens), D, generator=generator)
        for m in range(len(SITES))
        for group, tokens in positions.items()
    }

    def counted(self: Backbone, x: Tensor, first: int, last: int, *rest: Any, **more: Any) -> Any:
        blocks.append(last - first)
        return run(self, x, first, last, *rest, **more)

    monkeypatch.setattr(Backbone, "run_blocks", counted)
    modes = {"given": lambda clean: lambda m, group, h, before: given[m, group]}
    slow = spliced(backbone, split, SITES, positions, modes)
    n_slow = sum(blocks)
    fast = spliced(backbone, split, SITES, positions, modes, fixed=["given"])
    assert fast.kl == slow.kl and fast.kl["given"] > 0
    assert all(np.array_equal(fast.right[name], slow.right[name]) for name in slow.right)
    between = 1  # blocks between the two sites
    assert n_slow - (sum(blocks) - n_slow) == (between if len(positions) == 2 else 0)


def test_replacements_see_the_clean_pass_what_arrives_and_what_was_put_before(split: Split) -> None:
    backbone = make_backbone(classes=2)
    seen: list[tuple[int, str, Tensor, Tensor | None]] = []
    cleans: list[Clean] = []

    def mode(clean: Clean) -> Replacement:
        cleans.append(clean)

        def replace(m: int, group: str, h: Tensor, before: Tensor | None) -> Tensor:
            seen.append((m, group, h, before))
            return h + 1

        return replace

    spliced(backbone, split, SITES, {"cls": [0], "patches": list(range(1, 17))}, {"shift": mode})
    assert [(m, group) for m, group, *_ in seen] == [(0, "cls"), (0, "patches"), (1, "cls"), (1, "patches")]
    assert torch.equal(seen[0][2], cleans[0][0]["cls"]) and seen[0][3] is None
    before = seen[2][3]
    assert before is not None and torch.equal(before, seen[0][2] + 1)
    assert not torch.equal(seen[2][2], cleans[0][1]["cls"]), "the second site sees the first one's replacement"
    x = backbone.tokens(backbone.normalize(split.batch(slice(None), backbone.preprocess)))
    clean = backbone.run_blocks(x, 0, 1)[0]
    arrives = backbone.run_blocks(clean + 1, 1, 2)[0]
    torch.testing.assert_close(seen[3][2], arrives[:, 1:].flatten(0, 1))


def real_store(backbone: Backbone, split: Split, folder: Path) -> ActivationStore:
    """What the backbone computes of the images at both sites."""
    x = backbone.tokens(backbone.normalize(split.batch(slice(None), backbone.preprocess)))
    path = write_store(folder, len(split), dict.fromkeys(SITES, (17, D)), "all", dtype="float32")
    group = zarr.open_group(path, mode="r+")
    for block in (1, 2):
        group[f"blocks.{block}.input"][:] = backbone.run_blocks(x, 0, block)[0].numpy()
    manifest = json.loads(path.with_suffix(".json").read_text())
    manifest["token_positions"] = {"class": [0], "register": [], "patches": [1, 17]}
    del manifest["checksum"]
    path.with_suffix(".json").write_text(json.dumps(manifest))
    return ActivationStore.open(path)


def test_saes_evaluated_together_get_the_files_that_each_gets_alone(split: Split, tmp_path: Path) -> None:
    backbone = make_backbone(classes=2)
    store = real_store(backbone, split, tmp_path)
    saes = {f"s{seed}": random_sae(seed) for seed in range(2)}
    for one in saes.values():
        one.about["site"] = SITES[0]

    def evaluated(saes: Mapping[str, SAE], name: str) -> Path:
        with Work(tmp_path / f"work-{name}", "key") as work:
            evaluate(saes, backbone, dict.fromkeys(SPLITS, store), dict.fromkeys(SPLITS, split), 0, work, {})
            work.finish(tmp_path / name)
        return tmp_path / name

    together = evaluated(saes, "together")
    numbers = []
    for name, one in saes.items():
        alone = evaluated({name: one}, f"alone-{name}") / name
        for made in alone.iterdir():
            assert made.read_bytes() == (together / name / made.name).read_bytes(), made
        numbers.append(json.loads((alone / "metrics.json").read_text()))
    assert numbers[0]["kl_spliced"] != numbers[1]["kl_spliced"] > 0
    assert numbers[0]["kl_mean_instead"] == numbers[1]["kl_mean_instead"] > 0
    for found in numbers:
        assert found["kl_recovered"] == 1 - found["kl_spliced"] / found["kl_mean_instead"]


def test_chains_evaluated_together_get_the_files_that_each_gets_alone(split: Split, tmp_path: Path) -> None:
    backbone, splits = make_backbone(classes=2), dict.fromkeys(SPLITS, split)
    store = real_store(backbone, split, tmp_path)
    first = random_chain(store)
    chains = {"s0": first, "s1": ReSAE(SITES, {site: random_sae(i + 7) for i, site in enumerate(SITES)}, first.maps)}

    def evaluated(names: Sequence[str]) -> dict[str, bytes]:
        chosen, out = {name: chains[name] for name in names}, tmp_path / "-".join(names)
        with Work(out / "work", "key") as work:
            evaluate_chains(chosen, backbone, dict.fromkeys(SPLITS, store), splits, 0, work, {})
            work.finish(out / "out")
        made = [path for path in (out / "out").rglob("*") if path.is_file()]
        return {path.relative_to(out / "out").as_posix(): path.read_bytes() for path in made}

    together, apart = evaluated(["s0", "s1"]), evaluated(["s0"]) | evaluated(["s1"])
    assert together.keys() == apart.keys() and len(apart) == 2 * (1 + 4 * len(SITES))
    assert [name for name in apart if together[name] != apart[name]] == []
    assert json.loads(apart["s0/metrics.json"])["kl_online"] != json.loads(apart["s1/metrics.json"])["kl_online"]


def test_a_chain_of_perfect_saes_changes_nothing_whatever_the_way_back(split: Split, tmp_path: Path) -> None:
    """d_sae = 2 d_in with a decoder of +-unit vectors and k = d_in rebuilds everything."""
    backbone = make_backbone(classes=2)
    store = real_store(backbone, split, tmp_path)
    chain = random_chain(store)
    for site in SITES:
        one = sae.create("topk", D, 2 * D, D).requires_grad_(False)
        one.W_dec.copy_(torch.cat([torch.eye(D), -torch.eye(D)]))
        one.W_enc.copy_(one.W_dec.T)
        one.about = {"tokens": "all"}
        chain.saes[site] = one
    with Work(tmp_path / "work", "key") as work:
        evaluate_chains(
            {"chain": chain}, backbone, dict.fromkeys(SPLITS, store), dict.fromkeys(SPLITS, split), 0, work, {}
        )
        work.finish(tmp_path / "out")
    whole = json.loads((tmp_path / "out" / "chain" / "metrics.json").read_text())
    assert whole["fvu"] < 1e-9 and whole["redundancy"] == pytest.approx(1)
    for mode in ("forced", "unchained", "online"):
        assert whole[f"kl_{mode}"] < 1e-9 and whole[f"accuracy_{mode}"] == whole["accuracy_untouched"]
    assert whole["kl_mean_instead"] > 1e-3
    later = json.loads((tmp_path / "out" / "chain" / SITES[1] / "metrics.json").read_text())
    assert later["n"] == len(split) * 17 and later["fvu_residual"] < 1e-9
    assert len(tables.read(tmp_path / "out" / "chain" / SITES[1] / "latents.parquet")) == 2 * D


def test_the_reconstruction_of_a_chain_alone_is_what_all_metrics_say_of_it(
    split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, splits = make_backbone(classes=2), dict.fromkeys(SPLITS, split)
    store = real_store(backbone, split, tmp_path)
    chain = random_chain(store)
    for one in chain.saes.values():
        one.about["tokens"] = "all"

    def evaluated(name: str, alone: bool) -> Path:
        with Work(tmp_path / f"work-{name}", "key") as work:
            stores = dict.fromkeys(SPLITS, store)
            evaluate_chains({"chain": chain}, backbone, stores, splits, 0, work, {}, reconstruction_only=alone)
            work.finish(tmp_path / name)
        return tmp_path / name / "chain"

    whole, alone = evaluated("whole", False), evaluated("alone", True)
    for place in ("", *SITES):
        ours, theirs = (json.loads((folder / place / "metrics.json").read_text()) for folder in (alone, whole))
        missing = {key for key in theirs.keys() - ours.keys() if not key.startswith(("probing", "bits", "monosem"))}
        assert missing <= {"fvu_quantised", "fvu_random", "fvu_kmeans", "fvu_neurons", "dead_train", "embedding"}
        for key in ours.keys() - {"record"}:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-6), (place, key)
    assert tables.read(alone / SITES[0] / "probing.parquet") == []
    monkeypatch.setattr(sae_evaluate, "_IN_MODEL", 8)
    few = json.loads((evaluated("few", True) / "metrics.json").read_text())
    right = backbone(backbone.normalize(split.batch(slice(0, 8), backbone.preprocess))).argmax(dim=1).numpy()
    assert few["n"] == 8 and few["accuracy_untouched"] == (right == split.labels[:8]).mean()
    assert few["fvu"] == json.loads((alone / "metrics.json").read_text())["fvu"]
