"""Report of finished runs, as a Markdown page and a self-contained HTML page; it reads no settings and runs no model."""

from meteor.report.data import SelectionPanel, StudyTable, SubImageScores, VariantResult
from meteor.report.page import ReportPaths, write_report
from meteor.report.predictions import PredictionRow, choose_predictions

__all__ = [
    "PredictionRow",
    "ReportPaths",
    "SelectionPanel",
    "StudyTable",
    "SubImageScores",
    "VariantResult",
    "choose_predictions",
    "write_report",
]
