"""A figure as SVG text that is the same in equal runs."""

import io

import matplotlib
from matplotlib.figure import Figure

matplotlib.rcParams.update(
    {"svg.hashsalt": "sparsight", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
)


def svg(figure: Figure) -> str:
    """The figure, from its first tag on."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
