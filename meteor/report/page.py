"""A report's tables and figures as a Markdown page with figure files, and as one HTML page that needs nothing else."""

import base64
import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from PIL import Image

from meteor import storage
from meteor.errors import DataError
from meteor.report.canvas import Drawing
from meteor.report.content import ReportContent, build_content
from meteor.report.data import SelectionPanel, StudyTable, VariantResult
from meteor.report.tables import GAPS, Table

# What Markdown would read as markup anywhere in a line; "_" only at a word's edge, so that names stay readable.
_MARKDOWN_SPECIAL = re.compile(r"[\\`*|\[\]~$#]|(?<!\w)_|_(?!\w)")


@dataclass(frozen=True)
class ReportPaths:
    """URIs of the two pages; the Markdown page's figures lie in ``figures/`` beside it."""

    markdown: str
    html: str


def write_report(
    uri: str,
    *,
    title: str,
    variants: Sequence[VariantResult],
    panels: Sequence[SelectionPanel] = (),
    cache: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
    thumbnails: Mapping[str, Image.Image] | None = None,
    tables: Sequence[StudyTable] = (),
) -> ReportPaths:
    """Draw and write ``report.md``, ``report.html`` and ``figures/*.png``; an older report in the folder is replaced.

    With ``tables`` it is a study's: seeds of a variant become one row, differences are tested, the paper's tables stand in its
    own layout, and the numbers lie beside the pages as ``*.csv``.

    Args:
        uri: folder, local or S3.
        title: heading of both pages.
        variants: compared side by side, in this order; at least one.
        panels: images whose selection is drawn.
        cache: facts about the feature cache, shown in this order: ``num_...`` as counts, ``..._bytes`` with units,
            ``quarantine_reasons`` as {reason: count}, everything else as it is. None if there is none.
        notes: sentences shown under the title.
        thumbnails: image name -> image, for the answers of `meteor.report.predictions.choose_predictions`.
        tables: of a study.

    Raises:
        DataError: no variants, or two of one name.
        StorageError: the folder cannot be written.
    """
    names = [variant.name for variant in variants]
    if not names or len(set(names)) < len(names):
        raise DataError(f"a report compares variants by name, got {names}; give at least one, each name once")
    content = build_content(title, variants, panels, cache, notes, thumbnails or {}, tables)
    for drawing in content.drawings():
        storage.write_bytes(storage.join(uri, "figures", f"{drawing.name}.png"), drawing.png)
    for name, text in (content.study.csv_files if content.study else {}).items():
        storage.write_bytes(storage.join(uri, name), text.encode())
    paths = ReportPaths(markdown=storage.join(uri, "report.md"), html=storage.join(uri, "report.html"))
    storage.write_bytes(paths.markdown, _render("report.md.j2", content))
    storage.write_bytes(paths.html, _render("report.html.j2", content))
    return paths


def escape_markdown(text: str) -> str:
    """Text that Markdown and the HTML inside it show as it is, on one line, in table cells too."""
    one_line = " ".join(text.split())
    return _MARKDOWN_SPECIAL.sub(lambda match: "\\" + match.group(), html.escape(one_line, quote=False))


def _markdown_table(table: Table) -> str:
    rule = ["---", *["---:" if table.numeric else "---"] * (len(table.columns) - 1)]
    rows = [[escape_markdown(cell) for cell in row] for row in (table.columns, *table.rows)]
    # The paper's rows in italics: Markdown knows no shades.
    rows[1 : 1 + table.theirs] = [[f"*{cell}*" if cell else "" for cell in row] for row in rows[1 : 1 + table.theirs]]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (rows[0], rule, *rows[1:]))


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
    environment.filters.update(md=escape_markdown, markdown_table=_markdown_table, data_uri=_data_uri)
    environment.globals["gaps"] = GAPS
    return environment.get_template(template).render(report=content).encode("utf-8")
