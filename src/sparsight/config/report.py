"""The HTML report."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Report:
    """The report page."""

    title: str | None = None
    """Heading of the page; null uses the name of the run."""
    latents: int = 200
    """Number of latents shown per SAE: those most selective for a class."""
    images: int = 10
    """Number of images shown per latent: those that activate it most."""
