"""Made-up pictures of shapes whose places are known, pixel by pixel.

Shapes: H height, W width.
"""

from dataclasses import dataclass

import numpy as np

from sparsight.common.seeds import derive_seed
from sparsight.images.sources.base import Item, Masks, Reopening
from sparsight.images.sources.coloured import COLOURS
from sparsight.images.sources.listing import log_rows

SHAPES = ("circle", "square", "triangle", "cross")
"""The classes; number n of a mask is ``SHAPES[n - 1]``."""
_IMAGES, _SIDE = 4000, 64
_LARGEST, _OTHERS = (10, 15), (4, 6)
"""Half the side of a shape, in pixels: the largest one of an image has at least 1.4 times the area of any other."""
_NAME = "coloured-shapes"


@dataclass(frozen=True)
class _Shape:
    kind: int
    colour: int
    row: int
    column: int
    half: int

    def near(self, other: "_Shape") -> bool:
        """Whether their squares touch."""
        reach = self.half + other.half + 1
        return abs(self.row - other.row) <= reach and abs(self.column - other.column) <= reach

    @property
    def pixels(self) -> np.ndarray:
        """Which pixels of the picture it covers, bool (H, W)."""
        place = np.arange(_SIDE)
        y, x, half = place[:, None] - self.row, place[None, :] - self.column, self.half
        square = (abs(y) <= half) & (abs(x) <= half)
        match SHAPES[self.kind]:
            case "circle":
                return y**2 + x**2 <= half**2
            case "triangle":
                return square & (2 * abs(x) <= y + half)
            case "cross":
                arm = max(1, half // 3)
                return square & ((abs(y) <= arm) | (abs(x) <= arm))
        return square


class ColouredShapes(Reopening):
    """4,000 pictures, 64 x 64 RGB, of one to three shapes on a lightly textured background; no files.

    The label is the shape of the largest one, the further label column ``colour`` its colour; both are balanced and
    independent. The others have any shape and colour. No two touch. All is drawn with a seed of the source's own.
    """

    def __init__(self, path: str | None = None) -> None:
        self.path = path

    def items(self) -> list[Item]:
        log_rows(_NAME, _IMAGES)
        names = list(COLOURS)
        largest = [_largest(i) for i in range(_IMAGES)]
        return [
            Item(f"{_NAME}:{i}", SHAPES[kind], None, columns={"colour": names[colour]})
            for i, (kind, colour) in enumerate(largest)
        ]

    def class_names(self) -> list[str]:
        return list(SHAPES)

    def read(self, uri: str) -> bytes:
        shapes, generator = _scene(uri)
        ground = generator.integers(60, 130) + generator.integers(-20, 21, 3)
        picture = np.broadcast_to(ground, (_SIDE, _SIDE, 3)).astype(np.float64)
        for shape in shapes:
            picture[shape.pixels] = np.array(list(COLOURS.values())[shape.colour]) * 0.8 + 25
        coarse = generator.normal(0, 8, (_SIDE // 8, _SIDE // 8)).repeat(8, axis=0).repeat(8, axis=1)
        picture += (coarse + generator.normal(0, 6, (_SIDE, _SIDE)))[:, :, None]
        return picture.round().clip(0, 255).astype(np.uint8).tobytes()

    def decode(self, uri: str, data: bytes) -> np.ndarray:
        return np.frombuffer(data, np.uint8).reshape(_SIDE, _SIDE, 3)

    def mask(self, uri: str) -> np.ndarray:
        """Number of the shape at each pixel, uint8 (H, W); 0 is the background, n is ``SHAPES[n - 1]``."""
        mask = np.zeros((_SIDE, _SIDE), np.uint8)
        for shape in _scene(uri)[0]:
            mask[shape.pixels] = shape.kind + 1
        return mask

    def masks(self) -> Masks:
        return _ShapeMasks(self)


@dataclass(frozen=True)
class _ShapeMasks:
    """The masks of :class:`ColouredShapes`."""

    source: ColouredShapes

    def names(self) -> list[str]:
        return list(SHAPES)

    def read(self, uri: str) -> bytes:
        return self.source.mask(uri).tobytes()

    def decode(self, uri: str, data: bytes) -> np.ndarray:
        return np.frombuffer(data, np.uint8).reshape(_SIDE, _SIDE)


def _largest(number: int) -> tuple[int, int]:
    """Kind and colour of the largest shape of a picture."""
    return number % len(SHAPES), number // len(SHAPES) % len(COLOURS)


def _scene(uri: str) -> tuple[list[_Shape], np.random.Generator]:
    """The shapes of a picture, and the generator that goes on to draw its texture."""
    number = int(uri.partition(":")[2])
    generator = np.random.default_rng(derive_seed(0, _NAME, number))

    def drawn(kind: int, colour: int, halves: tuple[int, int]) -> _Shape:
        half = int(generator.integers(*halves, endpoint=True))
        row, column = (int(place) for place in generator.integers(half, _SIDE - half, 2))
        return _Shape(kind, colour, row, column, half)

    shapes = [drawn(*_largest(number), _LARGEST)]
    for _ in range(generator.integers(3)):
        kind, colour = int(generator.integers(len(SHAPES))), int(generator.integers(len(COLOURS)))
        other = drawn(kind, colour, _OTHERS)
        while any(map(other.near, shapes)):
            other = drawn(kind, colour, _OTHERS)
        shapes.append(other)
    return shapes, generator
