"""The report: one HTML file that shows what moec did to a graph or a model, without a server."""

from moec.report.page import report_of_graphs, report_of_model

__all__ = ["report_of_graphs", "report_of_model"]
