"""What a person sees: progress while a run goes on, and tables and figures at the end."""

from cutlayer.report.progress import ProgressView, shown
from cutlayer.report.table import comparison, comparisons, figures, lengths, write_figures

__all__ = ["ProgressView", "comparison", "comparisons", "figures", "lengths", "shown", "write_figures"]
