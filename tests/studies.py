"""A small pruning study: a random ViT of two classes, a policy, SAEs, and what is fitted on them."""

from pathlib import Path
from typing import Any

import torch
from conftest import make_backbone, make_folder
from torch import Tensor

from sparsight import config, sae
from sparsight.backbones.backbone import Backbone
from sparsight.images.manifest import Manifest, write_manifest
from sparsight.pruning import evaluate, linear_probe, outcomes, strategies
from sparsight.pruning.last_block import last_block_inputs
from sparsight.pruning.outcomes import Outcome
from sparsight.pruning.policy import HeadPolicy
from sparsight.pruning.strategies import Row
from sparsight.sae import SAE

SECTION = config.Pruning(
    steering="s", strengths=(1.0, 2.0, 30.0), latents=(1, 4), bias_strengths=(1.0, 5.0), batch_size=7
)


def two_class_images(tmp_path: Path) -> Manifest:
    make_folder(tmp_path / "images", per_class=30)
    write_manifest(config.Images(source="folder", path=str(tmp_path / "images")), 0, {}, 2, tmp_path / "m.parquet")
    return Manifest(tmp_path / "m.parquet")


def two_classes(**options: Any) -> Backbone:
    """A random ViT that predicts both classes, now one and now the other by the heads that are kept."""
    backbone = make_backbone(classes=2, **options)
    levels = torch.linspace(-2, 2, 64).view(64, 1, 1, 1)
    images = levels + torch.randn(64, 1, 16, 16, generator=torch.Generator().manual_seed(0)) / 10
    mask = torch.rand(64, 3, backbone.n_heads, generator=torch.Generator().manual_seed(1)) > 0.4
    with torch.no_grad():
        backbone.model.head.bias -= backbone(images, head_mask=mask).mean(dim=0)
    return backbone


def random_policy(seed: int = 0) -> HeadPolicy:
    policy = HeadPolicy(48, 6, [1, 2])
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        policy.weight.copy_(torch.randn(policy.weight.shape, generator=generator))
        policy.bias.zero_()
    return policy.requires_grad_(False)


def random_sae(seed: int) -> SAE:
    one = sae.create("topk", 48, 64, 8, seed=seed)
    one.about = {"site": "blocks.2.input", "tokens": "cls"}
    return one.requires_grad_(False)


def last_inputs(backbone: Backbone, manifest: Manifest, split: str, policy: HeadPolicy | None = None) -> Tensor:
    images = manifest.split(split).batch(slice(None), backbone.preprocess)
    return backbone.run_blocks(backbone.tokens(backbone.normalize(images)), 0, 2, policy)[0]


class Study:
    """Everything that an evaluation fits, and the test split as it reaches the last block."""

    def __init__(self, manifest: Manifest, saes: int = 2, **options: Any) -> None:
        self.backbone, self.policy, self.manifest = two_classes(**options), random_policy(), manifest
        self.saes = {f"sae-s{seed}": random_sae(seed) for seed in range(saes)}
        train = last_block_inputs(self.backbone, self.policy, manifest.split("train"), 7)
        self.train, self.probe = train, linear_probe.fit(train.read_ND, train.labels, 2)
        self.routes_train = evaluate._routes(self.probe, train)
        self.strategies = evaluate._strategies(SECTION, self.policy, self.saes, train, self.routes_train, 2, 0)
        self.test = last_block_inputs(self.backbone, self.policy, manifest.split("test"), 7)
        self.routes = evaluate._routes(self.probe, self.test)
        self.rows = strategies.every_row(SECTION, 6, self.strategies.effects_by_sae)

    def run(self, rows: list[Row]) -> dict[Row, Outcome]:
        return dict(outcomes.run(self.strategies, rows, self.test, self.routes))
