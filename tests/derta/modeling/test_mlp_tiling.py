"""Memory settings change only memory: gradients are equal with and without them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from derta import apply_derta
from derta.modeling.mlp_tiling import tile_mlp
from derta.modeling.offloading import Lane, Offloading
from derta.modeling.patch import checkpoint_layers
from streams import LateStream
from tiny import tiny_model


def pack(tokens: int) -> dict[str, Any]:
    """Return one example of that many tokens with a branch of five at its end."""
    cut = tokens // 2
    until = torch.full((1, tokens), tokens, dtype=torch.int32)
    until[0, cut : tokens - 5] = tokens - 5
    positions = torch.cat((torch.arange(tokens - 5), torch.arange(cut, cut + 5)))[None]
    ids = torch.arange(tokens)[None] % 397
    return dict(
        input_ids=ids,
        position_ids=positions,
        visible_until=until,
        shift_labels=ids.roll(-1),
        rto_mask=ids % 3 == 0,
    )


def gradients(family: str, tokens: int, *, saving: bool) -> dict[str, torch.Tensor]:
    model = tiny_model(family)
    if saving:
        tile_mlp(model, 16)
        checkpoint_layers(model)
    apply_derta(model, 1, offload=saving).train()
    model(**pack(tokens)).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "gpt_neox"])
def test_saving_memory_does_not_change_gradients(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles do not divide the pack, layer inputs are offloaded, and layers are recomputed."""
    computing, copies = LateStream(), LateStream()
    lane = Lane(torch.device("cpu"), copies, lambda: computing)
    late = lambda model, device: Offloading(model, lane, least_bytes=1)  # noqa: E731
    monkeypatch.setattr("derta.modeling.patch.offloading", late)
    plain, saving = (gradients(family, 77, saving=saving) for saving in (False, True))
    assert len(copies.waits) > 2 * 2  # both layers' inputs, there and back
    assert plain.keys() == saving.keys()
    for name, gradient in plain.items():
        assert (saving[name] - gradient).norm() <= 1e-6 * gradient.norm(), name


def test_an_mlp_sees_one_tile_at_a_time() -> None:
    model = tiny_model("llama")
    tile_mlp(tile_mlp(model, 5), 16)
    seen: list[int] = []
    for layer in model.model.layers:
        layer.mlp.gate_proj.register_forward_hook(lambda _, args, out: seen.append(out.shape[1]))
    model(input_ids=torch.arange(40)[None])
    assert seen == [16, 16, 8] * 2
    seen.clear()
    model(input_ids=torch.arange(16)[None])
    assert seen == [16] * 2


def test_an_mlp_stays_tiled_when_its_forward_is_replaced() -> None:
    """Liger replaces it when the training begins."""
    model = tile_mlp(tiny_model("llama"), 16)
    seen: list[int] = []

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        seen.append(hidden.shape[1])
        return hidden

    for layer in model.model.layers:
        layer.mlp.forward = forward
    model(input_ids=torch.arange(40)[None])
    assert seen == [16, 16, 8] * 2


@pytest.mark.parametrize(
    ("family", "tokens", "message"),
    [
        ("mixtral", 4, "MixtralDecoderLayer has a mixture of experts, MixtralSparseMoeBlock"),
        ("llama", 0, "an MLP's tile must be at least 1 token, got 0"),
    ],
)
def test_layers_that_cannot_be_tiled_are_refused(family: str, tokens: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tile_mlp(tiny_model(family), tokens)
