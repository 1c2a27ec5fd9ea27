"""Small kernels for tests of the interpreter, written in PTX by hand."""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ptx.launches import Run, execute
from ptx.processor import Options

KINDS: dict[str, Any] = {
    "s16": np.int16,
    "u16": np.uint16,
    "s32": np.int32,
    "u32": np.uint32,
    "s64": np.int64,
    "u64": np.uint64,
    "f32": np.float32,
    "f16": np.float16,
}
REGISTERS = {2: "%rs", 4: "%r", 8: "%rd"}
TEXT = """
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry snippet({params})
.reqntid {threads}
{{
    .reg .pred %p<32>;
    .reg .b16 %rs<64>;
    .reg .b32 %r<512>;
    .reg .b64 %rd<64>;
    mov.u32 %r0, %tid.x;
{loads}
{body}
    ret;
}}
"""


def run(
    body: str,
    *,
    capability: int = 80,
    grid: int = 1,
    threads: int = 32,
    shared: int = 0,
    outputs: Collection[str] = (),
    options: Options | None = None,
    **tensors: Tensor,
) -> Run:
    """Run a body. %r0 is the thread's number, %rd0, %rd1, ... the addresses of the tensors."""
    ptx = TEXT.format(
        params=",".join(
            f"\n.param .u64 .ptr .global .align 1 param_{i}" for i in range(len(tensors))
        ),
        threads=threads,
        loads="\n".join(f"    ld.param.b64 %rd{i}, [param_{i}];" for i in range(len(tensors))),
        body=body,
    )
    return execute(ptx, capability, grid, shared, tensors, outputs, options or Options())


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(*shape, dtype=dtype)


def results(
    instruction: str,
    kinds: Sequence[str],
    rows: Sequence[Sequence[Any]],
    capability: int = 80,
    options: Options | None = None,
) -> np.ndarray:
    """Return what an instruction makes of rows of operands, a row a lane.

    Args:
        instruction: with {d} for its result and {a}, {b}, {c} for its operands.
        kinds: types of the operands, then of the result.
    """
    count = len(rows)
    assert count <= 32
    lanes = [rows[min(i, count - 1)] for i in range(32)]
    columns = [
        np.array([row[i] for row in lanes]).astype(KINDS[kind]) for i, kind in enumerate(kinds[:-1])
    ]
    result = np.zeros(32, KINDS[kinds[-1]])
    arrays = [*columns, result]
    tensors = {
        f"x{i}": torch.from_numpy(x.view({2: np.int16, 4: np.int32, 8: np.int64}[x.itemsize]))
        for i, x in enumerate(arrays)
    }
    names, code = [], []
    for i, x in enumerate(arrays):
        register = f"{REGISTERS[x.itemsize]}{40 + i}"
        names.append(register)
        code.append(f"mul.wide.u32 %rd30, %r0, {x.itemsize};\nadd.s64 %rd{20 + i}, %rd{i}, %rd30;")
        if i < len(columns):
            code.append(f"ld.global.b{8 * x.itemsize} {register}, [%rd{20 + i}];")
    places = dict(zip("abc", names[:-1], strict=False)) | {"d": names[-1]}
    code.append(instruction.format(**places) + ";")
    code.append(f"st.global.b{8 * result.itemsize} [%rd{20 + len(columns)}], {names[-1]};")
    run("\n".join(code), capability=capability, options=options, **tensors)
    return result[:count]


def small_integers(*shape: int, seed: int) -> Tensor:
    """Whole numbers whose products are exact in every order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, shape, generator=generator).float()


def image(matrix: Tensor, width: int, transposed: bool) -> tuple[Tensor, int, int]:
    """Return a matrix (length, 16) as products read it from shared memory.

    Returns:
        elements: (count,) in the order of memory, rows of `width` bytes in blocks of eight,
            swizzled.
        along, across: bytes between blocks along and across the rows.
    """
    length, depth = matrix.shape
    per_row = width // 2
    if transposed:  # rows are of one depth, each block holds `per_row` of the length
        blocks = -(-length // per_row)
        elements = torch.zeros(blocks * (depth // 8) * 8 * per_row)
        along, across = depth // 8 * 8 * width, 8 * width
    else:
        elements = torch.zeros(-(-length // 8) * 8 * per_row)
        along, across = 0, 8 * width
    for i in range(length):
        for k in range(depth):
            if transposed:
                block = i // per_row * along + k // 8 * across
                row, column = k % 8, i % per_row
            else:
                block, row, column = i // 8 * across, i % 8, k
            chunk, rest = divmod(column, 8)
            chunk ^= {128: row, 64: row // 2, 32: row // 4}[width]
            elements[(block + row * width) // 2 + chunk * 8 + rest] = matrix[i, k]
    return elements, along, across


def far(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return a tensor of zeros in a sparse file, of which only elements that are set take room."""
    last = sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
    size = (last + 1) * dtype.itemsize
    with tempfile.TemporaryFile() as file:
        file.truncate(size)
        memory = mmap.mmap(file.fileno(), size)
    return torch.frombuffer(memory, dtype=dtype).as_strided(shape, strides)
