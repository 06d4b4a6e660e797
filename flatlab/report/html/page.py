"""One HTML file: sentences, tables and pictures; plotly.js, where a picture needs it, is part of the file."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flatlab import files, plots
from flatlab.errors import UserError

LARGEST = 6_000_000  # bytes
ROWS = 60  # of a table; a longer one says how many are left out
CSS = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2, h3 { line-height: 1.2; } h2 { margin-top: 3rem; border-bottom: 1px solid #ccc; }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.15rem 0.7rem; text-align: right; border-bottom: 1px solid #eee; overflow-wrap: anywhere; }
.wide { overflow-x: auto; margin: 1rem 0; } code { background: #f4f4f4; padding: 0.1rem 0.3rem; }
svg { max-width: 100%; height: auto; }
"""


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        title: of the part.
        sentences: what can be concluded.
        pictures: of plotly, or of matplotlib.
        tables: by their captions.
        level: of the title, 2 or 3.
    """

    title: str
    sentences: Sequence[str] = ()
    pictures: Sequence[Any] = ()
    tables: Sequence[tuple[str, pd.DataFrame]] = ()
    level: int = 2


def write(path: Path, title: str, sections: Sequence[Section]) -> Path:
    """Write the page, atomically.

    Args:
        path: of the file.
        title: of the page.
        sections: its parts, in order.

    Raises:
        UserError: where plotly is not installed, or the file would be larger than 6 MB.
    """
    turning = any(not isinstance(each, Figure) for section in sections for each in section.pictures)
    body = "\n".join(map(_section, sections))
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{CSS}</style>'
    script = f"<script>{_plotly_js()}</script>" if turning else ""
    body = f"<body><h1>{escape(title)}</h1>{body}</body>"
    content = f'<!DOCTYPE html><html lang="en"><head>{head}{script}</head>{body}</html>'.encode()
    if len(content) > LARGEST:
        megabytes = f"{LARGEST / 1e6:g} MB, got {len(content) / 1e6:.1f}"
        raise UserError(f"A report must be at most {megabytes}: name fewer runs or files.")
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_bytes(path, content)
    return path


def _plotly_js() -> str:
    plots.plotly()
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


def _section(section: Section) -> str:
    parts = [f"<h{section.level}>{escape(section.title)}</h{section.level}>"]
    if section.sentences:
        parts.append(f"<ul>{''.join(f'<li>{escape(each)}</li>' for each in section.sentences)}</ul>")
    parts += [f'<div class="wide">{_picture(each)}</div>' for each in section.pictures]
    parts += [_table(caption, frame) for caption, frame in section.tables]
    return "\n".join(parts)


def _picture(picture: Any) -> str:
    if not isinstance(picture, Figure):
        return str(picture.to_html(full_html=False, include_plotlyjs=False, config={"displaylogo": False}))
    with io.StringIO() as text:
        picture.savefig(text, format="svg", metadata={"Date": None})
        plt.close(picture)
        return text.getvalue().partition("<!DOCTYPE")[2].partition(">")[2]


def _table(caption: str, frame: pd.DataFrame) -> str:
    left = f" The first {ROWS} of {len(frame):,} rows." if len(frame) > ROWS else ""
    cells = frame.head(ROWS).to_html(index=False, border=0, float_format=lambda value: f"{value:.4g}", na_rep="")
    return f'<p>{escape(caption)}{left}</p><div class="wide">{cells}</div>'


def figure_of(result: Any) -> Any:
    """Return the picture of a result: interactive where it has such a one, else as `plot` draws it; None without."""
    if hasattr(result, "interactive"):
        return result.interactive()
    if not hasattr(result, "plot"):
        return None
    with plots.style():
        drawn = result.plot()
        axes: Axes = drawn if isinstance(drawn, Axes) else drawn[0]
        return axes.figure
