"""Prints the card of every SAE of finished runs: ``python -m sparsight.bench RUN...``."""

import argparse
import sys
from pathlib import Path

from sparsight.bench.card import cards
from sparsight.common.errors import SparsightError


def main() -> None:
    """Print what the SAEs of finished runs are worth: every measure beside its strongest control, with a verdict."""
    parser = argparse.ArgumentParser(prog="python -m sparsight.bench", description=main.__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="results/<run>")
    try:
        for run in parser.parse_args().runs:
            for card in cards(run):
                print(card, end="\n\n")
    except SparsightError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
