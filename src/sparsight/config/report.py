"""The HTML report."""

from dataclasses import dataclass

from sparsight.config.bounds import Count, CountOrZero
from sparsight.config.checks import Section


@dataclass(frozen=True)
class Report(Section):
    """The report page."""

    title: str | None = None
    """Heading of the page; null uses the name of the run."""
    latents: CountOrZero = 200
    """Number of latents shown per SAE: those most selective for a class."""
    images: Count = 10
    """Number of images shown per latent: those that activate it most."""
