"""PTX to blocks of instructions.

What a kernel's text may hold is listed here: whatever else it holds is an error, so that nothing of
it is passed over.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple

WIDTHS = {"pred": 1, "b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "bf16": 2}
WIDTHS |= {"b32": 4, "u32": 4, "s32": 4, "f32": 4, "b64": 8, "u64": 8, "s64": 8, "f64": 8}
WIDTHS |= {"bf16x2": 4, "f16x2": 4, "f32x2": 8}
SHARED_ALIGN = 16  # bytes
# Directives within a body that say nothing of what it computes.
SILENT = ("loc", "pragma")


class Address(NamedTuple):
    """An operand in brackets: a register or a name, and an offset in bytes."""

    base: str
    offset: int


Operand = str | Address | list["Operand"]


@dataclass(frozen=True)
class Instruction:
    """An instruction.

    Attributes:
        index: its place in the kernel.
        text: as written.
        line: of the source, or empty.
        guard: the predicate register that it depends on, or None.
        negated: it is executed where the guard is false.
        op: its name up to the first dot.
        suffix: what follows that dot.
        modifiers: the suffix, split at dots.
        type: the last of the modifiers that is a type, or empty.
        operands: registers, numbers and labels; addresses; lists of them.
    """

    index: int
    text: str
    line: str
    guard: str | None
    negated: bool
    op: str
    suffix: str
    modifiers: tuple[str, ...]
    type: str
    operands: tuple[Operand, ...]

    @property
    def is_barrier(self) -> bool:
        """Tell a barrier of all threads of a CTA."""
        return self.op == "bar" and "warp" not in self.modifiers

    def __str__(self) -> str:
        """Return text and source line, for reports."""
        return f"{self.text} ({self.line})" if self.line else self.text


@dataclass
class Kernel:
    """An entry.

    Attributes:
        name: of the entry.
        params: names of the parameters, in order, and their bytes.
        threads: of a CTA; None: the launch says.
        widths: bytes of registers, by name up to the number, or by the name of a single one.
        shared: offset of every variable in shared memory, in bytes.
        static_shared: bytes of shared memory that are not for the launch to choose.
        launch_sized: names of what is.
        blocks: instructions, which are executed from the first to the last.
        labels: index of the block that a label stands before.
    """

    name: str
    params: list[tuple[str, int]]
    threads: int | None
    widths: dict[str, int] = field(default_factory=dict)
    shared: dict[str, int] = field(default_factory=dict)
    static_shared: int = 0
    launch_sized: list[str] = field(default_factory=list)
    blocks: list[list[Instruction]] = field(default_factory=lambda: [[]])
    labels: dict[str, int] = field(default_factory=dict)

    @property
    def instructions(self) -> list[Instruction]:
        """Return all instructions; each one's `index` is its place here."""
        return [one for block in self.blocks for one in block]

    def width(self, register: str) -> int:
        """Return the bytes of a register, 1 of a predicate."""
        return self.widths.get(register) or self.widths[register.rstrip("0123456789")]


