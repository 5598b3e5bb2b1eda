"""Numbers read from a device: the right ones, whatever is written later, and without a blocking synchronisation."""

import pytest
import torch

from diffcache.host_reads import HostRead


@pytest.mark.parametrize("shape", [(), (3,), (0,), (2, 5)], ids=str)
def test_reads_what_the_tensor_held_when_it_began(shape: tuple[int, ...]) -> None:
    value = torch.randn(shape)
    expected = value.clone()
    read = HostRead(value)
    value.fill_(7.0)
    assert read.ready()
    assert torch.equal(read.get(), expected)
    assert torch.equal(read.get(), expected)


def test_carries_no_gradient() -> None:
    assert not HostRead(torch.ones(2, requires_grad=True) * 3).get().requires_grad


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_waits_for_its_own_copy_only() -> None:
    value, work = torch.randn(5, device="cuda"), torch.randn(4096, 4096, device="cuda")
    expected = value.cpu()
    for _ in range(3):  # the libraries are loaded, pinned memory is at hand
        HostRead(value).get()
        work @ work
    torch.cuda.synchronize()
    with torch.no_grad():
        torch.cuda.set_sync_debug_mode("error")
        try:
            read = HostRead(value)
            value.fill_(7.0)
            for _ in range(200):
                work = (work @ work) / 64
            behind = torch.cuda.Event()
            behind.record()
            got = read.get()
            finished = behind.query()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(got, expected)
    assert not finished  # the work queued after the read was still running
