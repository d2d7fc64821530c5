"""Finished runs in, one Markdown and one self-contained HTML page out; reads no settings, runs no model."""

from meteor.report.data import (
    ImportancePanel,
    SelectionPanel,
    StageRun,
    StudyTable,
    SubImageScores,
    VariantResult,
    read_stage_run,
)
from meteor.report.page import ReportPaths, write_report
from meteor.report.predictions import PredictionRow, choose_predictions

__all__ = [
    "ImportancePanel",
    "PredictionRow",
    "ReportPaths",
    "SelectionPanel",
    "StageRun",
    "StudyTable",
    "SubImageScores",
    "VariantResult",
    "choose_predictions",
    "read_stage_run",
    "write_report",
]
