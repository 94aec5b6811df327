"""Prompt texts of a class: templates with ``{}`` for the class name."""

from sparsight.config.backbone import PUBLISHED

PLAIN = ("a photo of a {}.",)

_PHOTOS = (
    "photo of {} {}", "blurry photo of {} {}", "black and white photo of {} {}", "low contrast photo of {} {}",
    "high contrast photo of {} {}", "bad photo of {} {}", "good photo of {} {}", "photo of {} small {}",
    "photo of {} big {}",
)  # fmt: skip
_ART = (
    "a photo of {} {}", "a painting of {} {}", "{} plastic {}", "a sculpture of {} {}", "a sketch of {} {}",
    "a tattoo of {} {}", "{} toy {}", "a rendition of {} {}", "{} embroidered {}", "{} cartoon {}",
    "{} {} in a video game", "{} plushie {}", "{} origami {}", "art of {} {}", "graffiti of {} {}",
    "a drawing of {} {}", "a doodle of {} {}",
)  # fmt: skip


def _articles(*texts: str) -> tuple[str, ...]:
    """Each text with ``a``, then each with ``the``."""
    return tuple(text.format(article, "{}") + "." for article in ("a", "the") for text in texts)


_CIFAR = _articles(*(f"a {text}" for text in _PHOTOS))
_ENSEMBLES: dict[str, tuple[str, ...]] = {
    "mnist-5000": ('a photo of the number: "{}".',),
    "cifar10": _CIFAR,
    "cifar100": _CIFAR,
    "stl10": _articles("a photo of {} {}"),
    "caltech101": _articles(*_ART),
    "food101": ("a photo of {}, a type of food.",),
    "flowers102": ("a photo of a {}, a type of flower.",),
    "fgvc-aircraft": _articles("a photo of {} {}, a type of aircraft"),
    "cub200": ("a photo of a {}, a type of bird.",),
    "dtd": _articles(*(f"a photo of {{}} {{}} {noun}" for noun in ("texture", "pattern", "thing", "object"))),
    "eurosat": ("a centered satellite photo of {}.", *_articles("a centered satellite photo of {} {}")),
    "sun397": _articles("a photo of {} {}"),
}


def templates_of(source: str, choice: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The templates for an image source.

    Args:
        source: name of the image source.
        choice: templates, or ``("published",)``; empty for one plain template. Published are the ensembles of CLIP's
            own evaluation (arXiv 2103.00020; openai/CLIP, data/prompts.md). Tiny-ImageNet gets its 80 templates for
            ImageNet, CUB-200 its pattern for fine-grained sets. A source without an ensemble gets the plain template.
    """
    if choice != (PUBLISHED,):
        return choice or PLAIN
    if source in ("imagenet", "tiny-imagenet"):
        from open_clip import OPENAI_IMAGENET_TEMPLATES  # takes seconds to import

        return tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES)
    return _ENSEMBLES.get(source, PLAIN)
