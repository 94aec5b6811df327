"""The command line of the report: ``python -m sparsight.report compare RUN_A RUN_B``."""

import argparse
import sys
from pathlib import Path

from sparsight.common.errors import SparsightError


def main() -> None:
    """Compare two finished runs on one offline page."""
    parser = argparse.ArgumentParser(prog="python -m sparsight.report", description=main.__doc__)
    parser.add_argument("command", choices=("compare",))
    parser.add_argument("runs", nargs=2, type=Path, metavar="RUN", help="results/<run>")
    parser.add_argument("--out", type=Path, default=Path("compare.html"), help="the page (compare.html)")
    arguments = parser.parse_args()
    from sparsight.report.compare import write_comparison

    try:
        write_comparison(arguments.runs[0], arguments.runs[1], arguments.out)
    except SparsightError as error:
        sys.exit(f"error: {error}")
    print(arguments.out)


if __name__ == "__main__":
    main()
