"""What the report pages share: the template that they extend, and figures in its colours."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Colours that the page's own take the place of, so that figures follow light and dark.
INK, LINE, FAINT = "#010203", "#040506", "#070809"
_THEME = {INK: "currentColor", LINE: "var(--line)", FAINT: "var(--faint)"}
_STYLE = {
    "font.size": 10,
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.facecolor": "none",
    "axes.axisbelow": True,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}


def render(template: Path, **values: Any) -> str:
    """Fill in a template, which may extend `page_base.html`; nothing that it names may be missing.

    Raises:
        ImportError: jinja2 is missing.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    return environment.get_template(template.name).render(values)


@contextmanager
def drawing(salt: str) -> Iterator[None]:
    """The style that figures are drawn in; the salt makes their ids their own on the page.

    Raises:
        ImportError: matplotlib is missing.
    """
    import matplotlib as mpl

    with mpl.rc_context({**_STYLE, "svg.hashsalt": salt}):
        yield


def svg(figure: Any) -> str:
    """A figure as an element of a page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    for colour, themed in _THEME.items():
        text = text.replace(colour, themed)
    return text[text.index("<svg") :]
