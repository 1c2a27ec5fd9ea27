"""Every launch of the attention's Triton kernels, for ahead-of-time compilation."""

from __future__ import annotations

from collections.abc import Iterator

from derta_kernels.aot import SHARED_KIB, Launch
from derta_kernels.attention.launch_configs import LAUNCH_CONFIGS, ROOMY_KIB
from derta_kernels.attention.triton_backward import backward_keys, backward_queries
from derta_kernels.attention.triton_common import constants
from derta_kernels.attention.triton_forward import forward

KERNELS = {
    "forward": forward,
    "backward_queries": backward_queries,
    "backward_keys": backward_keys,
}
TENSORS = ("q", "k", "v", "out", "d_out", "d_q", "d_k", "d_v")
FLOATS = ("logsumexp", "delta")
TABLES = ("tiles", "until", "until_extremes", "positions", "position_extremes")
NUMBERS = {"scale": "fp32", "softcap": "fp32"}  # the others are int32


def launches() -> Iterator[Launch]:
    """Every row of the table, with everything that a call may ask for and with nothing of it.

    float16 takes what bfloat16 takes. Of the head dimensions that share a row, 96 stands for those
    that do not fill their tiles.
    """
    for target, config in LAUNCH_CONFIGS.items():
        kernel = KERNELS[target.kernel]
        dtype = {2: "bf16", 4: "fp32"}[target.itemsize]
        pointers = dict.fromkeys(TENSORS, f"*{dtype}")
        pointers |= dict.fromkeys(FLOATS, "*fp32") | dict.fromkeys(TABLES, "*i32")
        capabilities = [c for c, kib in SHARED_KIB.items() if (kib >= ROOMY_KIB) == target.roomy]
        cases = [(target.block_d, False), (target.block_d, True)]
        if target.block_d == 128:
            cases.append((96, True))
        for head_dim, everything in cases:
            fixed = constants(head_dim, 4, config, everything, everything)
            types = pointers | NUMBERS | dict.fromkeys(fixed, "constexpr")
            signature = {name: types.get(name, "i32") for name in kernel.arg_names}
            yield Launch(
                name=f"attention {target.kernel.replace('_', ' ')}, {dtype}, D {head_dim}"
                + ", softcap, window" * everything
                + ", 160 KiB" * target.roomy,
                kernel=kernel,
                signature=signature,
                constants=fixed,
                divisible=frozenset(
                    name for name in signature if name in pointers or name.endswith("stride")
                ),
                num_warps=config.num_warps,
                num_stages=config.num_stages,
                capabilities=capabilities,
            )
