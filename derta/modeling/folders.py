"""Files of a model folder, checked before a library reads them: JSON, and weights' headers.

No weight is read. Errors are one sentence that names the file.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARDS = "pytorch_model_fsdp_0"  # a folder in a sharded checkpoint of FSDP
TOKENIZER_JSON = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
)
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
REMEDY = "copy or download it again"
LISTED = 3  # names that a sentence spells out


class Header(NamedTuple):
    """A tensor as the header of its safetensors file describes it.

    Args:
        dtype: its dtype, as in safetensors: F32, BF16, U8.
        shape: its shape.
        file: its file.
    """

    dtype: str
    shape: tuple[int, ...]
    file: Path

    @property
    def is_floating_point(self) -> bool:
        """True if its values are floating-point numbers."""
        return self.dtype.startswith(("F", "BF"))


def read_object(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        ValueError: the file holds something else; names the file.
        OSError: it cannot be read.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: is damaged, expected UTF-8: {error.reason} at byte {error.start}"
        ) from None
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}: is damaged, expected JSON: {error.msg} at line {error.lineno}, column "
            f"{error.colno}"
        ) from None
    except (ValueError, RecursionError) as error:  # a number too long, brackets too deep
        raise ValueError(f"{path}: is damaged, expected JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {json.dumps(value)[:40]}")
    return value


def read_objects(folder: Path, names: Iterable[str]) -> None:
    """Check those of the files that exist, see `read_object`."""
    for name in names:
        if (folder / name).is_file():
            read_object(folder / name)


def weight_headers(folder: Path) -> dict[str, Header]:
    """Return all tensors of a model by name, from the headers of its safetensors files.

    Raises:
        FileNotFoundError: there are no weights in safetensors, or a shard is absent.
        ValueError: a file is damaged, or the files contradict one another.
    """
    single, index = folder / WEIGHTS, folder / INDEX
    if single.is_file() and index.is_file():
        raise ValueError(
            f"{folder}: has {WEIGHTS} and {INDEX}, expected one of them: remove the one of another "
            "model"
        )
    if single.is_file():
        return file_headers(single)
    if not index.is_file():
        raise FileNotFoundError(f"{folder}: has no {WEIGHTS}{_instead(folder)}")
    return _shard_headers(index)


def adapter_headers(folder: Path) -> dict[str, Header]:
    """Return the tensors of adapters by name, from the header of their safetensors file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged.
    """
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise FileNotFoundError(f"{folder}: adapters without {ADAPTER_WEIGHTS}{_instead(folder)}")
    return file_headers(folder / ADAPTER_WEIGHTS)


def _instead(folder: Path) -> str:
    """Return the end of a sentence that names what is there instead, empty if nothing is."""
    if (folder / SHARDS).is_dir():
        return f"; {SHARDS} holds its shards, of which derta merge makes one"
    for pattern in PICKLES:
        for path in sorted(folder.glob(pattern)):
            if path.stem.startswith(("pytorch_model", "adapter_model", "model", "consolidated")):
                return f"; {path.name} is a pickle, which is never read: convert it to safetensors"
    return ""


def _shard_headers(index: Path) -> dict[str, Header]:
    """Return the tensors of all shards that the index names."""
    places = read_object(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{index}: weight_map must map tensors to files, got {places!r:.40}")
    for tensor, name in places.items():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith("safetensors"):
            raise ValueError(
                f"{index}: weight_map places {tensor} in {name!r:.60}, expected a safetensors file "
                "of this folder"
            )
    found: dict[str, Header] = {}
    for name in sorted(set(places.values())):
        shard = index.parent / name
        if not shard.is_file():
            raise FileNotFoundError(f"{shard}: no such file, which {INDEX} names: {REMEDY}")
        held = file_headers(shard)
        if twice := sorted(found.keys() & held.keys()):
            raise ValueError(
                f"{shard}: holds {listed(twice)}, which {found[twice[0]].file.name} holds too, "
                "expected every tensor once"
            )
        found |= held
    for tensor, name in places.items():
        if tensor not in found or found[tensor].file.name != name:
            raise ValueError(
                f"{index.parent / name}: lacks {tensor}, which {INDEX} places there: {REMEDY}"
            )
    return found


def file_headers(path: Path) -> dict[str, Header]:
    """Return the tensors of a safetensors file by name.

    Raises:
        ValueError: the file is damaged or truncated, or holds no tensor.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        start = file.read(8)
        if start == b"version ":
            raise ValueError(f"{path}: is a pointer of Git LFS, expected weights: run git lfs pull")
        try:
            # Checks the header, and that the tensors cover the file without a gap.
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{path}: is damaged or incomplete: {error}: {REMEDY}") from error
        text = file.read(int.from_bytes(start, "little"))
    repeated: list[str] = []

    def once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        repeated.extend(name for name, count in Counter(n for n, _ in pairs).items() if count > 1)
        return dict(pairs)

    header: Mapping[str, Any] = json.loads(text, object_pairs_hook=once)
    if repeated:
        raise ValueError(f"{path}: is damaged: its header has {listed(repeated)} twice: {REMEDY}")
    tensors = {
        name: Header(entry["dtype"], tuple(entry["shape"]), path)
        for name, entry in header.items()
        if name != "__metadata__"
    }
    if not tensors:
        raise ValueError(f"{path}: holds no tensor: {REMEDY}")
    return tensors


def size_bytes(headers: Mapping[str, Header]) -> int:
    """Return the bytes of the files that hold the tensors."""
    return sum(file.stat().st_size for file in {header.file for header in headers.values()})


def values(headers: Mapping[str, Header]) -> int:
    """Return the number of values of all tensors."""
    return sum(math.prod(header.shape) for header in headers.values())


def listed(names: Sequence[str]) -> str:
    """Return the first names and the number of the others."""
    rest = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {rest} more" if rest > 0 else "")
