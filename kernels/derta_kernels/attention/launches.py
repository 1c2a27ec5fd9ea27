"""Every launch of the attention's Triton kernels, for ahead-of-time compilation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from derta_kernels.attention.launch_configs import LAUNCH_CONFIGS, chip, fenced
from derta_kernels.attention.triton_backward import backward_keys, backward_queries
from derta_kernels.attention.triton_common import constants, key_constants
from derta_kernels.attention.triton_forward import forward
from derta_kernels.launch import SHARED_KIB, Launch

KERNELS = {
    "forward": forward,
    "backward_queries": backward_queries,
    "backward_keys": backward_keys,
}
TENSORS = ("q", "k", "v", "out", "d_out", "d_q", "d_k", "d_v")
TABLES = ("tiles", "until", "until_extremes", "positions", "position_extremes")
NUMBERS = {"logsumexp": "*fp32", "delta": "*fp32", "scale": "fp32", "softcap": "fp32"}


def attention_launches() -> Iterator[Launch]:
    """Yield every row of the table with all options of a call, with a window, and with none.

    bfloat16 stands for float16, which takes the same resources. Head dimension 96 stands for those
    that do not fill their tiles.
    """
    for target, row in LAUNCH_CONFIGS.items():
        config = fenced(row, target.chip)
        kernel = KERNELS[target.kernel]
        dtype = {2: "bf16", 4: "fp32"}[target.itemsize]
        pointers = dict.fromkeys(TENSORS, f"*{dtype}") | dict.fromkeys(TABLES, "*i32")
        capped_elsewhere = target._replace(has_softcap=True) in LAUNCH_CONFIGS
        softcaps = [target.has_softcap] if capped_elsewhere else [False, True]
        head_dims = [128, 96] if target.block_d == 128 else [target.block_d]
        capabilities = [c for c, kib in SHARED_KIB.items() if chip(c, kib * 1024) == target.chip]
        cases = [(head_dims[0], softcaps[0], has_window) for has_window in (False, True)]
        cases += [(head_dim, softcaps[-1], True) for head_dim in head_dims]
        cases = list(dict.fromkeys(cases))
        for head_dim, has_softcap, has_window in cases:
            for form in _forms(target.kernel, config.apart, has_window):
                fixed = constants(head_dim, 4, config, has_softcap, has_window) | form.constants
                types = pointers | NUMBERS | form.types | dict.fromkeys(fixed, "constexpr")
                signature = {name: types.get(name, "i32") for name in kernel.arg_names}
                yield Launch(
                    name=f"attention {target.kernel.replace('_', ' ')}, {dtype}, D {head_dim}"
                    + ", softcap" * has_softcap
                    + ", window" * has_window
                    + f"{form.name}, sm_{target.chip}",
                    kernel=kernel,
                    signature=signature,
                    constants=fixed,
                    divisible=frozenset(
                        name
                        for name, kind in signature.items()
                        if kind.startswith("*") or name.endswith("stride")
                    ),
                    num_warps=config.num_warps,
                    num_stages=config.num_stages,
                    tile_flops=form.products * 2 * config.block_q * config.block_k * target.block_d,
                    capabilities=capabilities,
                )


class _Form(NamedTuple):
    """The results that a launch forms.

    Attributes:
        name: its part of the launch's name.
        products: products of a tile.
        constants, types: those of arguments that other forms lack, or have in another way.
    """

    name: str
    products: int
    constants: dict[str, Any]
    types: dict[str, str]


def _forms(kernel: str, apart: bool, has_window: bool) -> Iterator[_Form]:
    """Yield the forms of a kernel's launch; several parts take the resources that two take."""
    if kernel != "backward_keys":
        yield _Form("", {"forward": 2, "backward_queries": 3}[kernel], {}, {})
        return
    for parts in (1, 2) if has_window else (1,):
        types = dict.fromkeys(("d_k", "d_v"), "*fp32") if parts > 1 else {}
        name = ", parts" * (parts > 1)
        if apart:
            yield _Form(f", dk{name}", 3, key_constants(parts, True, False), types)
            yield _Form(f", dv{name}", 2, key_constants(parts, False, True), types)
        else:
            yield _Form(name, 4, key_constants(parts, True, True), types)
