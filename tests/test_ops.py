"""The extrapolate operation: published arithmetic, exactness on still histories, gradients, refusals, opcheck."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.backends.common import aot_autograd

from diffcache import ops
from diffcache.ops import difference_form, extrapolate
from diffcache.predictors import PREDICTORS, weights

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def layouts() -> dict[str, list[torch.Tensor]]:
    a, b, c = (torch.randn(6, 8) for _ in range(3))
    return {
        "contiguous": [a, b, c],
        "transposed": [a.t(), b.t(), c.t()],
        "mixed": [a, b.t().contiguous().t(), c],
        "strided": [torch.randn(12, 8)[::2] for _ in range(3)],
        "expanded": [torch.randn(8).expand(6, 8), b, c],
        "scalar": [a[0, 0], b[0, 0], c[0, 0]],
        "empty": [a[:0], b[:0], c[:0]],
    }


@pytest.mark.parametrize("layout", layouts())
@pytest.mark.parametrize("anchored", [False, True])
def test_opcheck(layout: str, anchored: bool) -> None:
    history = layouts()[layout]
    anchor = torch.randn(history[0].shape) if anchored else None
    torch.library.opcheck(extrapolate, (anchor, history, torch.tensor([1.0, -2.0, 0.5])))


def variants() -> dict[str, tuple]:
    """The other operations and options: (operation, arguments)."""
    anchor, a, b, gate = (torch.randn(3, 5, 8) for _ in range(4))
    form, row = torch.tensor([1.0, -0.5]), torch.randn(3, 1, 8)
    (small, scale), (older, older_scale) = ops.quantize(a, anchor, torch.int8), ops.quantize(b, anchor, torch.int8)
    return {
        "gate": (extrapolate, (anchor, [a, b], form, gate[:, :1])),
        "table": (extrapolate, (None, [a, b], torch.rand(2, 5, 1))),
        "small": (extrapolate, (anchor, [small, older, scale, older_scale], form, None, torch.float32)),
        "modulated": (ops.extrapolate_modulate, (anchor, [a, b], form, row, row, 1e-6)),
        "modulated only": (ops.extrapolate_modulate, (anchor, [a, b], form, row, row, 1e-6, None, None, False)),
        "quantize": (ops.quantize, (a, anchor, torch.int8)),
        "change": (ops.relative_change, (a, b)),
        "change, L2": (ops.relative_change, (a, b, 2)),
    }


@pytest.mark.parametrize("kind", variants())
def test_opcheck_of_all(kind: str) -> None:
    operation, arguments = variants()[kind]
    torch.library.opcheck(operation, arguments)


@pytest.mark.parametrize("kind", variants())
def test_torch_compile_sees_through(kind: str) -> None:
    operation, arguments = variants()[kind]
    seen: list[torch.fx.GraphModule] = []

    def look(module: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
        seen.append(module)
        return module

    backend = aot_autograd(fw_compiler=look)
    with torch.no_grad():
        result = torch.compile(lambda: operation(*arguments), fullgraph=True, backend=backend)()
    (module,) = seen
    assert not any("diffcache" in str(node.target) for node in module.graph.nodes)  # all decomposed
    torch.testing.assert_close(result, operation(*arguments))


def test_gate_and_modulation_equal_what_they_replace_bitwise() -> None:
    for dtype in DTYPES:
        anchor, a, b, gate = (torch.randn(3, 5, 8).to(dtype) for _ in range(4))
        factor, shift = (torch.randn(3, 1, 8).to(dtype) for _ in range(2))
        form = torch.tensor([1.0, -0.5])
        plain = anchor + gate * extrapolate(None, [a, b], form)
        value, modulated = ops.extrapolate_modulate(anchor, [a, b], form, factor, shift, 1e-6, gate)
        assert torch.equal(value, plain)
        assert torch.equal(modulated, torch.nn.functional.layer_norm(plain, (8,), eps=1e-6) * factor + shift)


def test_weights_by_table() -> None:
    a, b = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    table = torch.tensor([[1.0] * 6, [0.0, 0.0, 0.0, -1.0, -1.0, -1.0]], dtype=torch.float64)
    result = extrapolate(None, [a, b], table)
    assert torch.equal(result[:, :3], a[:, :3])  # the first channels are reused
    torch.testing.assert_close(result[:, 3:], (2 * a - b)[:, 3:])  # the last ones extrapolated


@pytest.mark.parametrize("small", ops.SMALL, ids=str)
def test_small_history_is_near(small: torch.dtype) -> None:
    value, anchor = torch.randn(7, 50) * 10, torch.randn(7, 50)
    kept, scale = ops.quantize(value, anchor, small)
    assert (kept.dtype, scale.shape) == (small, (7, 1))
    restored = extrapolate(anchor, [kept, scale], torch.tensor([1.0]), None, torch.float32)
    relative = ((restored - value).norm() / value.norm()).item()
    assert relative < {torch.int8: 0.01, torch.float8_e4m3fn: 0.03}[small]


def test_relative_change_is_per_sample() -> None:
    old = torch.tensor([[1.0, 1.0], [2.0, -2.0]])
    new = torch.tensor([[1.5, 1.5], [2.0, -2.0]])
    assert torch.equal(ops.relative_change(new, old), torch.tensor([0.5, 0.0]))
    assert torch.equal(ops.relative_change(new, old, 2), torch.tensor([0.5, 0.0]))
    with pytest.raises(ValueError, match="norm must be 1 or 2, got 3"):
        ops.relative_change(new, old, 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", sorted(PREDICTORS))
def test_still_history_is_reproduced_bitwise(name: str, dtype: torch.dtype) -> None:
    value = (torch.randn(1000) * 100).to(dtype)
    rule = weights(name, [7.0, 4.0, 0.0], 9.0)
    result = extrapolate(None, [value.clone() for _ in rule], torch.tensor(difference_form(rule)))
    assert result.dtype == dtype
    assert torch.equal(result, value)


@settings(max_examples=30, deadline=None)
@given(rule=st.lists(st.floats(-3, 3), min_size=1, max_size=6), anchored=st.booleans(), seed=st.integers(0, 99))
def test_is_the_weighted_sum(rule: list[float], anchored: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    history = [torch.randn(17, generator=generator, dtype=torch.float64) for _ in rule]
    anchor = torch.randn(17, generator=generator, dtype=torch.float64) if anchored else None
    expected = sum(w * h for w, h in zip(rule, history, strict=True)) + (0 if anchor is None else anchor)
    result = extrapolate(anchor, history, torch.tensor(difference_form(rule), dtype=torch.float64))
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)


def test_low_precision_is_rounded_once() -> None:
    anchor, *history = (torch.randn(4096).to(torch.bfloat16) for _ in range(4))
    form = torch.tensor(difference_form([2.5, -2.0, 0.5]))
    exact = extrapolate(anchor.double(), [h.double() for h in history], form)
    torch.testing.assert_close(extrapolate(anchor, history, form), exact.to(torch.bfloat16), rtol=2**-8, atol=1e-6)


def test_difference_form() -> None:
    assert difference_form([2.5, -2.0, 0.5]) == [1.0, -2.0, 0.5]
    assert difference_form([0.1, 0.2, 0.7])[0] == 1.0
    assert difference_form([0.5, 0.4]) == [pytest.approx(0.9), 0.4]
    with pytest.raises(ValueError, match="at least one weight"):
        difference_form([])


def test_gradients() -> None:
    anchor, *history = (torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(3))
    form = torch.tensor([1.0, -0.75], dtype=torch.float64, requires_grad=True)
    gate = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, h, g, w: extrapolate(a, [h, g], w), (anchor, *history, form))
    assert torch.autograd.gradcheck(lambda a, h, w, g: extrapolate(a, [h, h], w, g), (anchor, history[0], form, gate))
    modulated = lambda a, h, w, g: ops.extrapolate_modulate(a, [h, h], w, g, g, 1e-3, g)  # noqa: E731
    assert torch.autograd.gradcheck(modulated, (anchor, history[0], form, gate))


def test_compiles_into_one_graph() -> None:
    a, b = torch.randn(4), torch.randn(4)
    form = torch.tensor([1.0, -0.5])
    compiled = torch.compile(lambda x, y, w: extrapolate(None, [x, y], w) * 2, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(a, b, form), 2 * extrapolate(None, [a, b], form))


@pytest.mark.parametrize(
    ("anchor", "history", "form", "error", "message"),
    [
        (None, [], [], ValueError, "at least one history tensor"),
        (None, [torch.zeros(2, dtype=torch.complex64)], [1.0], TypeError, "got torch.complex64"),
        (None, [torch.zeros(2, dtype=torch.int64)], [1.0], TypeError, "got torch.int64"),
        (None, [torch.zeros(2), torch.zeros(3)], [1.0, 0.0], ValueError, "must agree in shape"),
        (None, [torch.zeros(2), torch.zeros(2).half()], [1.0, 0.0], ValueError, "must agree in shape and dtype"),
        (torch.zeros(1), [torch.zeros(2)], [1.0], ValueError, r"anchor has shape \[1\]"),
        (None, [torch.zeros(2)], [1.0, 2.0], ValueError, r"weights have shape \[2\], expected \[1\]"),
        (None, [torch.zeros(2)], [[1.0, 2.0, 3.0]], ValueError, r"table of weights of shape \[3\] does not broadcast"),
        (None, [torch.zeros(2, dtype=torch.int8)], [1.0], ValueError, "one scale for each tensor"),
    ],
)
def test_refusals(anchor: object, history: list, form: list, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        extrapolate(anchor, history, torch.tensor(form))
