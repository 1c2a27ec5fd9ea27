"""Ranks that share a head compute what one rank computes with the whole head."""

from __future__ import annotations

from pathlib import Path

from ranks import run_ranks

CASES = """
import sys
import torch.distributed as dist
import vocabulary_cases
dist.init_process_group("gloo")
for name in sys.argv[1:]:
    getattr(vocabulary_cases, name)()
"""


def test_two_ranks_compute_what_one_does() -> None:
    """One test for all promises of an op with a group: starting the ranks takes long."""
    run_ranks(
        CASES,
        "every_head_dtype_and_row_pass",
        "rows_closer_to_1_than_any_float",
        "only_required_gradients",
        "few_rows_and_many_chunks",
        "ranks_of_tokens",
        "differences_between_ranks",
        "heads_that_are_dtensors",
        "a_compiled_model",
    )


def test_three_ranks_of_which_one_has_no_rows() -> None:
    run_ranks(
        CASES,
        "rows_closer_to_1_than_any_float",
        "few_rows_and_many_chunks",
        "ranks_of_tokens",
        "heads_that_are_dtensors",
        ranks=3,
    )


MODELS = """
import sys
import torch.distributed as dist
import sharded_models
dist.init_process_group("gloo")
sharded_models.compare(sys.argv[1])
"""


def test_a_tensor_parallel_model_trains_as_the_whole_model_does(tmp_path: Path) -> None:
    run_ranks(MODELS, tmp_path)
