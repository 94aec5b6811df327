"""Figures as SVG text that is identical in equal runs: colours, text and a description.

A figure is drawn for white paper. In the page, :func:`inline` exchanges its colours for variables of the style sheet,
so that they follow the page's scheme.
"""

import html
import io
import re

import matplotlib
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure

INK, QUIET, LINE, PAPER = "#1b1b1f", "#5b5b66", "#d5d5dc", "#ffffff"
# The hues of Okabe and Ito's palette, distinguishable with any colour vision, as dark as small text on white needs.
BLUE, ORANGE, GREEN, PURPLE, AMBER, GREY = "#0068a6", "#bf4e00", "#00785a", "#a33f7c", "#8a6100", "#73737e"
CYCLE = (BLUE, ORANGE, GREEN, PURPLE, AMBER, INK)
WIDTH = 10.5
"""Inches that the page's text is wide."""

_VARIABLES = {
    INK: "text", QUIET: "quiet", LINE: "line", PAPER: "back", BLUE: "blue", ORANGE: "orange", GREEN: "green",
    PURPLE: "purple", AMBER: "amber", GREY: "grey",
}  # fmt: skip

matplotlib.rcParams.update(
    {
        "svg.hashsalt": "sparsight", "svg.fonttype": "none", "font.size": 9, "legend.fontsize": 9,
        "axes.titlesize": 9, "axes.titleweight": "bold", "axes.titlelocation": "left",
        "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
        "figure.facecolor": PAPER, "axes.facecolor": "none", "text.color": INK, "axes.labelcolor": INK,
        "axes.edgecolor": QUIET, "xtick.color": QUIET, "ytick.color": QUIET,
        "xtick.labelcolor": INK, "ytick.labelcolor": INK,
    }
)  # fmt: skip


def _from_paper(name: str, colour: str) -> LinearSegmentedColormap:
    """No opacity at 0 and the colour at 1, so that 0 looks like the page in either scheme."""
    return LinearSegmentedColormap.from_list(name, [(*to_rgb(colour), 0), (*to_rgb(colour), 1)])


SHARES = _from_paper("shares", BLUE)
SIGNED = LinearSegmentedColormap.from_list(
    "signed", [(*to_rgb(ORANGE), 1), (*to_rgb(ORANGE), 0), (*to_rgb(BLUE), 0), (*to_rgb(BLUE), 1)]
)


def svg(figure: Figure, title: str, description: str) -> str:
    """The figure as SVG text, from its ``<svg`` tag on, with its title and a description of its main numbers."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=nothing)
    text = buffer.getvalue()
    text = re.sub(r'<g id="[^"]*">', "<g>", text[text.index("<svg") :])
    about = f"<title>{html.escape(title)}</title>\n<desc>{html.escape(description)}</desc>\n"
    return re.sub(r"(<svg[^>]*>\n?)", lambda match: match[1] + about, text, count=1)


def inline(name: str, text: str) -> str:
    """The figure for the page: in the page's colours, under a name of its own."""
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    text = text.replace("<title>", f'<title id="{name}-title">', 1).replace("<desc>", f'<desc id="{name}-desc">', 1)
    said = f'role="img" aria-labelledby="{name}-title" aria-describedby="{name}-desc"'
    return text.replace("<svg ", f"<svg {said} ", 1)
