"""The command line of the store: ``python -m sparsight.store verify|info PATH``."""

import argparse
import sys
from pathlib import Path

from sparsight.activations.store import ActivationStore, verify
from sparsight.common.errors import SparsightError


def main() -> None:
    """``python -m sparsight.store verify|info PATH``."""
    parser = argparse.ArgumentParser(prog="python -m sparsight.store", description=main.__doc__)
    parser.add_argument("command", choices=("verify", "info"))
    parser.add_argument("path", type=Path, help="a store, <split>.zarr")
    arguments = parser.parse_args()
    try:
        if arguments.command == "verify":
            _verify(arguments.path)
        else:
            _info(ActivationStore.open(arguments.path))
    except SparsightError as error:
        sys.exit(f"error: {error}")


def _verify(path: Path) -> None:
    if problems := verify(path):
        sys.exit("\n".join(problems))
    print("every file is as the manifest says")


def _info(store: ActivationStore) -> None:
    for site, array in store.manifest["sites"].items():
        print(f"{site}  {array['tokens']}  {array['dtype']}  {array['shape']}  rms {array['rms']:.4g}")
    files, size = store.manifest["files"], sum(store.manifest["sizes"].values())
    print(f"{len(files)} files, {size / 1e6:.1f} MB, digest {store.manifest['digest']}")
