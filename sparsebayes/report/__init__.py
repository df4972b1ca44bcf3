"""What a run tells: its report (HTML and Markdown), its summary for a terminal, and benchmark tables."""

from __future__ import annotations

from sparsebayes.report.comparison import write_comparison
from sparsebayes.report.records import Report, Run, read_report, read_run
from sparsebayes.report.summary import summary_line, summary_table
from sparsebayes.report.writing import write_report

__all__ = [
    "Report",
    "Run",
    "read_report",
    "read_run",
    "summary_line",
    "summary_table",
    "write_comparison",
    "write_report",
]
