"""All launches of the head loss's Triton kernel, for ahead-of-time compilation."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from derta_kernels.head_loss.row_pass_triton import LAUNCH_CONFIGS, launch_config, row_pass
from derta_kernels.launch import Launch


def head_loss_launches() -> Iterator[Launch]:
    """Yield a launch for every row of the table and every option of a call."""
    pointers = {"tokens": "*i64", "token_weight": "*fp32", "logsumexp": "*fp32", "nll": "*fp32"}
    numbers = {"vocabulary": "i32", "row_stride": "i32", "softcap": "fp32", "logit_scale": "fp32"}
    cases: Iterator[tuple[int, str, bool, bool, bool]] = itertools.product(
        LAUNCH_CONFIGS, ("bf16", "fp16", "fp32"), (False, True), (False, True), (False, True)
    )
    for most, dtype, has_softcap, has_unlikely, form_gradient in cases:
        config = launch_config(most, has_unlikely)
        constants = {
            "HAS_SOFTCAP": has_softcap,
            "HAS_UNLIKELY": has_unlikely,
            "FORM_GRADIENT": form_gradient,
            "BLOCK": config.block,
        }
        yield Launch(
            name=f"row pass, {dtype}, V <= {most}"
            + ", softcap" * has_softcap
            + ", unlikely" * has_unlikely
            + ", gradient" * form_gradient,
            kernel=row_pass,
            signature={"logits": f"*{dtype}", **pointers, **numbers}
            | dict.fromkeys(constants, "constexpr"),
            constants=constants,
            divisible=frozenset({"logits", *pointers, "row_stride"}),  # V may be, and gains nothing
            num_warps=config.num_warps,
        )
