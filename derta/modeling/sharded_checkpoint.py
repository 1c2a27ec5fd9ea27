"""The weights in a sharded checkpoint of FSDP, read one by one in one process.

Its description is a pickle. It is read by names of the few classes that belong in it, and nothing
else in it is looked up, so that no code of it runs.
"""

from __future__ import annotations

import pickle
import warnings
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from derta.modeling.folders import SHARDS, listed
from derta.modeling.streaming import Fetch

DESCRIPTION = ".metadata"
# Modules and the classes in them that PyTorch's description of a checkpoint consists of.
KNOWN = {
    "torch": {"Size", *(name for name, one in vars(torch).items() if isinstance(one, torch.dtype))},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "pathlib": {"Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"},
}


class _Description(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "pathlib._local":  # where Python 3.13 has the classes of pathlib
            module = "pathlib"
        if (module, name) == ("builtins", "getattr"):  # of an Enum, in Python 3.11's first releases
            return _member
        if name not in KNOWN.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


def _member(of: Any, name: str) -> Enum:
    if not (isinstance(of, type) and issubclass(of, Enum)):
        raise pickle.UnpicklingError(f"it names {name} of what is no enumeration")
    return of[name]


class _Reader(dcp.FileSystemReader):
    """PyTorch's reader, with a description that has been read already."""

    def __init__(self, folder: Path, description: Metadata) -> None:
        super().__init__(folder)
        self._description = description

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        return self._description


def sharded_weights(checkpoint: Path, model: nn.Module) -> tuple[dict[str, Tensor], Fetch]:
    """Return the weights of a checkpoint without storage, by name, and how to read one.

    Args:
        checkpoint: the folder of a checkpoint, verified by its manifest.
        model: the model that its configuration describes.

    Raises:
        ValueError: the checkpoint's description holds anything but what PyTorch writes there, or
            its weights are not the model's.
    """
    folder = checkpoint / SHARDS
    path = folder / DESCRIPTION
    try:
        with path.open("rb") as file:
            description = _Description(file).load()
        held = description.state_dict_metadata
    except (pickle.UnpicklingError, AttributeError, EOFError, TypeError) as error:
        raise ValueError(
            f"{path}: is not the description of a checkpoint that PyTorch writes: {error}"
        ) from error
    weights = {
        name.removeprefix("model."): torch.empty(
            one.size, dtype=one.properties.dtype, device="meta"
        )
        for name, one in held.items()
        if isinstance(one, TensorStorageMetadata)
    }
    expected = dict(model.named_parameters())
    if misfits := [
        name
        for name, one in expected.items()
        if name not in weights or weights[name].shape != one.shape
    ]:
        raise ValueError(f"{folder}: lacks {listed(misfits)} of the shape that its model has")

    def fetch(name: str) -> Tensor:
        value = torch.empty_like(weights[name], device="cpu")
        with warnings.catch_warnings(action="ignore"):  # that there are no other processes
            reader = _Reader(folder, description)
            dcp.load({"model": {name: value}}, storage_reader=reader, no_dist=True)
        return value

    return weights, fetch
