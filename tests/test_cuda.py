"""The code of ``compute.device: cuda`` on a pretended device: no device fault, and the results of the CPU."""

import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_manifest, write_store
from pretended_cuda import Activity, CudaTensor, to_host
from safetensors.numpy import load_file
from studies import SECTION, random_policy, random_sae, two_classes

from sparsight import config, sae
from sparsight.activations.extract import extract
from sparsight.activations.store import ActivationStore
from sparsight.activations.writer import finish_store
from sparsight.backbones import fit as backbones
from sparsight.backbones.recipes import Recipe
from sparsight.common import tables
from sparsight.common.work import Work
from sparsight.config import Compute
from sparsight.config.activations import StoredSite
from sparsight.images.manifest import Manifest
from sparsight.pipeline.stage import prepare_torch
from sparsight.pruning import evaluate as pruning
from sparsight.pruning import train as policies
from sparsight.sae import Trainer
from sparsight.sae.evaluate import evaluate, evaluate_chains
from sparsight.sae.fit import fit
from sparsight.sae.resae import load_chain
from sparsight.steering.evaluate import steer
from sparsight.training import checkpoints, loop
from sparsight.training.batches import StoreBatches

B, D, F, K = 64, 24, 256, 4
CPU, DEVICE = torch.device("cpu"), torch.device("cuda")  # as compute.device names them
SITES = ("blocks.1.input", "blocks.2.input")
SPLITS = ("train", "val", "test")
Stores = dict[str, ActivationStore]
Stage = Callable[[torch.device, Work], None]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_manifest(tmp_path_factory.mktemp("images"), per_class=30)


