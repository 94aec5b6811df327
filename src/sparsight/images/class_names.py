"""Class names as words."""


def readable(name: str) -> str:
    """A class name as words: ``apple_pie`` becomes ``apple pie``; ``apartment_building/outdoor`` loses its slash."""
    return name.replace("_", " ").replace("/", " ")
