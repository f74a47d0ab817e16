"""The page that shows a run, from its files alone."""

from jaxprm.report.build import build_report

__all__ = ["build_report"]
