"""Linear layers in 4 bits, of bitsandbytes: which ones may be, and how they keep their gradients.

Two things go wrong on a CPU, both in silence. Where it has AVX-512, a row that is not whole
quantization blocks is read with the scales of other rows. Where it multiplies bfloat16, a layer
packs its weight when it first evaluates, for a product that has no backward pass and that training
then goes on to use.
"""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

BLOCK = 64  # neighbouring weights that share a scale
PACKS = "support_avx512bf16_for_cpu"  # of a layer: whether it packs its weight to evaluate


def layers_for_4_bits(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Return the layers, by name, that `method: qlora` holds in 4 bits.

    On every device the same: all linear ones but the head, if their rows are whole blocks.

    Args:
        model: before it is quantized.
    """
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and module is not head and module.in_features % BLOCK == 0
    }


def check_4_bits(model: nn.Module) -> None:
    """Refuse layers that a CPU may read wrongly.

    Raises:
        ValueError: names the weight.
    """
    for name, weight in model.named_parameters():
        state = getattr(weight, "quant_state", None)
        if state is None or weight.device.type != "cpu":
            continue
        if state.shape[-1] % state.blocksize:
            raise ValueError(
                f"{name} of shape {tuple(state.shape)} cannot be used in 4 bits on a CPU, where "
                f"its rows must be a multiple of {state.blocksize} long: leave its layer out of "
                "the quantization (llm_int8_skip_modules)"
            )


def forbid_packing(model: nn.Module) -> list[nn.Module]:
    """Make every layer compute what has a backward pass, in evaluation too.

    Returns:
        The layers that would have packed their weights, for `allow_packing`.
    """
    layers = [module for module in model.modules() if getattr(module, PACKS, False)]
    for layer in layers:
        layer.state_dict()  # unpacks the weight of one that has evaluated already
        setattr(layer, PACKS, False)
    return layers


def allow_packing(layers: list[nn.Module]) -> None:
    """Undo `forbid_packing`."""
    for layer in layers:
        setattr(layer, PACKS, True)
