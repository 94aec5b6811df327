"""Masked against gathered heads: milliseconds of one attention layer, by width and number of heads kept.

The two ways take turns; minimum and median over the rounds are printed. Usage:

    python benchmarks/gathered_heads.py [--threads 2] [--rounds 15]
"""

import argparse
import statistics
import time

import timm
import torch

from sparsight import machine
from sparsight.attention import HeadMode, attend
from sparsight.config import Compute
from sparsight.stage import prepare_torch

MODES: tuple[HeadMode, ...] = ("masked", "gathered")


@torch.no_grad()
def main() -> None:
    """Print one line per width, kind of mask and number of heads kept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    prepare_torch(Compute(threads=arguments.threads))
    print(f"{machine.describe()}, {arguments.threads} threads, torch {torch.__version__}")
    for width, heads, batch in ((192, 3, 32), (384, 6, 32), (768, 12, 16)):
        layer = timm.layers.Attention(width, heads, qkv_bias=True).eval()
        x = torch.randn(batch, 197, width)
        for kept in sorted({heads, heads * 2 // 3, heads // 3, 1, 0}, reverse=True):
            one = (torch.arange(heads) < kept).expand(batch, heads)
            own = torch.rand(batch, heads).argsort(dim=1) < kept
            for name, mask in (("one mask", one), ("a mask per image", own)):
                seconds: dict[HeadMode, list[float]] = {mode: [] for mode in MODES}
                for turn in range(arguments.rounds + 1):
                    for mode in MODES:
                        begin = time.perf_counter()
                        attend(layer, x, mask, mode)
                        if turn:  # the first round warms up
                            seconds[mode].append(1000 * (time.perf_counter() - begin))
                low = {mode: min(values) for mode, values in seconds.items()}
                middle = {mode: statistics.median(values) for mode, values in seconds.items()}
                print(
                    f"d {width}, {kept:2d} of {heads:2d} heads, {name:16s}: "
                    + ", ".join(f"{mode} {low[mode]:6.2f} / {middle[mode]:6.2f} ms" for mode in MODES)
                    + f" (min / median), {low['masked'] / low['gathered']:.2f}x"
                )


if __name__ == "__main__":
    main()
