"""Both shapes of an operation: the operator that graphs hold, and what eager calls take in its place."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from medgraft.kernels.lora_linear import lora_backward, lora_forward

OPERATOR = torch.ops.medgraft.lora_linear.default


def drawn() -> tuple[Any, ...]:
    x, weight, bias, a, b = (torch.randn(s, dtype=torch.float64) for s in ((5, 7), (6, 7), (6,), (2, 7), (6, 2)))
    return x.requires_grad_(), weight, bias, a.requires_grad_(), b.requires_grad_(), 2.0


def leaves(inputs: tuple[Any, ...]) -> list[Tensor]:
    return [t for t in inputs if isinstance(t, Tensor) and t.requires_grad]


def test_both_shapes_give_the_same_bits() -> None:
    inputs = drawn()
    got, want = lora_forward(*inputs), OPERATOR(*inputs)
    assert torch.equal(got, want)
    dy = torch.randn_like(got)
    pairs = zip(*(torch.autograd.grad(y, leaves(inputs), dy) for y in (got, want)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_eager_calls_do_without_the_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*inputs: Any) -> None:
        raise AssertionError("the operator was asked")

    for operation in (lora_forward, lora_backward):
        monkeypatch.setattr(operation, "_packet", refuse)
    inputs = drawn()
    torch.autograd.grad(lora_forward(*inputs).sum(), leaves(inputs))
    with torch.no_grad():
        assert not lora_forward(*inputs).requires_grad


def test_what_stands_for_a_tensor_goes_through_the_operator() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x, *others = (mode.from_tensor(t) if isinstance(t, Tensor) else t for t in drawn())
        assert lora_forward(x, *others).shape == (5, 6)


def test_a_graph_holds_it_as_one_node() -> None:
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, example: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    torch._dynamo.reset()
    inputs = drawn()
    compiled = torch.compile(lambda *t: lora_forward(*t), fullgraph=True, backend=backend)
    assert torch.equal(compiled(*inputs), lora_forward(*inputs))
    assert seen == ["medgraft.lora_linear.default"]


@pytest.mark.parametrize("shape", [lora_forward, OPERATOR], ids=["eager", "operator"])
def test_gradients_of_gradients_are_refused(shape: Any) -> None:
    inputs = drawn()
    (dx, *_) = torch.autograd.grad(shape(*inputs).square().sum(), leaves(inputs), create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(dx.square().sum(), leaves(inputs))
