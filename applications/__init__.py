"""Worked applications of the library's argmin layers."""
