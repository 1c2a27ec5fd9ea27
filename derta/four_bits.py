"""Linear layers in 4 bits, of bitsandbytes: which ones may be.

On a CPU with AVX-512 it reads a row that is not whole quantization blocks with the scales of other
rows, in silence.
"""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

BLOCK = 64  # neighbouring weights that share a scale


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
