"""From manifests and evaluation results to one table (CSV and JSON) and one HTML page.

Everything here is a function from rows to text: nothing is measured again, and the same
inputs give the same bytes. Sizes are in bytes, times in seconds, shares in parts of one.
"""

from eora.report.comparing import build
from eora.report.page import write

__all__ = ["build", "write"]
