"""Finished runs in, one Markdown and one self-contained HTML page out; reads no settings, runs no model."""

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
