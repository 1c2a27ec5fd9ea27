"""Chunks of the head loss fill a GPU, are as equal as tiles allow, and keep to a fixed budget.

The numbers of tiles are counted for an H100, not measured.
"""

from __future__ import annotations

import math

import pytest
import torch

from derta_kernels.head_loss.chunks import GIB, MIB, Chip, Problem, chip_of, chunk_rows, split

H100 = Chip("cuda", 132, 79 * GIB)
LLAMA_8B, GEMMA_2B = (128256, 4096), (256000, 2304)
LLAMA_1B, QWEN_05B = (128256, 2048), (151936, 896)


def lengths(count: int, most: int) -> list[int]:
    return [chunk.stop - chunk.start for chunk in split(count, most)]


def occupancy(rows: list[int], width: int, processors: int) -> float:
    """Return the share of multiprocessors that d_hidden's products of 128 x 256 tiles keep busy."""
    tiles = [-(-n // 128) * -(-width // 256) for n in rows]
    return sum(tiles) / sum(-(-count // processors) * processors for count in tiles)


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize(
    ("head", "count", "before", "after"),
    [
        (LLAMA_8B, 8192, 0.97, 0.97),
        (GEMMA_2B, 8192, 0.55, 0.87),
        (LLAMA_1B, 8192, 0.48, 0.97),
        (QWEN_05B, 8192, 0.24, 0.65),
        (LLAMA_8B, 8458, 0.90, 0.90),  # 8 chunks of 1024 rows and one of 266
        (LLAMA_1B, 8458, 0.45, 0.81),
    ],
)
def test_chunks_fill_the_multiprocessors_of_a_gpu(
    head: tuple[int, int], count: int, before: float, after: float, trainable: bool
) -> None:
    vocabulary, width = head
    of_1024 = [min(1024, count - start) for start in range(0, count, 1024)]
    assert occupancy(of_1024, width, 132) == pytest.approx(before, abs=0.006)
    most = chunk_rows(count, Problem(vocabulary, width, 2, trainable), H100, None)
    assert occupancy(lengths(count, most), width, 132) == pytest.approx(after, abs=0.006)
    assert most * vocabulary * 2 <= GIB


def test_the_gradient_of_a_trained_head_is_hidden_by_its_product() -> None:
    """d_weight is read and written once a chunk: 300 operations for each byte hide that."""
    for vocabulary, width in (LLAMA_8B, LLAMA_1B, GEMMA_2B):
        rows = chunk_rows(8192, Problem(vocabulary, width, 2, True), H100, None)
        moved = 8 * vocabulary * width + 2 * rows * (vocabulary + width)
        assert 2 * rows * vocabulary * width / moved > 300
    narrow = chunk_rows(8192, Problem(*LLAMA_8B, 2, False), H100, None)
    assert narrow == 1024  # a frozen head has none to hide, and takes no more memory


@pytest.mark.parametrize("count", [1, 127, 128, 129, 266, 1024, 8192, 8458])
@pytest.mark.parametrize("most", [7, 128, 384, 1024, 9088])
def test_chunks_are_few_and_equal_and_hold_every_row_once(count: int, most: int) -> None:
    chunks = split(count, most)
    assert [row for chunk in chunks for row in range(count)[chunk]] == list(range(count))
    rows = lengths(count, most)
    unit = min(128, most)
    assert max(rows) <= most and len(chunks) == math.ceil(math.ceil(count / unit) / (most // unit))
    in_tiles = [math.ceil(n / unit) for n in rows]
    assert max(in_tiles) - min(in_tiles) <= 1


def test_a_budget_is_kept_and_a_small_gpu_gets_less() -> None:
    problem = Problem(*LLAMA_8B, 2, True)
    for scratch_mb in (64, 100, 300, 700):
        assert chunk_rows(8192, problem, H100, scratch_mb) * 128256 * 2 <= scratch_mb * MIB
    assert chunk_rows(8192, problem, H100, 1) == 128
    assert chunk_rows(8192, problem, Chip("cuda", 46, 8 * GIB), None) * 128256 * 2 <= GIB // 4
    shared = chunk_rows(8192, problem, H100, 300, scratches=2)
    assert 2 * shared * 128256 * 2 <= 300 * MIB


def test_chunks_do_not_depend_on_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        multi_processor_count, total_memory = 132, 79 * GIB

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    monkeypatch.delattr(torch.cuda, "mem_get_info")
    assert chip_of(torch.device("cuda")) == H100
