"""What optimizers keep of the parameters that they train, by their names in transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor, nn

BLOCK = 256  # values of one state that share a float32 scale
LEAST_VALUES = 4096  # of a parameter whose states are quantized


def _as_weights(parameter: Tensor, is_embedding: bool) -> int:
    return 2 * parameter.nbytes


def _float32(parameter: Tensor, is_embedding: bool) -> int:
    return 2 * 4 * parameter.numel()


def _bitsandbytes(parameter: Tensor, is_embedding: bool) -> int:
    values = parameter.numel()
    if values < LEAST_VALUES or is_embedding:  # transformers sees to the latter
        return _float32(parameter, is_embedding)
    return 2 * (values + 4 * -(-values // BLOCK))


def _torchao(bits: int) -> Callable[[Tensor, bool], int]:
    def size(parameter: Tensor, is_embedding: bool) -> int:
        values = parameter.numel()
        if values < LEAST_VALUES or values % BLOCK != 0:
            return _as_weights(parameter, is_embedding)
        table = 4 * 2**bits  # of what the codes mean, which every state has to itself
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


def state_bytes(model: nn.Module, optim: str, device_type: str) -> int:
    """Bytes of the device that an optimizer's states take.

    Paged ones take none of a GPU's: they wait on the host when it is full.

    Args:
        model: whose parameters with `requires_grad` are trained.
        optim: a name of transformers; of those that `STATE_BYTES` lacks, as of "adamw_torch".
        device_type: "cuda" or "cpu".
    """
    if optim.startswith("paged") and device_type != "cpu":
        return 0
    of_one = STATE_BYTES.get(optim, _as_weights)
    return sum(of_one(parameter, is_embedding) for parameter, is_embedding in _trained(model))


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
