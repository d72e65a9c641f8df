"""Few-shot learning by implicit MAML, and its first-order form, on top of ``implicitlayers.argmin``."""
