"""Pages that need nothing but themselves: one file, no network, readable on a phone and on paper."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from typing import Any

STYLE = """
:root { color-scheme: light dark; }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 70rem; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
img, canvas { max-width: 100%; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; overflow-wrap: normal; font-variant-numeric: tabular-nums; }
td, th { padding: .2rem .7rem .2rem 0; text-align: left; border-bottom: 1px solid #8884; vertical-align: top; }
pre { overflow-x: auto; padding: .6rem; background: #8882; }
td:nth-child(5) { min-width: 12rem; }  /* the meaning of a metric: on a phone it is scrolled to, not squeezed */
.verdict { padding: .6rem .9rem; border-left: .4rem solid #888; background: #8882; }
.LEARNING { border-color: #2a8; } .PLATEAU { border-color: #28a; } .COLLAPSING, .COLLAPSED { border-color: #c33; }
@media print {  /* nothing scrolls on paper, and a picture is not cut by the end of a page */
  body { max-width: none; } h2, h2 + p { break-after: avoid; } img, canvas, tr, pre { break-inside: avoid; }
  img { max-height: 85vh; } .wide, pre { overflow: visible; } pre { white-space: pre-wrap; } td:nth-child(5) { min-width: 0; }
}
"""


def page(title: str, body: str, script: str = "", style: str = "") -> str:
    """A whole page. ``body``: HTML, ``script``: JavaScript."""
    code = f"<script>\n{script}\n</script>" if script else ""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{STYLE}{style}</style></head>\n<body>\n<h1>{escape(title)}</h1>\n{body}\n{code}"
        "</body></html>\n"
    )


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Cells are escaped; numbers have four digits."""
    head = "".join(f"<th>{escape(h)}</th>" for h in header)
    lines = "".join("<tr>" + "".join(f"<td>{escape(cell(c))}</td>" for c in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>{lines}</table></div>'


def cell(value: Any) -> str:
    """A number with four digits, anything else as it is."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def data(value: Any) -> str:
    """JSON that may stand in a script."""
    return json.dumps(value, allow_nan=False).replace("</", "<\\/")
