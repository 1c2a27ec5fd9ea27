"""Parse PTX."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

TYPES = {
    "b8": np.uint8, "u8": np.uint8, "s8": np.int8, "b16": np.uint16, "u16": np.uint16,
    "s16": np.int16, "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "b64": np.uint64,
    "u64": np.uint64, "s64": np.int64, "f32": np.float32, "f64": np.float64, "f16": np.float16,
    "bf16": np.uint16, "pred": np.bool_, "bf16x2": np.uint32, "f32x2": np.uint64,
    "f16x2": np.uint32,
}  # fmt: skip


@dataclass
class Instruction:
    index: int
    text: str
    guard: str | None
    negated: bool
    op: str
    mods: list[str]
    type: str
    args: list
    line: str  # of the source, for reports


@dataclass
class Kernel:
    name: str
    params: list[tuple[str, int]]
    threads: int
    widths: dict[str, int]
    blocks: list[list[Instruction]]
    labels: dict[str, int]
    count: int


# ---------------------------------------------------------------------------------- parsing
def _operands(text: str) -> list[str]:
    found, depth, start = [], 0, 0
    for i, c in enumerate(text + ","):
        depth += (c in "{[(") - (c in "}])")
        if c == "," and depth == 0:
            found.append(text[start:i].strip())
            start = i + 1
    return [x for x in found if x]


def parse(ptx: str) -> Kernel:
    source_line = ""
    entry = re.search(r"\.entry\s+([\w$]+)\s*\((.*?)\)(.*?)\{(.*)\n\}", ptx, re.S)
    name, params_text, head, body = entry.groups()
    params = [
        (m[2], {"u64": 8, "b64": 8, "s64": 8, "f64": 8}.get(m[1], 4))
        for m in re.finditer(r"\.param\s+\.(\w+)[^,]*?(\w+)\s*(?:,|$)", params_text.strip())
    ]
    threads = int(re.search(r"\.reqntid\s+(\d+)", head)[1])
    widths = {
        m[2]: {"pred": 1, "b8": 1}.get(m[1]) or int(m[1][1:]) // 8
        for m in re.finditer(r"\.reg\s+\.(\w+)\s+%(\w+)<", body)
    }
    body = body.split(".section")[0]
    blocks: list[list[Instruction]] = [[]]
    labels: dict[str, int] = {}
    count = 0
    scope, scopes, local = "", 0, re.compile(r"(?!)")
    for raw in body.splitlines():
        if raw.strip() == "{":
            scopes += 1
            scope, local = f"_{scopes}", re.compile(r"\b(waitLoop|skipWait|complete)\b")
            continue
        if raw.strip() == "}":
            scope, local = "", re.compile(r"(?!)")
            continue
        raw = local.sub(rf"\g<1>{scope}", raw).replace("complete_", "%p_complete_")
        if m := re.match(r"\s*\.loc\s+\d+\s+\d+.*?(?://\s*(.*))?$", raw):
            source_line = m[1] or ""
            continue
        text = raw.split("//")[0].strip()
        if not text or text.startswith("."):
            continue
        if m := re.match(r"([$\w]+):$", text):
            if blocks[-1]:
                blocks.append([])
            labels[m[1]] = len(blocks) - 1
            continue
        for statement in text.split(";"):
            statement = statement.strip()
            m = re.match(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)$", statement, re.S)
            if not m:
                if statement.strip("{} "):
                    raise ValueError(f"cannot parse {statement!r}")
                continue
            parts = m[3].split(".")
            types = [p for p in parts if p in TYPES]
            made = Instruction(
                count, statement, m[2], m[1] == "!", parts[0], parts[1:],
                types[-1] if types else "", [_arg(a) for a in _operands(m[4])], source_line,
            )  # fmt: skip
            count += 1
            if made.op in ("bar", "barrier") and "warp" not in made.mods and blocks[-1]:
                blocks.append([])  # a barrier starts a block: threads gather at it
            blocks[-1].append(made)
            if made.op in ("bra", "ret", "exit"):
                blocks.append([])
    return Kernel(name, params, threads, widths, blocks, labels, count)


def _arg(text: str):
    if text.startswith("{"):
        return [_arg(x) for x in _operands(text[1:-1])]
    if text.startswith("["):
        m = re.match(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+))?\s*\]", text)
        return ("mem", m[1], int(m[2] or "0", 0))
    return text
