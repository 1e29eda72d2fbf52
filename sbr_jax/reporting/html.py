"""Self-contained HTML pages: no external script, font or image."""

import html
from collections.abc import Sequence

from sbr_jax import files
from sbr_jax.reporting.figures import Drawing
from sbr_jax.reporting.tables import Table, to_html
from sbr_jax.reporting.theme import DARK, LIGHT, to_svg

_CSS = """
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:60rem;margin:0 auto;padding:2.5rem 1.25rem 4rem}
h1{font-size:1.9rem;line-height:1.2;margin:0 0 .4rem;letter-spacing:-.01em}
h2{font-size:1.2rem;margin:2.8rem 0 .6rem}
p{max-width:46rem;margin:.4rem 0 1rem}
.lead,.note,figcaption,summary{color:var(--soft)}
.note,figcaption,summary{font-size:.9rem}
figure{margin:0 0 .5rem}
figure svg{width:100%;height:auto;display:block}
figcaption{margin-top:.5rem;max-width:46rem}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.88rem;font-variant-numeric:tabular-nums;
min-width:100%}
th,td{padding:.4rem .7rem;text-align:right;border-bottom:1px solid var(--grid);
white-space:nowrap}
th:first-child{text-align:left}
thead th{color:var(--soft);font-weight:600;border-bottom:1px solid var(--soft)}
tbody th{font-weight:600}
.warning{border-left:4px solid var(--series-1);background:var(--tint);
padding:.7rem 1rem;margin:1.2rem 0;border-radius:0 .3rem .3rem 0}
.warning strong{display:block}
.warning ul{margin:.3rem 0 0;padding-left:1.1rem}
.missing{border:1px dashed var(--muted);border-radius:.3rem;padding:1rem;
color:var(--soft)}
details{margin:.6rem 0}
summary{cursor:pointer}
summary:focus-visible{outline:2px solid var(--series-2);outline-offset:2px}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.15rem 1.2rem;
font-size:.88rem}
dt{color:var(--soft)}
dd{margin:0;overflow-wrap:anywhere}
hr{border:0;border-top:1px solid var(--grid);margin:3.5rem 0 2.5rem}
@media print{details{display:block}}
"""


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of plain text."""
    attribute = f' class="{kind}"' if kind else ""
    return f"<p{attribute}>{html.escape(text)}</p>"


def heading(text: str, level: int = 2) -> str:
    """A heading."""
    return f"<h{level}>{html.escape(text)}</h{level}>"


def bullets(items: Sequence[str]) -> str:
    """A list of plain texts."""
    return "<ul>" + "".join(f"<li>{html.escape(x)}</li>" for x in items) + "</ul>"


def details(summary: str, content: str) -> str:
    """Content that opens on demand."""
    return f"<details><summary>{html.escape(summary)}</summary>\n{content}\n</details>"


def warning_box(messages: Sequence[str]) -> str:
    """A box of warnings, or nothing."""
    if not messages:
        return ""
    return (
        '<div class="warning" role="note"><strong>Read this first</strong>'
        f"{bullets(messages)}</div>"
    )


def noted_table(table: Table, title: str = "") -> str:
    """A table with its notes below; empty for an empty table."""
    if not table.rows:
        return ""
    parts = [heading(title)] if title else []
    return "\n".join([*parts, to_html(table), paragraph(" ".join(table.notes), "note")])


def drawing_block(drawing: Drawing, prefix: str) -> str:
    """A figure with caption and numbers, or the reason for its absence."""
    title = heading(drawing.title)
    if drawing.figure is None:
        return f"{title}\n{paragraph(drawing.caption, 'missing')}"
    alt = f"{drawing.title}. {drawing.caption}"
    svg = to_svg(drawing.figure, name=f"{prefix}{drawing.name}", alt=alt)
    caption = html.escape(drawing.caption)
    figure = f"<figure>\n{svg}\n<figcaption>{caption}</figcaption></figure>"
    table = drawing.table
    numbers = details("The numbers", to_html(table)) if table and table.rows else ""
    return f"{title}\n{figure}\n{numbers}".rstrip()


def definitions(rows: Sequence[tuple[str, str]]) -> str:
    """A list of names and values."""
    items = (
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>"
        for name, value in rows
    )
    return f"<dl>{''.join(items)}</dl>"


def page(title: str, body: Sequence[str]) -> str:
    """A whole document with this body."""
    light, dark = (
        "".join(f"--{key}:{color};" for key, color in (*colors.items(), ("tint", tint)))
        for colors, tint in ((LIGHT, "#fdf1ea"), (DARK, "#33241b"))
    )
    variables = (
        f":root{{color-scheme:light dark;{light}}}\n"
        f"@media (prefers-color-scheme:dark){{:root{{{dark}}}}}\n"
    )
    content = "\n".join(part for part in body if part)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        f'<meta name="generator" content="{files.MARK}">\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{variables}{_CSS}</style>\n"
        f"</head>\n<body>\n<main>\n{content}\n</main>\n</body>\n</html>\n"
    )
