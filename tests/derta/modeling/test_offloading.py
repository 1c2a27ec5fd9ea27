"""Offloading: late copies are waited for and change no result."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from derta.modeling.offloading import Lane, Offloading, offloading, ran_out_of_memory
from streams import LateStream

CPU = torch.device("cpu")


class Layers(nn.Module):
    """Six checkpointed layers that keep only their inputs.

    Attributes:
        inside: function called while each layer is computed.
    """

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(6))
        self.inside: Any = lambda: None

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(self._layer, layer, x, use_reentrant=False)
        return x

    def _layer(self, layer: nn.Module, x: Tensor) -> Tensor:
        self.inside()
        return torch.tanh(layer(x))


@pytest.fixture
def lane() -> Lane:
    computing = LateStream()
    return Lane(CPU, LateStream(), lambda: computing)


def gradients(model: nn.Module, x: Tensor, context: Any = None) -> list[Tensor]:
    model.zero_grad()
    with context or offloading(model, CPU):
        loss = model(x).square().sum()
    loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_late_copies_change_no_bit(lane: Lane) -> None:
    model, x = Layers(), torch.randn(5, 8)
    plain = gradients(model, x)
    for _ in range(2):
        late = gradients(model, x, Offloading(model, lane, least_bytes=1))
        assert all(map(torch.equal, late, plain))
        assert lane.under_way is None
    # Each copy waits for the computation before it: 7 to the host, all but the last of them back.
    assert lane.stream.waits == [lane.computing()] * 2 * (7 + 6)


def test_one_copy_is_in_flight_while_a_layer_is_computed(lane: Lane) -> None:
    """Forward, it is the layer's own input; backward, the input that the next layer will need."""
    model, x = Layers(), torch.randn(5, 8)
    kept, computed = [], []

    class Watched(Lane):
        def send(self, *args: Any) -> Any:
            kept.append(super().send(*args))
            return kept[-1]

    model.inside = lambda: computed.append(
        [place for place, one in enumerate(kept) if one.device is not None]
    )
    watched = Watched(CPU, lane.stream, lane.computing)
    gradients(model, x, Offloading(model, watched, least_bytes=1))
    assert computed[:6] == [[i] for i in range(6)]
    assert computed[6:] == [[4], [3], [2], [1], [0], []]


def test_a_failed_pass_does_not_affect_the_next_one(lane: Lane) -> None:
    model, x = Layers(), torch.randn(5, 8)
    plain = gradients(model, x)

    def fail() -> None:
        raise RuntimeError("in the third layer")

    with pytest.raises(RuntimeError, match="in the third layer"):
        with Offloading(model, lane, least_bytes=1):
            loss = model(x).sum()
        model.layers[2].register_forward_pre_hook(lambda *_: fail())
        loss.backward()
    assert lane.under_way is not None
    del loss
    gc.collect()
    model.layers[2]._forward_pre_hooks.clear()
    late = gradients(model, x, Offloading(model, lane, least_bytes=1))
    assert all(map(torch.equal, late, plain))


def test_a_graph_may_be_run_twice(lane: Lane) -> None:
    model, x = Layers(), torch.randn(5, 8)
    plain = gradients(model, x)
    model.zero_grad()
    with Offloading(model, lane, least_bytes=1):
        loss = model(x).square().sum()
    loss.backward(retain_graph=True)
    model.zero_grad()
    loss.backward()
    assert all(map(torch.equal, [p.grad for p in model.parameters()], plain))  # type: ignore[arg-type]


def test_parameters_and_small_tensors_stay_on_the_device(lane: Lane) -> None:
    model = nn.Linear(8, 8, bias=False)
    small, large = (torch.randn(rows, 8, requires_grad=True) for rows in (7, 8))
    with Offloading(model, lane, least_bytes=large.nbytes):
        outs = model(small), model(large)
    for out, x in zip(outs, (small, large), strict=True):
        assert (
            out.grad_fn._saved_self.data_ptr() == x.data_ptr()
        )  # the last tensor never left the device
        assert out.grad_fn._saved_mat2.data_ptr() == model.weight.data_ptr()
    assert len(lane.stream.waits) == 1


@pytest.mark.parametrize(
    ("said", "so"),
    [
        ("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes", True),
        ("CUDA error: out of memory\nCUDA kernel errors might be reported elsewhere", True),
        ("CUDA error: an illegal memory access was encountered", False),
    ],
)
def test_a_host_without_memory_to_pin_is_out_of_memory(said: str, so: bool) -> None:
    assert ran_out_of_memory(RuntimeError(said)) == so
    assert ran_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))


def test_a_cpu_offloads_nothing() -> None:
    model, x = nn.Linear(8, 8), torch.randn(2**16, 8)
    with offloading(model, CPU):
        out = model(x)
    assert out.grad_fn._saved_mat1.data_ptr() == x.data_ptr()


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="nothing is copied where PyTorch sees no CUDA device"
)
def test_offloading_on_a_gpu_lowers_the_peak_and_changes_no_bit() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    model, x = Layers(1024).to(device), torch.randn(8192, 1024, device=device)
    found, peaks = [], []
    for offload in (False, True, True):
        context = offloading(model, device) if offload else offloading(model, CPU)
        torch.cuda.reset_peak_memory_stats(device)
        found.append(gradients(model, x, context))
        peaks.append(torch.cuda.max_memory_allocated(device))
    for late in found[1:]:
        assert all(map(torch.equal, late, found[0]))
    assert max(peaks[1:]) <= peaks[0] - 3 * x.nbytes
