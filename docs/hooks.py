"""What MkDocs does not do by itself: formulas as images in the page, so that it needs no script and no other host."""

from __future__ import annotations

import re
from html import escape, unescape
from typing import Any

import ziamath

_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
_LENGTH = re.compile(r'\b(width|height)="([\d.]+)"')
_ROLE = re.compile(r":(?:func|class|meth|mod|data|attr):(?=<code>)")

_SIZE = 16.0
ziamath.config.svg2 = False  # its symbols have the same names in every image
ziamath.config.precision = 2


def _image(formula: str, *, inline: bool) -> str:
    image = ziamath.Latex(formula, size=_SIZE, color="currentColor", inline=inline)
    drawing = _LENGTH.sub(lambda match: f'{match[1]}="{float(match[2]) / _SIZE:.3f}em"', image.svg(), count=2)
    style = f' style="vertical-align: {image.getyofst() / _SIZE:.3f}em"' if inline else ""
    return drawing.replace("<svg ", f'<svg role="img" aria-label="{escape(formula)}"{style} ', 1)


def _formula(match: re.Match[str]) -> str:
    tag, text = match.groups()
    formula = " ".join(unescape(text).split())
    if tag == "span":
        return _image(formula, inline=True)
    # What stands side by side on a wide screen stands one below the other on a narrow one.
    images = [_image(part, inline=False) for part in re.split(r"(?:\\qquad\s*)+", formula)]
    return f'<div class="formula">{"".join(images)}</div>'


def on_page_content(html: str, **_: Any) -> str:
    """Draw the formulas of a page, and take the marks of reStructuredText out of its docstrings."""
    html = _FORMULA.sub(_formula, html)
    return _ROLE.sub("", html).replace("::</p>", ":</p>")
