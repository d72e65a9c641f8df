"""Linear solvers and the operators they work on."""
