"""One self-contained page that shows what a run measured, and how its searches went."""

from jaxprm.report.build import build_report

__all__ = ["build_report"]
