"""The HTML report."""

from dataclasses import dataclass
from pathlib import Path

from sparsight.common.errors import SparsightError
from sparsight.config.bounds import Count, NotNegative
from sparsight.config.checks import Section


@dataclass(frozen=True)
class Report(Section):
    """The report page."""

    title: str | None = None
    """Heading of the page; null uses the name of the run."""
    words: str | None = None
    """Text file with a word or phrase a line, among which an image-text model of the run finds names for latents; null
    takes the class names (docs/evaluation.md). It changes the evaluation of SAEs."""
    images: Count = 10
    """Number of images shown per latent as those that activate it most."""
    megabytes: NotNegative = 20
    """Space in the page for latents and images. The page says what did not fit; 0 leaves out all of it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.words is not None and not Path(self.words).is_file():
            raise SparsightError(
                f"words: there is no file {self.words!r}; give a text file with a word a line, or null"
            )
