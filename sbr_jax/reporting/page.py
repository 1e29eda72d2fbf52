"""One self-contained HTML page: no script, no font, no image from elsewhere."""

import html
from collections.abc import Sequence

from sbr_jax import outputs as files
from sbr_jax.analysis.theme import DARK, LIGHT, to_svg
from sbr_jax.reporting.figures import Drawing
from sbr_jax.reporting.tables import to_html

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


def _variables() -> str:
    def block(colors: dict[str, str], tint: str) -> str:
        rows = "".join(f"--{key}:{color};" for key, color in colors.items())
        return f"{rows}--tint:{tint};"

    light = block(LIGHT, "#fdf1ea")
    dark = block(DARK, "#33241b")
    return (
        f":root{{color-scheme:light dark;{light}}}\n"
        f"@media (prefers-color-scheme:dark){{:root{{{dark}}}}}\n"
    )


def paragraph(text: str, kind: str = "") -> str:
    """Write a paragraph of plain text."""
    attribute = f' class="{kind}"' if kind else ""
    return f"<p{attribute}>{html.escape(text)}</p>"


def heading(text: str, level: int = 2) -> str:
    """Write a heading."""
    return f"<h{level}>{html.escape(text)}</h{level}>"


def warning_box(messages: Sequence[str]) -> str:
    """Write a box of warnings, or nothing."""
    if not messages:
        return ""
    items = "".join(f"<li>{html.escape(message)}</li>" for message in messages)
    return (
        f'<div class="warning" role="note"><strong>Read this first</strong>'
        f"<ul>{items}</ul></div>"
    )


def drawing_block(drawing: Drawing, prefix: str) -> str:
    """Write a figure with caption and numbers, or the reason for its absence."""
    parts = [heading(drawing.title)]
    if drawing.figure is None:
        parts.append(paragraph(drawing.missing, "missing"))
        return "\n".join(parts)
    alt = f"{drawing.title}. {drawing.caption}"
    svg = to_svg(drawing.figure, name=f"{prefix}{drawing.name}", alt=alt)
    caption = html.escape(drawing.caption)
    parts.append(f"<figure>\n{svg}\n<figcaption>{caption}</figcaption></figure>")
    if drawing.table is not None and drawing.table.rows:
        table = to_html(drawing.table)
        parts.append(f"<details><summary>The numbers</summary>\n{table}\n</details>")
    return "\n".join(parts)


def definitions(rows: Sequence[tuple[str, str]]) -> str:
    """Write a list of names and values."""
    items = "".join(
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>"
        for name, value in rows
    )
    return f"<dl>{items}</dl>"


def page(title: str, body: Sequence[str]) -> str:
    """Put a body into a whole document."""
    content = "\n".join(part for part in body if part)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        f'<meta name="generator" content="{files.MARK}">\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{_variables()}{_CSS}</style>\n"
        f"</head>\n<body>\n<main>\n{content}\n</main>\n</body>\n</html>\n"
    )
