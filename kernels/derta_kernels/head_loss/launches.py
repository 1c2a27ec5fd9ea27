"""All launches of the head loss's Triton kernels, for ahead-of-time compilation."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from derta_kernels.head_loss.row_pass import TILE
from derta_kernels.head_loss.row_pass_triton import (
    FIRST_WALK,
    LAUNCH_CONFIGS,
    SECOND_WALK,
    WHOLE,
    launch_config,
    row_pass,
)
from derta_kernels.head_loss.tile_product_triton import (
    TileLaunch,
    constants_of,
    launch_config as tile_launch,
    tile_product,
)
from derta_kernels.launch import SHARED_KIB, Launch

STAGES = {WHOLE.value: "", FIRST_WALK.value: ", first walk", SECOND_WALK.value: ", second walk"}


ROWS = {most: f"rows up to {most // 2**10} KiB" for most in LAUNCH_CONFIGS}
ROWS[max(ROWS)] = "longer rows"
LONG_VOCABULARY = 128256  # Llama 3's, which stands for all longer rows
DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4}


def head_loss_launches() -> Iterator[Launch]:
    """Yield a launch for every row of the tables, every stage and every option of a call."""
    yield from _row_passes()
    yield from _tile_products()


def _row_passes() -> Iterator[Launch]:
    pointers = dict.fromkeys(("token_weight", "logsumexp", "nll", "summary", "blocks"), "*fp32")
    pointers = {"tokens": "*i64", **pointers}
    numbers = {"vocabulary": "i32", "row_stride": "i32", "softcap": "fp32", "logit_scale": "fp32"}
    flags = (False, True)
    cases: Iterator[tuple[int, str, int, bool, bool, str]] = itertools.product(
        LAUNCH_CONFIGS, DTYPES, STAGES, flags, flags, ("", ", gradient", ", gradient and blocks")
    )
    for most, dtype, stage, has_softcap, has_unlikely, formed in cases:
        form_blocks = formed.endswith("blocks")
        if stage == FIRST_WALK.value and formed or stage != WHOLE.value and form_blocks:
            continue
        config = launch_config(most, has_unlikely or form_blocks)
        if config != LAUNCH_CONFIGS[most]:
            continue  # the next rows have it
        constants = {
            "STAGE": stage,
            "HAS_SOFTCAP": has_softcap,
            "HAS_UNLIKELY": has_unlikely,
            "FORM_GRADIENT": bool(formed),
            "FORM_BLOCKS": form_blocks,
            "BLOCK": config.block,
        }
        yield Launch(
            name=f"row pass, {dtype}{STAGES[stage]}, {ROWS[most]}"
            + ", softcap" * has_softcap
            + ", unlikely" * has_unlikely
            + formed,
            kernel=row_pass,
            signature={"logits": f"*{dtype}", **pointers, **numbers}
            | dict.fromkeys(constants, "constexpr"),
            constants=constants,
            divisible=frozenset({"logits", *pointers, "row_stride"}),  # V may be, and gains nothing
            num_warps=config.num_warps,
            twice_read=min(most, LONG_VOCABULARY * DTYPES[dtype])
            if stage == WHOLE.value and formed
            else 0,
        )


def _tile_products() -> Iterator[Launch]:
    numbers = ("rows", "vocabulary", "width", "gradient_stride", "other_stride", "across")
    for (dtype, size), is_weight in itertools.product(DTYPES.items(), (False, True)):
        constants = constants_of(size, is_weight)
        pointers = {
            "gradient": f"*{dtype}",
            "other": f"*{dtype}",
            "product": "*fp32" if is_weight else f"*{dtype}",
            "places": "*i32",
            "counts": "*i32",
        }
        # Chips of one configuration make one launch.
        chips: dict[TileLaunch, list[int]] = {}
        for chip in SHARED_KIB:
            chips.setdefault(tile_launch(size, chip), []).append(chip)
        for config, capabilities in chips.items():
            yield Launch(
                name=f"tile product, {dtype}, {'weight' if is_weight else 'hidden'}"
                + f", {config.num_stages} stages",
                kernel=tile_product,
                signature=pointers
                | dict.fromkeys(numbers, "i32")
                | dict.fromkeys(constants, "constexpr"),
                constants=constants,
                divisible=frozenset({*pointers, "width", "gradient_stride", "other_stride"}),
                num_warps=config.num_warps,
                num_stages=config.num_stages,
                tile_flops=2 * TILE * config.width * config.depth,
                capabilities=capabilities,
            )
