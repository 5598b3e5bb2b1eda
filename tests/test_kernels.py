"""The Triton kernel against the eager reference, on the interpreter (TRITON_INTERPRET=1) or on a GPU."""

import os

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1 to run the kernel on the CPU", allow_module_level=True)

from diffcache.kernels.extrapolate import BLOCK, MAX_HISTORY, extrapolate  # noqa: E402 (only where the kernel can run)
from diffcache.ops import difference_form, extrapolate_reference  # noqa: E402

DEVICE = "cpu" if INTERPRETED else "cuda"
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is full of NaN, so that an element the kernel did not write is seen."""
    plain = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: plain(*args, **kwargs).fill_(float("nan")))


def compare(anchor: torch.Tensor | None, history: list[torch.Tensor]) -> None:
    rule = [2.0, -1.5, 0.75, -0.25, 0.125, -0.125][: len(history)]
    form = torch.tensor(difference_form(rule), device=DEVICE)
    result = extrapolate(anchor, history, form)
    expected = extrapolate_reference(anchor, history, form)
    tolerance = TOLERANCE[expected.dtype]
    assert result.dtype == expected.dtype
    assert result.stride() == torch.zeros_like(history[0]).stride()
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("count", range(1, MAX_HISTORY + 1))
@pytest.mark.parametrize("anchored", [False, True])
def test_every_history_length(count: int, anchored: bool, dtype: torch.dtype) -> None:
    anchor, *history = (torch.randn(3, 7, 61, device=DEVICE).to(dtype) for _ in range(count + 1))
    compare(anchor if anchored else None, history)


@pytest.mark.parametrize("size", [0, 1, 63, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 500])
def test_odd_sizes(size: int) -> None:
    compare(torch.randn(size, device=DEVICE), [torch.randn(size, device=DEVICE) for _ in range(3)])


@pytest.mark.parametrize("kind", ["transposed", "mixed", "strided", "expanded"])
def test_layouts(kind: str) -> None:
    a, b, c = (torch.randn(33, 70, device=DEVICE) for _ in range(3))
    histories = {
        "transposed": [a.t(), b.t()],
        "mixed": [a, b.t().contiguous().t()],
        "strided": [a[::2, 1:], b[::2, 1:]],
        "expanded": [a[:1].expand(33, 70), b],
    }
    history = histories[kind]
    compare(c.t().contiguous()[: history[0].shape[0], : history[0].shape[1]] if kind == "transposed" else None, history)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_still_history_is_reproduced_bitwise(dtype: torch.dtype) -> None:
    value = (torch.randn(777, device=DEVICE) * 50).to(dtype)
    form = torch.tensor(difference_form([3.1, -2.9, 0.8]), device=DEVICE)
    assert torch.equal(extrapolate(None, [value, value.clone(), value.clone()], form), value)