@pytest.fixture(scope="module")
def stores(manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Stores:
    """Of every split, what the CPU computes."""
    return extracted(manifest, tmp_path_factory.mktemp("stores"), CPU)


def extracted(manifest: Manifest, folder: Path, device: torch.device) -> Stores:
    sites = tuple(StoredSite(site) for site in (*SITES, "embedding"))
    section = config.Activations(sites=sites, batch_size=7, shard_images=8)
    for split in SPLITS:
        store, about = folder / f"{split}.zarr", {"split": split, "backbone": "vit"}
        with Work(folder / "work" / split, "key") as work:
            extract(two_classes().to(device), manifest.split(split), section, Compute(), work, store, 0, about)
            work.finish(folder)
        finish_store(store, [folder / f"{split}.part-0.json"], folder / f"{split}.json")
    return {split: ActivationStore.open(folder / f"{split}.zarr") for split in SPLITS}


def batch(number: int) -> torch.Tensor:
    return torch.randn(B, D, generator=torch.Generator().manual_seed(number))


def trained(one: sae.SAE, steps: int, labels: np.ndarray | None = None) -> Trainer:
    """Trained until some latents are dead."""
    trainer = Trainer([one], dead_after=3 * B)
    for step in range(steps):
        trainer.step(batch(step).to(one.W_dec.device), labels)
    return trainer


@pytest.mark.parametrize("kind", sae.names())
@pytest.mark.parametrize("labels", [None, np.arange(B) % 3], ids=["alone", "labels"])
def test_steps_without_and_with_dead_latents_are_those_of_the_cpu(
    kind: str, labels: np.ndarray | None, cuda: Activity
) -> None:
    # With this seed no latent fires on a single row alone: its first gradient would be rounding, which Adam blows up.
    on_cpu, on_device = sae.create(kind, D, F, K, 1), sae.create(kind, D, F, K, 1).to(DEVICE)
    for one in (on_cpu, on_device):
        trained(one, 6, labels)
    for name, expected in on_cpu.state_dict().items():
        found = on_device.state_dict()[name]
        assert isinstance(found, CudaTensor)
        torch.testing.assert_close(found.host, expected)
    assert torch.equal(to_host(on_device.dead), on_cpu.dead)
    assert on_cpu.dead.any() or not on_cpu.has_auxk
    torch.testing.assert_close(on_device(batch(9)).detach().cpu(), on_cpu(batch(9)).detach())


@pytest.mark.parametrize("kind", sae.names())
def test_steps_in_bf16_are_close_to_those_in_fp32_and_not_equal(kind: str, cuda: Activity) -> None:
    half, full = (Trainer([sae.create(kind, D, F, K).to(DEVICE)], precision=p) for p in ("bf16", "fp32"))
    for step in range(2):
        found, expected = (one.step(batch(step).to(DEVICE))[0].total.detach().item() for one in (half, full))
        assert found != expected
        assert found == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize(("memory", "free"), [(2**20, 2**33), (2**15, 2**33), (2**15, 2**10)])
def test_batches_are_those_of_the_cpu_where_the_store_fits_and_where_not(
    memory: int, free: int, tmp_path: Path, cuda: Activity, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fits on host and device, on the device only, and on neither."""
    store = ActivationStore.open(write_store(tmp_path, 301, dict.fromkeys(SITES, (3, 8)), "all", shard_images=16))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
    rows = {site: store.rows(site) for site in SITES}
    on_cpu, on_device = (StoreBatches(rows, 50, 0, memory, device=device) for device in (CPU, DEVICE))
    for epoch in range(2):
        for expected, found in zip(on_cpu.epoch(epoch), on_device.epoch(epoch), strict=True):
            assert np.array_equal(found.rows, expected.rows)
            for site in SITES:
                assert torch.equal(to_host(found.x[site]), expected.x[site])
                assert isinstance(found.x[site], CudaTensor)


def test_a_log_line_is_one_copy_from_the_device(cuda: Activity) -> None:
    sums = {f"s{i}": torch.tensor(float(i), device=DEVICE) for i in range(8)}
    assert loop._means(sums, 2) == {f"s{i}": i / 2 for i in range(8)}
    assert sum(cuda.waits.values()) == 1


def test_full_fp32_covers_convolutions_and_sums_of_bf16_products() -> None:
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True
    prepare_torch(Compute())
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction


def assert_alike(stage: Stage, folder: Path) -> None:
    """The stage writes the same files on the CPU and on the device, with numbers that differ by rounding only."""
    for device in (CPU, DEVICE):
        with Work(folder / "work" / device.type, "key") as work:
            stage(device, work)
            work.finish(folder / device.type)
    names, same = (
        sorted(path.relative_to(folder / device).as_posix() for path in (folder / device).rglob("*.*"))
        for device in ("cpu", "cuda")
    )
    assert names == same
    assert names
    for name in names:
        assert_close(read(folder / "cuda" / name), read(folder / "cpu" / name), name)


def read(path: Path) -> Any:
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    readers: dict[str, Callable[[Path], Any]] = {
        ".safetensors": load_file, ".parquet": tables.read, ".json": lambda path: json.loads(path.read_text()),
    }  # fmt: skip
    return readers[path.suffix](path) if path.is_file() else None


def assert_close(found: Any, expected: Any, place: str) -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), place
        for key, value in expected.items():
            assert_close(found[key], value, f"{place} {key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), place
        for i, value in enumerate(expected):
            assert_close(found[i], value, f"{place} {i}")
    elif isinstance(expected, float | np.ndarray):
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4, err_msg=place)
    else:
        assert found == expected, place


@pytest.mark.parametrize("training", ["supervised", "probe"])
def test_the_backbones_stage(training: Any, manifest: Manifest, tmp_path: Path, cuda: Activity) -> None:
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
    section = config.Backbone(
        "timm/vit_tiny_patch16_224", architecture=sizes, training=training, epochs=2, batch_size=14, lr=1e-3,
        ema=0.8, flip=training == "supervised", shift=0.1 if training == "supervised" else 0.0,
    )  # fmt: skip
    assert_alike(lambda device, work: backbones.fit(section, manifest, "net", 0, work, device, 2, {}), tmp_path)


CLIP: dict[str, Any] = {
    "embed_dim": 16, "vision.image_size": 16, "vision.patch_size": 8, "vision.width": 16, "vision.layers": 1,
    "vision.head_width": 8, "text.width": 16, "text.heads": 2, "text.layers": 1, "text.context_length": 12,
}  # fmt: skip


def test_contrastive_training_of_the_backbones_stage(manifest: Manifest, tmp_path: Path, cuda: Activity) -> None:
    section = config.Backbone(
        "open_clip/ViT-B-32", architecture=CLIP, training="contrastive", epochs=1, batch_size=14, lr=1e-3,
        templates=("a photo of a {}.", "one {}."),
    )  # fmt: skip
    assert_alike(lambda device, work: backbones.fit(section, manifest, "clip", 0, work, device, 2, {}), tmp_path)


def test_no_step_of_a_backbone_or_policy_waits(
    manifest: Manifest, tmp_path: Path, cuda: Activity, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[Counter[str]] = []

    def watched(step: Callable[..., Any]) -> Callable[..., Any]:
        def run(*words: Any) -> Any:
            before = cuda.waits.copy()
            scalars = step(*words)
            steps.append(cuda.waits - before)
            return scalars

        return run

    for kind in (Recipe, policies._Training):
        monkeypatch.setattr(kind, "step", watched(kind.step))
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3}
    short: dict[str, Any] = {"epochs": 1, "batch_size": 14, "lr": 1e-3, "shift": 0.1}
    sections = [
        config.Backbone("timm/vit_tiny_patch16_224", architecture=sizes, **short),
        config.Backbone("open_clip/ViT-B-32", architecture=CLIP, training="contrastive", **short),
    ]
    for section in sections:
        with Work(tmp_path / "work" / section.training, "key") as work:
            backbones.fit(section, manifest, "x", 0, work, DEVICE, 2, {})
    with Work(tmp_path / "work" / "policy", "key") as work:
        policy = config.Policy("vit", target=0.5, epochs=1, batch_size=14)
        policies.fit(policy, two_classes().to(DEVICE), manifest, "heads", 0, work, 2, {})
    assert len(steps) > 6
    assert sum(map(bool, steps)) <= 2, "the first of each backbone puts mean and deviation of pixels on the device"


def test_the_activations_stage(manifest: Manifest, stores: Stores, tmp_path: Path, cuda: Activity) -> None:
    for split, store in extracted(manifest, tmp_path, DEVICE).items():
        for site in store.sites:
            np.testing.assert_allclose(store.rows(site)[:], stores[split].rows(site)[:], rtol=1e-2, atol=1e-3)


def test_every_core_decodes_beside_a_device(cuda: Activity) -> None:
    backbone = two_classes()
    assert backbone.decoding_threads == torch.get_num_threads()
    assert backbone.to(DEVICE).decoding_threads == len(os.sched_getaffinity(0))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_extraction_waits_once_a_shard_in_the_thread_that_writes_it(
    precision: Any, manifest: Manifest, tmp_path: Path, cuda: Activity
) -> None:
    section, backbone = config.Activations(sites=(StoredSite(SITES[0]),), batch_size=2, shard_images=8), two_classes()
    backbone.to(DEVICE).normalize(np.zeros((1, 16, 16, 1), np.uint8))  # puts mean and deviation on the device
    cuda.clear()
    with Work(tmp_path / "work", "key") as work:
        images, store = manifest.split("train"), tmp_path / "x.zarr"
        extract(backbone, images, section, Compute(precision=precision), work, store, 0, {})
        n_shards = len(list(work.state.glob("shard-*.json")))
    assert n_shards > 1
    assert sum(cuda.waits.values()) == n_shards, cuda.waits


SAE: dict[str, Any] = {"backbone": "vit", "d_sae": 64, "k": 4, "epochs": 2, "batch_size": 14, "dead_after": 30}
CHAIN = config.Sae(**SAE, sites=SITES)


@pytest.mark.parametrize("section", [config.Sae(**SAE, site=SITES[0], kind="switch", prototype_weight=0.5), CHAIN])
def test_the_saes_stage(
    section: config.Sae, manifest: Manifest, stores: Stores, tmp_path: Path, cuda: Activity
) -> None:
    labels = manifest.split("train").labels if section.prototype_weight else None
    assert_alike(lambda device, work: fit(section, stores["train"], labels, "x", 0, work, device, {}), tmp_path)


def test_training_continues_from_a_checkpoint_of_the_device(
    stores: Stores, tmp_path: Path, cuda: Activity, monkeypatch: pytest.MonkeyPatch
) -> None:
    section, step, numbers = config.Sae(**SAE, site=SITES[0]), Trainer.step, iter(range(99))

    def run(folder: Path) -> dict[str, np.ndarray]:
        with Work(folder / "work", "key") as work:
            fit(section, stores["train"], None, "x", 0, work, DEVICE, {})
            return load_file(work.out / "x-s0" / "sae.safetensors")

    expected = run(tmp_path / "undisturbed")

    def stops(*words: Any) -> Any:
        if next(numbers) == 4:
            raise KeyboardInterrupt
        return step(*words)

    monkeypatch.setattr(checkpoints.Checkpoint, "due", True)
    monkeypatch.setattr(Trainer, "step", stops)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped")
    found = run(tmp_path / "stopped")
    assert next(numbers) == 7, "two steps were left"
    assert all(np.array_equal(found[name], value) for name, value in expected.items())


def test_the_evaluation_stage(manifest: Manifest, stores: Stores, tmp_path: Path, cuda: Activity) -> None:
    images = {split: manifest.split(split) for split in SPLITS}

    def stage(device: torch.device, work: Work) -> None:
        evaluate({"s0": random_sae(0).to(device)}, two_classes().to(device), stores, images, 0, work, {})

    assert_alike(stage, tmp_path)


def test_the_evaluation_stage_of_a_chain(manifest: Manifest, stores: Stores, tmp_path: Path, cuda: Activity) -> None:
    images = {split: manifest.split(split) for split in SPLITS}
    with Work(tmp_path / "training", "key") as work:
        fit(CHAIN, stores["train"], None, "x", 0, work, CPU, {})
        work.finish(tmp_path / "chain")

    def stage(device: torch.device, work: Work) -> None:
        chain = load_chain(tmp_path / "chain" / "x-s0")
        for one in chain.saes.values():
            one.requires_grad_(False)
        evaluate_chains({"x-s0": chain.to(device)}, two_classes().to(device), stores, images, 0, work, {})

    assert_alike(stage, tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "class-latents", "latents": 4},
        {"kind": "class-latents", "latents": 4, "ranking": "attribution", "edit": "clamp"},
        {"kind": "vs2", "quantiles": (0.5, 0.9)},
        {"kind": "vs2++", "neighbours": 5},
    ],
    ids=lambda options: "-".join(str(value) for value in options.values()),
)
def test_the_steering_stage(
    options: dict[str, Any], manifest: Manifest, stores: Stores, tmp_path: Path, cuda: Activity
) -> None:
    section = config.Steering(sae="sae", strengths=(0.5, 2.0), **options)

    def stage(device: torch.device, work: Work) -> None:
        one = random_sae(0).to(device)
        one.about["training"] = {"prototype_weight": 0.0}
        steer(section, {"s": [one]}, two_classes().to(device), stores, stores, manifest, 0, work, {})

    assert_alike(stage, tmp_path)


@pytest.mark.parametrize("change", [{}, {"blocks": "last"}, {"backbone_lr": 1e-3}], ids=lambda change: str(*change))
def test_the_policies_stage(change: dict[str, Any], manifest: Manifest, tmp_path: Path, cuda: Activity) -> None:
    section = config.Policy("vit", target=0.5, epochs=2, batch_size=14, **change)

    def stage(device: torch.device, work: Work) -> None:
        policies.fit(section, two_classes().to(device), manifest, "heads", 0, work, 2, {})

    assert_alike(stage, tmp_path)


def test_the_pruning_stage(manifest: Manifest, tmp_path: Path, cuda: Activity) -> None:
    def stage(device: torch.device, work: Work) -> None:
        saes = {"sae-s0": random_sae(0).to(device)}
        pruning.evaluate(SECTION, two_classes().to(device), random_policy().to(device), saes, manifest, 0, work, 2, {})

    assert_alike(stage, tmp_path)


@pytest.mark.parametrize("n_masks", [2, 30], ids=["by mask", "by head"])
def test_gathered_heads(n_masks: int, cuda: Activity) -> None:
    backbone, generator = two_classes(), torch.Generator().manual_seed(0)
    images = torch.randn(30, 1, 16, 16, generator=generator)
    mask = (torch.rand(n_masks, 3, 6, generator=generator) > 0.4)[torch.arange(30) % n_masks]
    expected = backbone(images, mask, heads="gathered")
    found = backbone.to(DEVICE)(images.to(DEVICE), mask.to(DEVICE), heads="gathered")
    torch.testing.assert_close(found.cpu(), expected)
