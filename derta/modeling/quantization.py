"""Linear layers in 4 bits, by bitsandbytes: which layers, and how their gradients stay correct.

Two faults occur silently on a CPU. With AVX-512, a row that is not a whole number of quantization
blocks is read with the scales of other rows. With bfloat16 products, a layer packs its weight at
its first evaluation for a product without a backward pass, which training would then use.
"""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

BLOCK = 64  # number of neighbouring weights that share a scale
PACKS = "support_avx512bf16_for_cpu"  # attribute of layers that pack their weights in evaluation


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Linear | Conv1D]:
    """Return the linear layers except the head, by name; GPT-2's are `Conv1D`.

    Args:
        model: an unquantized model.
    """
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if (type(module) is nn.Linear or isinstance(module, Conv1D)) and module is not head
    }


def layers_for_4_bits(model: PreTrainedModel) -> dict[str, nn.Linear | Conv1D]:
    """Return the layers, by name, that `method: qlora` holds in 4 bits.

    These are the linear layers, on every device, whose rows are a whole number of blocks.

    Args:
        model: an unquantized model.
    """
    layers = linear_layers(model).items()
    return {name: layer for name, layer in layers if widths(layer)[0] % BLOCK == 0}


def widths(layer: nn.Linear | Conv1D) -> tuple[int, int]:
    """Return the numbers of inputs and outputs of a layer."""
    rows, columns = layer.weight.shape
    return (rows, columns) if isinstance(layer, Conv1D) else (columns, rows)


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
    """Make every layer use products with a backward pass, in evaluation too.

    Returns:
        the layers that would have packed their weights, for `allow_packing`.
    """
    layers = [module for module in model.modules() if getattr(module, PACKS, False)]
    for layer in layers:
        layer.state_dict()  # unpacks a weight that an evaluation has packed
        setattr(layer, PACKS, False)
    return layers


def allow_packing(layers: list[nn.Module]) -> None:
    """Undo `forbid_packing`."""
    for layer in layers:
        setattr(layer, PACKS, True)
