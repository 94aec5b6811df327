"""Class names as words, and the texts that name a class: templates with ``{}`` for the name.

The templates are those of CLIP's own evaluation (arXiv 2103.00020; openai/CLIP, data/prompts.md), the first few of
each data set.
"""

DEFAULT = ("a photo of a {}.",)

TEMPLATES: dict[str, tuple[str, ...]] = {
    "mnist-5000": ('a photo of the number: "{}".',),
    "cifar10": ("a photo of a {}.", "a blurry photo of a {}.", "a low contrast photo of a {}.", "a photo of the {}."),
    "cifar100": ("a photo of a {}.", "a blurry photo of a {}.", "a low contrast photo of a {}.", "a photo of the {}."),
    "stl10": ("a photo of a {}.", "a photo of the {}."),
    "caltech101": ("a photo of a {}.", "a photo of the {}."),
    "food101": ("a photo of {}, a type of food.",),
    "flowers102": ("a photo of a {}, a type of flower.",),
    "fgvc-aircraft": ("a photo of a {}, a type of aircraft.", "a photo of the {}, a type of aircraft."),
    "cub200": ("a photo of a {}, a type of bird.",),
    "dtd": ("a photo of a {} texture.", "a photo of a {} pattern."),
    "eurosat": ("a centered satellite photo of {}.", "a centered satellite photo of a {}."),
    "sun397": ("a photo of a {}.", "a photo of the {}."),
}


def templates_of(source: str) -> tuple[str, ...]:
    """The templates of an image source, ``a photo of a {}.`` where it has none of its own."""
    return TEMPLATES.get(source, DEFAULT)


def readable(name: str) -> str:
    """A class name as words: ``apple_pie`` is ``apple pie``, ``apartment_building/outdoor`` loses its slash."""
    return name.replace("_", " ").replace("/", " ")
