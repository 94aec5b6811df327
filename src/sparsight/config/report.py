"""The report."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Report:
    """The page."""

    title: str | None = None
    """Heading of the page; null names the run."""
    latents: int = 200
    """Latents of each SAE in the browser: those that select for a class most."""
    images: int = 10
    """Images of each: those that activate it most."""
