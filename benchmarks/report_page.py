"""How long a large report takes to open: 20,000 latents and 2,000 images, made up, in headless Chromium.

    python benchmarks/report_page.py [--rounds 5]

Printed are the size of the page, and seconds from the request to the page of one latent, minimum and median.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from playwright.sync_api import sync_playwright

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from browsers import CHROMIUM
from made_up import made_up

from sparsight import config
from sparsight.common import machine
from sparsight.report.page import write_page

_SAES = {"where-s0": ("patches", 8_000), "what-s0": ("cls", 12_000)}


def main() -> None:
    """Print one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        inputs = made_up(Path(folder), 2_000, _SAES, "what", pixels=64)
        write_page(config.Report(), "large", inputs, torch.device("cpu"), Path(folder))
        path, seconds = Path(folder, "index.html"), []
        page = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"]).new_page()
        for _ in range(rounds):
            page.goto("about:blank")
            page.goto(path.as_uri() + "#latent=where-s0/700")
            page.wait_for_selector("html[data-ready]", state="attached")
            seconds.append(page.evaluate("performance.now()") / 1000)
        print(f"{machine.describe()}: {path.stat().st_size / 1e6:.1f} MB, ", end="")
        print(f"open in {min(seconds):.2f} / {statistics.median(seconds):.2f} s")


if __name__ == "__main__":
    main()
