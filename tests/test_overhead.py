"""What a cached step runs: nothing but its head and the forecast, however deep the transformer is."""

import pytest

pytest.importorskip("diffusers")

from benchmarks.overhead import operations


@pytest.mark.parametrize("gate", [False, True])
def test_a_cached_step_is_its_head_and_a_forecast(gate: bool) -> None:
    shallow, deep = operations(gate, "cpu", (2, 3)), operations(gate, "cpu", (4, 6))
    assert deep[0] > 1.5 * shallow[0]  # operations of a full step
    for full, cached, head in (shallow, deep):
        assert cached - head <= 10
        assert cached < full / 5
    assert deep[1:] == shallow[1:]
