"""Every kernel becomes machine code for GPUs that are not here, without spills and with the widest loads there are."""

import os

import pytest

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

from benchmarks.ahead_of_time import TARGETS, Case, cases, compile_case

CASES = [(case, target) for case in cases() for target in case.targets]


@pytest.mark.parametrize(("case", "target"), CASES, ids=lambda x: x if isinstance(x, str) else x.name)
def test_machine_code(case: Case, target: str) -> None:
    done = compile_case(case, target)
    assert len(done.code) > 1000
    assert done.spills == 0
    assert 0 < done.registers <= 128  # so that a compute unit holds at least four programs of 128 threads
    if "ratio" not in case.name:
        assert done.load_bits == 128
    if "extrapolate" in case.name:
        assert done.store_bits == 128


def test_all_kernels_and_targets_are_there() -> None:
    assert set(TARGETS) >= {"sm_80", "sm_90", "sm_100", "gfx942"}
    assert {case.kernel.__name__ for case in cases()} == {
        "dense_kernel", "extrapolate_kernel", "quantize_kernel", "partial_kernel", "ratio_kernel",
    }  # fmt: skip
