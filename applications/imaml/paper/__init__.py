"""The tables and figures of Rajeswaran et al., "Meta-Learning with Implicit Gradients" (2019), made on the spot.

Every number comes from a run that the command itself makes, and is written beside what it depends on.
"""
