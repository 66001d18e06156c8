"""A frozen convolution's own function with other tensors: stride, padding and its mode, dilation, groups as they are.

Nothing is swapped in the frozen module, so calls in other threads never see it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

TRANSPOSED = {1: functional.conv_transpose1d, 2: functional.conv_transpose2d, 3: functional.conv_transpose3d}


def convolve(layer: _ConvNd, weight: Tensor, bias: Tensor | None, x: Tensor, output_size: Any = None) -> Tensor:
    """x (B, in, *space) -> (B, out, *space'), as `layer` does it, with `weight` and `bias` in the place of its own.

    `output_size` as in the forward of torch's transposed convolutions.
    """
    if not isinstance(layer, _ConvTransposeNd):
        return layer._conv_forward(x, weight, bias)  # type: ignore[operator]
    axes, pads = len(layer.kernel_size), layer.padding
    assert not isinstance(pads, str)  # torch refuses "same" in a transposed convolution
    more = layer._output_padding(x, output_size, layer.stride, pads, layer.kernel_size, axes, layer.dilation)  # type: ignore[arg-type]
    return TRANSPOSED[axes](x, weight, bias, layer.stride, pads, more, layer.groups, layer.dilation)
