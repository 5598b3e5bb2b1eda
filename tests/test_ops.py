"""The extrapolate operation: published arithmetic, exactness on still histories, gradients, refusals, opcheck."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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
    assert torch.autograd.gradcheck(lambda a, h, g, w: extrapolate(a, [h, g], w), (anchor, *history, form))


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
    ],
)
def test_refusals(anchor: object, history: list, form: list, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        extrapolate(anchor, history, torch.tensor(form))
