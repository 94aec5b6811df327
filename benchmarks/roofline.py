"""A TopK training step on a card, on paper: bytes and FLOPs of its parts, and the least time that each can take.

    python benchmarks/roofline.py [--batch 8192] [--d-in 768] [--k 32] [--latents 8192 65536 262144]

A part takes the longer of its bytes at the memory's bandwidth and its FLOPs at the arithmetic's peak. The card is an
H100 SXM; the peaks are NVIDIA's, without sparsity. Rows that are gathered count as read from memory each time, though
the 50 MB cache holds some of them. Nothing here is measured.

Shapes: B batch, D width (d_in), F latents (d_sae), K active latents (k).
"""

import argparse
from typing import NamedTuple

BANDWIDTH = 3.35e12  # bytes per second
PEAK = {"fp32": 67e12, "bf16": 989e12}  # FLOPs per second; in fp32 outside of the tensor cores
GROUP = 16  # latents of a group, sparsight.kernels.largest
TOPK_READS = 5  # of torch.topk over one row: four of its radix select, one to collect
SECTOR = 32  # bytes of memory that one gathered number moves
UPDATE = 17  # passes over one weight: norms read both gradients and W_dec; Adam reads 4 and writes 3 of each weight


class Part(NamedTuple):
    """What one part of the step needs."""

    flops: float
    bytes: float
    peak: str = "fp32"

    @property
    def ms(self) -> float:
        """The least time."""
        return 1e3 * max(self.flops / PEAK[self.peak], self.bytes / BANDWIDTH)


def parts(B: int, D: int, F: int, K: int, precision: str) -> dict[str, Part]:
    """The parts of a step in the order in which it takes them."""
    size = {"fp32": 4, "bf16": 2}[precision]  # bytes of an operand of the encoder product and of its result
    cast = 0 if precision == "fp32" else (B * D + D * F) * (4 + size)
    searched = B * K * GROUP
    maxima = B * F / GROUP * size * (1 + TOPK_READS)
    gathered, entries = B * K * D * 4, B * K
    return {
        "encoder product": Part(2 * B * D * F, (B * D + D * F + B * F) * size + cast, precision),
        "selection": Part(B * F, B * F * size + maxima + searched * (2 * 8 + SECTOR + (1 + TOPK_READS) * size)),
        "decoding": Part(2 * entries * D, gathered + B * D * 4),
        "errors and loss": Part(6 * B * D, 9 * B * D * 4),
        "products for the codes' gradient": Part(2 * entries * D, gathered + B * D * 4),
        "sorting": Part(0, 4 * 2 * entries * (4 + 8)),
        "gradient of the decoder": Part(2 * entries * D, gathered + F * D * 4),
        "gradient of the encoder": Part(2 * entries * D, gathered + 2 * F * D * 4),
        "update": Part(30 * F * D, UPDATE * F * D * 4),
    }


def main() -> None:
    """Print one Markdown table a precision."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8192)
    parser.add_argument("--d-in", type=int, default=768)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--latents", type=int, nargs="+", default=[8192, 65536, 262144])
    arguments = parser.parse_args()
    for precision in PEAK:
        columns = [parts(arguments.batch, arguments.d_in, F, arguments.k, precision) for F in arguments.latents]
        print(f"\n| {precision}: GFLOP / GB / ms | " + " | ".join(f"d_sae {F:,}" for F in arguments.latents) + " |")
        print("|---|" + "---|" * len(columns))
        for name in columns[0]:
            print(f"| {name} | " + " | ".join(_cell(column[name]) for column in columns) + " |")
        totals = [sum(part.ms for part in column.values()) for column in columns]
        print("| **the step, ms** | " + " | ".join(f"{total:.2f}" for total in totals) + " |")
        over = (total / column["encoder product"].ms for total, column in zip(totals, columns, strict=True))
        print("| over the encoder product | " + " | ".join(f"{ratio:.2f}" for ratio in over) + " |")


def _cell(part: Part) -> str:
    return f"{part.flops / 1e9:.1f} / {part.bytes / 1e9:.2f} / {part.ms:.2f}"


if __name__ == "__main__":
    main()
