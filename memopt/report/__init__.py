"""What ``explain`` returns: as text, as data (`report`), as a page and as a picture (`page`)."""

from memopt.report.report import Report

__all__ = ["Report"]
