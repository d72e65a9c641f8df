"""Roots, fixed points and least squares against closed forms, forward and backward, on lanes and nested."""

import torch

import implicitlayers as il

F64 = torch.float64
ADJOINT = il.Implicit(il.Dense(), on_failure="raise")
