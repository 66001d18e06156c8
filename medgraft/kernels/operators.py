"""An operation in two shapes: a torch.library operator, which compiled graphs hold as one node, and a plain function with its gradient, which
eager calls take, for it costs half of the operator's dispatch: of small layers that is much.

    @operator("name")
    def _forward(...): ...              what runs, without autograd

    _forward.register_fake(...)         shapes
    _forward.register_autograd(...)     gradients, which call other operators by their Python names
    _forward(...)                       one or the other, by who is asking
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Operator:
    """See the top of the file. `plain` is the function; the operator is `torch.ops.medgraft.<name>`.

    The first argument is a tensor. The function runs in the dtypes that it is given: autocast, where it is on, is left out.
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        def plain(first: Tensor, *others: Any) -> Any:
            device = first.device.type
            if not torch.is_autocast_enabled(device):  # leaving it out costs more than a small layer
                return function(first, *others)
            with torch.autocast(device, enabled=False):
                return function(first, *others)

        self.plain = plain
        schema = torch.library.infer_schema(function, mutates_args=())
        self._defined = torch.library.custom_op(f"medgraft::{name}", plain, mutates_args=(), schema=schema)
        self._packet = getattr(torch.ops.medgraft, name).default
        self._eager: type[torch.autograd.Function] | None = None

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """What `torch.library.register_fake` does."""
        return self._defined.register_fake(fake)

    def register_autograd(
        self, gradients: Callable[..., Any], *, setup_context: Callable[[Any, tuple[Any, ...], Any], None]
    ) -> None:
        """What `torch.library.register_autograd` does, for both shapes. Gradients of gradients are refused."""
        self._defined.register_autograd(gradients, setup_context=setup_context)
        plain = self.plain

        class Eager(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *inputs: Any) -> Any:
                output = plain(*inputs)
                setup_context(ctx, inputs, output)
                return output

            @staticmethod
            @torch.autograd.function.once_differentiable
            def backward(ctx: Any, *grads: Any) -> Any:
                return gradients(ctx, *grads)

        self._eager = Eager

    def __call__(self, *inputs: Any) -> Any:
        """The function on plain tensors; the operator under a compiler and for tensors that stand for others (fake, functional)."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(inputs[0]) not in (Tensor, nn.Parameter):
            return self._packet(*inputs)
        if not torch.is_grad_enabled():
            return self.plain(*inputs)
        if self._eager is None:  # a gradient that is to be differentiated again: the operator says that it cannot
            return self._packet(*inputs)
        return self._eager.apply(*inputs)


def operator(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """Decorate what `torch.ops.medgraft.<name>` does."""
    return lambda plain: Operator(name, plain)
