"""How the products in a network, of its convolutions and its last layer, are computed: as what, and in which precision.

They are nearly all of the arithmetic and all that an accelerator has special units for. Parameters, normalisation,
losses, the inner solver's steps and the vectors of the linear system are float32 whatever is chosen here: a step or a
conjugate direction that is rounded to eight bits stalls where the problem isn't solved yet.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from applications.imaml.config import Config, ConvolutionName


@dataclass(frozen=True)
class Products:
    """How products are computed; the same mathematics, other rounding and speed.

    Args:
        convolution: "windows" gathers the windows and multiplies matrices, "grouped" is PyTorch's own convolution,
            which mapped over tasks is a grouped one; "auto" is what the network was found fastest with on a CPU.
        half: round the operands to bfloat16, whose products are summed in float32 and rounded once, in both directions
            of differentiation and at every order: the casts are part of the function.
    """

    convolution: ConvolutionName = "auto"
    half: bool = False

    @classmethod
    def of(cls, config: Config) -> Products:
        """What a configuration asks for.

        Args:
            config: of the run.

        Returns:
            Its products.
        """
        return cls(config.convolution, config.precision == "bf16")

    def operands(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Round what is to be multiplied; the product is brought back to the dtype that it had.

        Args:
            *tensors: the operands.

        Returns:
            The operands in the precision of the product.
        """
        return tuple(t.to(torch.bfloat16) for t in tensors) if self.half else tensors

    def first(self) -> Products:
        """How the first layer's products are computed: unrounded.

        They are few, and paper is white: what its windows add up to is far larger than what tells them apart, which
        rounding would leave little of before the mean is taken off.

        Returns:
            The same without rounding.
        """
        return replace(self, half=False)


USUAL = Products()
