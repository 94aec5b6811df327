"""The HTML report."""

from dataclasses import dataclass

from sparsight.config.bounds import Count, NotNegative
from sparsight.config.checks import Section


@dataclass(frozen=True)
class Report(Section):
    """The report page."""

    title: str | None = None
    """Heading of the page; null uses the name of the run."""
    images: Count = 10
    """Number of images shown per latent as those that activate it most."""
    megabytes: NotNegative = 20
    """Space in the page for latents and images. The page says what did not fit; 0 leaves out all of it."""
