"""The memory of optimizer states, by transformers' names of the optimizers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor, nn

BLOCK = 256  # number of values of a state that share a float32 scale
LEAST_VALUES = 4096  # least size of a parameter with quantized states


def _as_weights(parameter: Tensor, is_embedding: bool) -> int:
    return 2 * parameter.nbytes


def _float32(parameter: Tensor, is_embedding: bool) -> int:
    return 2 * 4 * parameter.numel()


def _bitsandbytes(parameter: Tensor, is_embedding: bool) -> int:
    values = parameter.numel()
    if values < LEAST_VALUES or is_embedding:  # transformers exempts embeddings
        return _float32(parameter, is_embedding)
    return 2 * (values + 4 * -(-values // BLOCK))


def _torchao(bits: int) -> Callable[[Tensor, bool], int]:
    def size(parameter: Tensor, is_embedding: bool) -> int:
        values = parameter.numel()
        if values < LEAST_VALUES or values % BLOCK != 0:
            return _as_weights(parameter, is_embedding)
        table = 4 * 2**bits  # each state's own table of code values
        return 2 * (values * bits // 8 + 4 * values // BLOCK + table)

    return size


def _nothing(parameter: Tensor, is_embedding: bool) -> int:
    return 0


STATE_BYTES: dict[str, Callable[[Tensor, bool], int]] = {
    "adamw_torch": _as_weights,
    "adamw_torch_fused": _as_weights,
    "adamw_torch_8bit": _torchao(8),
    "adamw_torch_4bit": _torchao(4),
    "adamw_bnb_8bit": _bitsandbytes,
    "adamw_8bit": _bitsandbytes,
    "paged_adamw_32bit": _float32,
    "paged_adamw_8bit": _bitsandbytes,
    "sgd": _nothing,
}


def state_bytes(
    model: nn.Module,
    optim: str,
    device_type: str,
    stepped: Callable[[Tensor], Tensor] = lambda parameter: parameter,
) -> int:
    """Return the device memory of an optimizer's states, in bytes.

    Paged states take no memory of a GPU: they move to the host when the GPU is full.

    Args:
        model: model whose parameters with `requires_grad` are trained.
        optim: transformers' name of the optimizer; names outside `STATE_BYTES` count as
            "adamw_torch".
        device_type: "cuda" or "cpu".
        stepped: function from a parameter to the part of it that is stepped on this device.
    """
    if optim.startswith("paged") and device_type != "cpu":
        return 0
    of_one = STATE_BYTES.get(optim, _as_weights)
    return sum(
        of_one(stepped(parameter), is_embedding) for parameter, is_embedding in _trained(model)
    )


def _trained(model: nn.Module) -> Iterator[tuple[Tensor, bool]]:
    embeddings = {
        parameter
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters()
    }
    for parameter in model.parameters():
        if parameter.requires_grad:
            yield parameter, parameter in embeddings
