"""Report of finished runs, as a Markdown page and a self-contained HTML page; it reads no settings and runs no model."""

from meteor.report.data import RunResult, SelectionPanel, StudyTable, SubImageScores
from meteor.report.page import ReportPaths, write_report
from meteor.report.predictions import PredictionRow, choose_predictions

__all__ = [
    "PredictionRow",
    "ReportPaths",
    "RunResult",
    "SelectionPanel",
    "StudyTable",
    "SubImageScores",
    "choose_predictions",
    "write_report",
]
