"""Images a second from encoded bytes to a model's input pixels: sparsight, Pillow alone, torchvision's decoder.

The ways take turns; minimum and median over the rounds are printed, with the largest difference of the pixels from
Pillow's and whether two decodes gave the same bytes. Usage:

    python benchmarks/decode.py [--parquet images.parquet] [--rounds 5]
"""

import argparse
import io
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torchvision.io  # noqa: F401  # registers torch.ops.image
from PIL import Image
from turns import take_turns

from sparsight.common import machine
from sparsight.config import Compute
from sparsight.images.preprocess import Preprocess
from sparsight.images.sources import SOURCES
from sparsight.images.sources.base import decode_file
from sparsight.pipeline.stage import prepare_torch

SIZE = 224
PREPROCESS = Preprocess((SIZE, SIZE), 3, (0.5,) * 3, (0.5,) * 3)


def sparsight(data: bytes) -> np.ndarray:
    """What sparsight does: Pillow's decoder, torch's resize."""
    return PREPROCESS.pixels(decode_file(data))


def pillow(data: bytes) -> np.ndarray:
    """What timm and open_clip do."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    scale = SIZE / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - SIZE) // 2, (image.height - SIZE) // 2
    return np.asarray(image.crop((left, top, left + SIZE, top + SIZE)))


def decoded_by_torchvision(data: bytes) -> np.ndarray:
    """Torchvision's decoder, which it gives up, and sparsight's resize."""
    image = torch.ops.image.decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), 0, False)
    return PREPROCESS.pixels(image.permute(1, 2, 0).numpy())


WAYS: dict[str, Callable[[bytes], np.ndarray]] = {
    "sparsight": sparsight,
    "pillow": pillow,
    "torchvision": decoded_by_torchvision,
}


def made(form: str, height: int, width: int, count: int = 32) -> list[bytes]:
    """Smooth random pictures, which compress about as photographs do."""
    generator = np.random.default_rng(0)
    found = []
    for _ in range(count):
        coarse = Image.fromarray(generator.integers(0, 255, (height // 16, width // 16, 3), dtype=np.uint8))
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(buffer := io.BytesIO(), form, quality=90)
        found.append(buffer.getvalue())
    return found


def decode_all(decode: Callable[[bytes], np.ndarray], images: list[bytes]) -> list[np.ndarray]:
    """Every image, decoded."""
    return [decode(data) for data in images]


def main() -> None:
    """Print one line per set of images and way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parquet", type=Path, default=None, help="real images beside the made ones")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    prepare_torch(Compute(threads=1))
    print(f"{machine.describe()}, one thread, to {SIZE} x {SIZE}")
    sets = {
        "JPEG 375 x 500": made("JPEG", 375, 500),
        "JPEG 1500 x 2000": made("JPEG", 1500, 2000, 8),
        "PNG 375 x 500": made("PNG", 375, 500),
        "WebP 375 x 500": made("WEBP", 375, 500),
        "PNG 32 x 32": made("PNG", 32, 32),
    }
    if arguments.parquet is not None:
        source = SOURCES["parquet"](str(arguments.parquet))
        sets[arguments.parquet.as_posix()] = [source.read(item.uri) for item in source.items()]
    for name, images in sets.items():
        contestants = {way: partial(decode_all, decode, images) for way, decode in WAYS.items()}
        first, again = ({way: run() for way, run in contestants.items()} for _ in range(2))
        for way, values in take_turns(contestants, arguments.rounds, warm_up=0).items():
            same = all(np.array_equal(a, b) for a, b in zip(first[way], again[way], strict=True))
            best, middle = len(images) / min(values), len(images) / statistics.median(values)
            off = np.abs(np.stack(first[way]).astype(int) - np.stack(first["pillow"]))
            print(f"{name:18s} {way:12s} {best:7.0f} / {middle:7.0f} images/s (best / median), up to {off.max()} of "
                  f"255 from Pillow, {off.mean():.4f} on average, same bytes twice: {same}")  # fmt: skip


if __name__ == "__main__":
    main()
