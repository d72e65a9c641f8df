"""Forward solvers, one family a file."""
