"""Class names as words, and their order."""

import re
from collections.abc import Iterable


def readable(name: str) -> str:
    """A class name as words: ``apple_pie`` becomes ``apple pie``; ``apartment_building/outdoor`` loses its slash."""
    return name.replace("_", " ").replace("/", " ")


def in_order(names: Iterable[str]) -> list[str]:
    """Different class names in order: of their values if all are whole numbers, else of the alphabet."""
    different = sorted(set(names))
    return sorted(different, key=int) if all(re.fullmatch(r"-?\d+", name) for name in different) else different