def parse(ptx: str) -> Kernel:
    """Parse the one entry of a text.

    Raises:
        ValueError: there is no entry or several, or a statement that is not PTX.
    """
    entries = list(re.finditer(r"\.entry\s+([\w$]+)\s*\((.*?)\)([^{]*)\{\n", ptx, re.S))
    if len(entries) != 1:
        raise ValueError(f"the text must have one entry, got {len(entries)}")
    name, params, head = entries[0].groups()
    threads = re.search(r"\.reqntid\s+(\d+)\s*(?:,\s*1\s*)*$", head.strip(), re.M)
    kernel = Kernel(name, _params(params), int(threads[1]) if threads else None)
    before = ptx[: entries[0].start()]
    for declared in re.findall(r"\.shared\s[^;]*;", re.sub(r"//.*", "", before)):
        _declare_shared(kernel, declared)
    _Body(kernel).read(_until_closed(ptx[entries[0].end() :]))
    # What the launch sizes comes last, and is one place under all of its names.
    kernel.static_shared = -(-kernel.static_shared // SHARED_ALIGN) * SHARED_ALIGN
    kernel.shared |= dict.fromkeys(kernel.launch_sized, kernel.static_shared)
    return kernel


def _params(text: str) -> list[tuple[str, int]]:
    """Return names and bytes of the parameters of an entry."""
    params = []
    pattern = r"\.param(?:\s+\.align\s+\d+)?\s+\.(\w+)(?:\s+\.ptr[\s.\w]*?)?\s+(\w+)(?:\[(\d+)\])?"
    for one in filter(None, map(str.strip, text.split(","))):
        found = re.fullmatch(pattern, one)
        if not found:
            raise ValueError(f"cannot parse the parameter {one!r}")
        params.append((found[2], WIDTHS[found[1]] * int(found[3] or 1)))
    return params


def _until_closed(text: str) -> str:
    """Return the text up to the bracket that closes a body; scopes' brackets have own lines."""
    depth, lines = 1, []
    for line in text.splitlines():
        depth += {"{": 1, "}": -1}.get(line.strip(), 0)
        if depth == 0:
            return "\n".join(lines)
        lines.append(line)
    raise ValueError("the body of the kernel is not closed")


def _declare_shared(kernel: Kernel, text: str) -> None:
    found = re.fullmatch(r"\.shared\s+\.align\s+(\d+)\s+\.(\w+)\s+([\w$]+)\[(\d*)\]\s*;", text)
    if not found:
        raise ValueError(f"cannot parse {text!r}")
    align, width, name, length = int(found[1]), WIDTHS[found[2]], found[3], found[4]
    if not length:
        kernel.launch_sized.append(name)
        return
    start = -(-kernel.static_shared // align) * align
    kernel.shared[name] = start
    kernel.static_shared = start + width * int(length)


class _Body:
    """A reader of a kernel's statements."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.line = ""  # of the source
        self.count = 0
        self.scopes = 0

    def read(self, body: str) -> None:
        lines = iter(body.splitlines())
        for line in lines:
            if line.strip() == "{":
                inner = []
                for line in lines:
                    if line.strip() == "}":
                        break
                    inner.append(line)
                for line in self._renamed(inner):
                    self._read_line(line)
            else:
                self._read_line(line)

    def _renamed(self, lines: list[str]) -> list[str]:
        """Give the labels and registers that a scope declares names of their own."""
        self.scopes += 1
        text = "\n".join(lines)
        labels = re.findall(r"^\s*([\w$]+):", text, re.M)
        registers = re.findall(r"^\s*\.reg\s+\.\w+\s+(\w+)\s*;", text, re.M)
        for name in labels + registers:
            own = "%" * (name in registers) + f"{name}.{self.scopes}"
            text = re.sub(rf"(?<![\w%$.]){re.escape(name)}(?!\w)", own, text)
        return text.splitlines()

    def _read_line(self, line: str) -> None:
        code, _, comment = line.partition("//")
        if re.match(r"\s*\.loc\s", code):
            self.line = comment.strip()
            return
        code = code.strip()
        while label := re.match(r"([$\w.]+):(?!:)", code):
            if self.kernel.blocks[-1]:
                self.kernel.blocks.append([])
            self.kernel.labels[label[1]] = len(self.kernel.blocks) - 1
            code = code[label.end() :].strip()
        for statement in filter(None, map(str.strip, code.split(";"))):
            if statement[0] == ".":
                self._directive(statement)
            else:
                self._instruction(statement)

    def _directive(self, text: str) -> None:
        if found := re.fullmatch(r"\.reg\s+\.(\w+)\s+([\w%.]+)(?:<\d+>)?", text):
            self.kernel.widths[found[2]] = WIDTHS[found[1]]
        elif text.startswith(".shared"):
            _declare_shared(self.kernel, text + ";")
        elif text[1:].split()[0] not in SILENT:
            raise ValueError(f"cannot parse {text!r}")

    def _instruction(self, text: str) -> None:
        found = re.fullmatch(r"(?:@(!?)([%\w.]+)\s+)?([a-z]\w*)((?:\.[\w:]+)*)\s*(.*)", text, re.S)
        if not found:
            raise ValueError(f"cannot parse {text!r}")
        modifiers = tuple(found[4].split(".")[1:])
        made = Instruction(
            index=self.count,
            text=text,
            line=self.line,
            guard=found[2],
            negated=found[1] == "!",
            op=found[3],
            suffix=found[4][1:],
            modifiers=modifiers,
            type=next((m for m in reversed(modifiers) if m in WIDTHS), ""),
            operands=tuple(_operand(one) for one in _split(found[5])),
        )
        self.count += 1
        blocks = self.kernel.blocks
        if made.is_barrier and blocks[-1]:
            blocks.append([])  # a barrier starts a block: threads gather at it
        blocks[-1].append(made)
        if made.op in ("bra", "ret", "exit"):
            blocks.append([])


def _split(text: str) -> list[str]:
    """Split operands at the commas that are in no bracket."""
    found, depth, start = [], 0, 0
    for i, c in enumerate(text + ","):
        depth += (c in "{[(") - (c in "}])")
        if c == "," and depth == 0:
            found.append(text[start:i].strip())
            start = i + 1
    return [x for x in found if x]


def _operand(text: str) -> Operand:
    if text[0] == "{" and text[-1] == "}":
        return [_operand(x) for x in _split(text[1:-1])]
    if text[0] == "[":
        found = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+))?\s*\]", text)
        if not found:
            raise ValueError(f"cannot parse the address {text}")
        return Address(found[1], int(found[2] or "0", 0))
    if not re.fullmatch(r"!?[-\w%$.|]+", text):
        raise ValueError(f"cannot parse the operand {text}")
    return text
