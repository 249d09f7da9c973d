"""Many runs, and what came of them."""

from cutlayer.studies.study import Outcome, Study

__all__ = ["Outcome", "Study"]
