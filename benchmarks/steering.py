"""What steering costs beside the encoder: one VS2 edit, and a sweep of strengths that shares the blocks before it.

    python benchmarks/steering.py [--batch 64] [--rounds 5] [--threads 2]

ViT-B/32 of open_clip with random weights, a TopK SAE of 3,072 latents, k 64 (the paper's). Contestants take turns.
Printed are milliseconds (minimum and median), the shares of the minima, and the multiply-accumulates.

Shapes: B batch, T tokens, D width (d_in).
"""

import argparse
import statistics
from collections.abc import Callable

import torch
from torch import Tensor
from turns import take_turns

from sparsight import backbones, sae
from sparsight.common import machine
from sparsight.config import Compute
from sparsight.pipeline.stage import prepare_torch
from sparsight.steering import vs2
from sparsight.steering.edits import keep_norm
from sparsight.steering.evaluate import cost
from sparsight.steering.intervention import place

_STRENGTHS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)


@torch.no_grad()
def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    prepare_torch(Compute(threads=arguments.threads))
    torch.manual_seed(0)
    backbone = backbones.load("open_clip/ViT-B-32").eval()
    backbone.use_prompts([f"thing {i}" for i in range(100)], ("a photo of a {}.",))
    one = sae.create("topk", backbone.d_in, 3072, 64)
    one.about = {"site": f"blocks.{backbone.n_blocks - 1}.output", "tokens": "cls"}
    images = torch.randn(arguments.batch, 3, *backbone.tower.image_size)
    depth, site = backbone.n_blocks, backbone.n_blocks - 3

    def forward(x_BTD: Tensor, start: int) -> Tensor:
        return backbone.classify(backbone.run_blocks(x_BTD, start, depth)[0])

    def steered(x_BTD: Tensor, alpha: float) -> Tensor:
        cls_BD = x_BTD[:, 0]
        cls_BD = keep_norm(cls_BD, alpha * vs2.direction(one, cls_BD))
        return torch.cat([cls_BD.unsqueeze(1), x_BTD[:, 1:]], dim=1)

    def prefix() -> Tensor:
        return backbone.run_blocks(backbone.tokens(images), 0, site)[0]

    def naive() -> Tensor:
        return torch.stack([forward(steered(prefix(), alpha), site) for alpha in _STRENGTHS])

    def shared() -> Tensor:
        x_BTD = prefix()
        return torch.stack([forward(steered(x_BTD, alpha), site) for alpha in _STRENGTHS])

    print(f"{machine.describe()}, {arguments.threads} threads, torch {torch.__version__}, batch {arguments.batch}")
    last_BTD = backbone.run_blocks(backbone.tokens(images), 0, depth)[0]
    edit, encoder = _race(
        arguments.rounds,
        {"VS2's edit": lambda: steered(last_BTD, 1.0), "encoder": lambda: forward(backbone.tokens(images), 0)},
    )
    macs = cost([place(one, backbone)], backbone)
    print(f"edit over encoder: {edit / encoder:.4f} of the time, {macs['share']:.6f} of the multiply-accumulates\n")
    assert torch.equal(naive(), shared())
    ours, theirs = _race(
        max(2, arguments.rounds // 2), {"shared prefix": shared, f"{len(_STRENGTHS)} whole forwards": naive}
    )
    print(f"{len(_STRENGTHS)} strengths at the input of block {site} of {depth}: {ours / theirs:.3f}, equal bits")


def _race(rounds: int, contestants: dict[str, Callable[[], object]]) -> list[float]:
    """Print the times of contestants that take turns; returns the minima."""
    seconds = take_turns(contestants, rounds)
    for name, spent in seconds.items():
        print(f"{name:20s}{1000 * min(spent):10.1f} / {1000 * statistics.median(spent):8.1f} ms")
    return [min(spent) for spent in seconds.values()]


if __name__ == "__main__":
    main()
