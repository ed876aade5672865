"""matplotlib, set up so that what it draws takes its colours and its type from the page.

A figure is drawn in colours that stand for a role each; in the SVG they are replaced by variables
of the page's style sheet, so that one drawing serves light and dark.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any, Final

import matplotlib as mpl
from matplotlib.figure import Figure as Drawing

# The roles: what a colour is for, in the order of its number.
_ROLES: Final = (
    *("ink", "muted", "grid", "paper", "good"),
    *("bpf", "tc", "nftables", "iptables", "direct"),
)
INK: Final = {role: f"#0a0b{number:02x}" for number, role in enumerate(_ROLES, 1)}
_WIDTH: Final = 7.2  # inches; the page scales it
_STYLE: Final[Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "pyambient",
    "font.size": 10,
    "text.color": INK["ink"],
    "axes.edgecolor": INK["grid"],
    "axes.labelcolor": INK["muted"],
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "x",
    "figure.facecolor": "none",
    "grid.color": INK["grid"],
    "grid.linewidth": 0.8,
    "xtick.color": INK["grid"],
    "xtick.labelcolor": INK["muted"],
    "ytick.color": INK["grid"],
    "ytick.labelcolor": INK["ink"],
    "ytick.major.size": 0,
}


def drawn(draw: Callable[[Any], None], height: float, title: str) -> str:
    """An inline SVG of what `draw` does with a pair of axes; `title` is for who cannot see it."""
    with mpl.rc_context(_STYLE):
        drawing = Drawing(figsize=(_WIDTH, height), layout="constrained")
        draw(drawing.subplots())
        buffer = io.StringIO()
        drawing.savefig(buffer, format="svg", metadata={"Date": None})
    return _inline(buffer.getvalue(), title)


def _inline(svg: str, title: str) -> str:
    """Without what only a file needs, and as large as there is room for."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)
    for role, colour in INK.items():
        svg = svg.replace(colour, f"var(--{role})")
    return svg
