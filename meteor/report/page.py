"""Pages of a report: Markdown with figure files, and HTML that contains everything."""

import base64
import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup
from PIL import Image

from meteor import storage
from meteor.errors import DataError
from meteor.report.canvas import Drawing
from meteor.report.content import ReportContent, build_content
from meteor.report.data import RunResult, SelectionPanel, StudyTable
from meteor.report.tables import GAPS, MARKS, Table
from meteor.secrets import redact

# Characters that Markdown reads as markup; "_" is markup only at the edge of a word, so that names stay readable.
_MARKDOWN_SPECIAL = re.compile(r"[\\`*|\[\]~$#]|(?<!\w)_|_(?!\w)")
# HTML raises plain letters, which are larger than Unicode's superscripts.
_LETTERS = str.maketrans(MARKS, "abcdefghijklmnoprstuvwxyz")


@dataclass(frozen=True)
class ReportPaths:
    """URIs of the two pages; the figures of the Markdown page are in ``figures/`` beside it."""

    markdown: str
    html: str


def write_report(
    uri: str,
    *,
    title: str,
    variants: Sequence[RunResult],
    panels: Sequence[SelectionPanel] = (),
    cache: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
    thumbnails: Mapping[str, Image.Image] | None = None,
    tables: Sequence[StudyTable] = (),
) -> ReportPaths:
    """Write ``report.md``, ``report.html`` and ``figures/*.png``; they replace an older report in the folder.

    With ``tables`` the report is that of a study: the seeds of a variant share a row, differences have intervals, results are
    laid out as in the paper, and ``*.csv`` files have the numbers.

    Args:
        uri: URI of the folder, local or S3.
        title: heading of both pages.
        variants: results to compare, in the order of the page; at least one.
        panels: images whose selection is drawn.
        cache: facts about the feature cache in the order of the page. ``num_...`` are shown as counts, ``..._bytes`` with
            units, ``quarantine_reasons`` as {reason: count}. None if there is no cache.
        notes: sentences below the title.
        thumbnails: image name -> image, for the answers of `meteor.report.predictions.choose_predictions`.
        tables: tables of a study.

    Raises:
        DataError: there are no variants, or two have the same name.
        StorageError: the folder cannot be written.
    """
    names = [variant.name for variant in variants]
    if not names or len(set(names)) < len(names):
        raise DataError(f"a report compares variants by name, got {names}; give at least one variant, each name once")
    content = build_content(title, variants, panels, cache, notes, thumbnails or {}, tables)
    for drawing in content.drawings():
        storage.write_bytes(storage.join(uri, "figures", f"{drawing.name}.png"), drawing.png)
    for name, text in (content.study.csv_files if content.study else {}).items():
        storage.write_bytes(storage.join(uri, name), redact(text).encode())
    paths = ReportPaths(markdown=storage.join(uri, "report.md"), html=storage.join(uri, "report.html"))
    storage.write_bytes(paths.markdown, _render("report.md.j2", content))
    storage.write_bytes(paths.html, _render("report.html.j2", content))
    return paths


def escape_markdown(text: str) -> str:
    """Escape a text and put it on one line, so that Markdown and HTML in Markdown show it unchanged, even in table cells."""
    one_line = " ".join(text.split())
    return _MARKDOWN_SPECIAL.sub(lambda match: "\\" + match.group(), html.escape(one_line, quote=False))


def _html_cell(text: str) -> Markup:
    """Escape a text for HTML, with the letters of footnotes large enough to read and numbers like "9 of 12" unbroken."""
    marked = re.sub(
        f"[{MARKS}]+", lambda found: f"<sup>{found.group().translate(_LETTERS)}</sup>", html.escape(text, quote=False)
    )
    return Markup(re.sub(r"(?<=\d) of (?=\d)", "&nbsp;of&nbsp;", marked))


def _markdown_table(table: Table) -> str:
    rule = ["---", *["---:" if table.numeric else "---"] * (len(table.columns) - 1)]
    rows = [[escape_markdown(cell) for cell in row] for row in (table.columns, *table.rows)]
    # The paper's rows are in italics, as Markdown has no shading.
    rows[1 : 1 + table.theirs] = [[f"*{cell}*" if cell else "" for cell in row] for row in rows[1 : 1 + table.theirs]]
    lines = "\n".join(f"| {' | '.join(cells)} |" for cells in (rows[0], rule, *rows[1:]))
    # Two spaces at the end of a line break it.
    notes = "  \n".join(map(escape_markdown, table.footnotes))
    return f"{lines}\n\n{notes}" if notes else lines


def _data_uri(drawing: Drawing) -> str:
    return "data:image/png;base64," + base64.b64encode(drawing.png).decode("ascii")


def _render(template: str, content: ReportContent) -> bytes:
    environment = Environment(
        loader=PackageLoader("meteor.report", ""),
        autoescape=select_autoescape(["html.j2"], default=False),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        md=escape_markdown, html_cell=_html_cell, markdown_table=_markdown_table, data_uri=_data_uri
    )
    environment.globals["gaps"] = GAPS
    return redact(environment.get_template(template).render(report=content)).encode("utf-8")
