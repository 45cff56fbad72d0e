"""What ``explain`` returns: data (`report`), `text`, a `page`, and a picture of that."""

from memopt.report.report import Report

__all__ = ["Report"]
