"""Figures as SVG text that is identical in equal runs."""

import io

import matplotlib
from matplotlib.figure import Figure

matplotlib.rcParams.update(
    {"svg.hashsalt": "sparsight", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
)


def svg(figure: Figure) -> str:
    """The figure as SVG text, from its ``<svg`` tag on."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
