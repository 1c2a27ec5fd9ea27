"""A safetensors file that is filled tensor by tensor and never lies in memory as a whole."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor


class TensorFile:
    """A safetensors file, byte for byte what `safetensors.torch.save_file` writes, once filled.

    Args:
        path: path of the file; one that is there is replaced.
        tensors: its future tensors by name. Only shapes and dtypes are read.
        metadata: texts of its header.
    """

    def __init__(
        self, path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
    ) -> None:
        # safetensors orders tensors and names dtypes; without values it writes a header only.
        empty = save({name: torch.empty(0, dtype=one.dtype) for name, one in tensors.items()})
        header: dict[str, Any] = {"__metadata__": dict(metadata)}
        start = 0
        for name, entry in json.loads(empty[8:]).items():
            end = start + tensors[name].nbytes
            shape = list(tensors[name].shape)
            header[name] = {"dtype": entry["dtype"], "shape": shape, "data_offsets": [start, end]}
            start = end
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._tensors = dict(tensors)
        self._header = header
        self._start = 8 + len(text)
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.truncate(self._start + start)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor to its place.

        Args:
            name: its name.
            tensor: on the CPU, of the shape and dtype that were announced.
        """
        announced = self._tensors[name]
        assert (tensor.shape, tensor.dtype) == (announced.shape, announced.dtype), name
        self._file.seek(self._start + self._header[name]["data_offsets"][0])
        self._file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        with self._file:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())
