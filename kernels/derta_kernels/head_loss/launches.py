"""All launches of the head loss's Triton kernel, for ahead-of-time compilation."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from derta_kernels.head_loss.row_pass_triton import (
    FIRST_WALK,
    LAUNCH_CONFIGS,
    SECOND_WALK,
    WHOLE,
    launch_config,
    row_pass,
)
from derta_kernels.launch import Launch

STAGES = {WHOLE.value: "", FIRST_WALK.value: ", first walk", SECOND_WALK.value: ", second walk"}


def head_loss_launches() -> Iterator[Launch]:
    """Yield a launch for every row of the table, every stage and every option of a call."""
    pointers = dict.fromkeys(("token_weight", "logsumexp", "nll", "summary"), "*fp32")
    pointers = {"tokens": "*i64", **pointers}
    numbers = {"vocabulary": "i32", "row_stride": "i32", "softcap": "fp32", "logit_scale": "fp32"}
    flags = (False, True)
    cases: Iterator[tuple[int, str, int, bool, bool, bool]] = itertools.product(
        LAUNCH_CONFIGS, ("bf16", "fp16", "fp32"), STAGES, flags, flags, flags
    )
    for most, dtype, stage, has_softcap, has_unlikely, form_gradient in cases:
        if stage == FIRST_WALK.value and form_gradient:
            continue
        config = launch_config(most, has_unlikely)
        constants = {
            "STAGE": stage,
            "HAS_SOFTCAP": has_softcap,
            "HAS_UNLIKELY": has_unlikely,
            "FORM_GRADIENT": form_gradient,
            "BLOCK": config.block,
        }
        yield Launch(
            name=f"row pass, {dtype}{STAGES[stage]}, V <= {most}"
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
