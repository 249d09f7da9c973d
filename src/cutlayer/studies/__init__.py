"""Many runs, and what came of them."""

from cutlayer.studies.command import add_options, carry_out
from cutlayer.studies.study import Outcome, Study, usual_figures

__all__ = ["Outcome", "Study", "add_options", "carry_out", "usual_figures"]
