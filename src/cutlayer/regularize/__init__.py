"""What keeps the server half from learning stored activations by heart: a method a file, all chosen in `Regularize`.

All of it is done by the server, on decoded activations, in A, B and C epochs alike, and none of it in evaluation.
"""

from cutlayer.regularize.base import Regularize
from cutlayer.regularize.dropout import dropped
from cutlayer.regularize.mixing import Mixture, mixed
from cutlayer.regularize.smoothing import smoothed

__all__ = ["Mixture", "Regularize", "dropped", "mixed", "smoothed"]
