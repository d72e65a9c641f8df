"""What is added to an objective: penalties and constraints with learnable strengths, anchors, radii and bounds.

A regularizer is given in the user's terms, trees and numbers, and becomes terms of the optimality condition or a
proximal map.
"""

from implicitlayers.regularizers.base import Pieces, Regularizer, Sum
from implicitlayers.regularizers.constraints import Box, L1Ball, L2Ball, NonNegative, Simplex
from implicitlayers.regularizers.custom import Penalty, Prox
from implicitlayers.regularizers.quadratic import Proximal, QuadraticTerm, Ridge
from implicitlayers.regularizers.sparse import ElasticNet, GroupLasso, Lasso

__all__ = [
    "Box", "ElasticNet", "GroupLasso", "L1Ball", "L2Ball", "Lasso", "NonNegative", "Penalty", "Pieces", "Prox",
    "Proximal", "QuadraticTerm", "Regularizer", "Ridge", "Simplex", "Sum",
]  # fmt: skip
