"""Benchmarks: one file a question, each a plain function that returns a table."""
