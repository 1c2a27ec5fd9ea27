"""Shards are read one weight at a time, and their description runs no code."""

from __future__ import annotations

import pathlib
import pickle
import sys
import warnings
from enum import Enum
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

from derta.modeling.folders import SHARDS
from derta.modeling.sharded_checkpoint import DESCRIPTION, sharded_weights
from tiny import tiny_model


def by_getattr(member: Enum, protocol: int) -> object:
    return getattr, (type(member), member.name)


@pytest.fixture(params=["", "3.11.2", "3.13"])
def model(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> nn.Module:
    """Save a model in shards, described as that release of Python pickles."""
    made = tiny_model("llama", dtype=torch.bfloat16)
    with monkeypatch.context() as patch, warnings.catch_warnings(action="ignore"):
        if request.param == "3.11.2":
            patch.setattr(_MEM_FORMAT_ENCODING, "__reduce_ex__", by_getattr)
        elif request.param == "3.13":
            patch.setitem(sys.modules, "pathlib._local", pathlib)
            patch.setattr(type(tmp_path), "__module__", "pathlib._local")
        dcp.save({"model": made.state_dict()}, checkpoint_id=tmp_path / SHARDS, no_dist=True)
    return made


def test_each_weight_is_read_by_itself(tmp_path: Path, model: nn.Module) -> None:
    weights, fetch = sharded_weights(tmp_path, model)
    assert weights.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert weights[name].is_meta
        assert torch.equal(fetch(name), value)


class Intruder:
    def __reduce__(self) -> object:
        return Path.touch, (Path("ran"),)


# Path.touch(Path("ran")), with the function as an attribute.
BY_ATTRIBUTE = b"cbuiltins\ngetattr\n(cpathlib\nPath\nVtouch\ntR(cpathlib\nPath\n(Vran\ntRtR."


def test_a_foreign_description_is_refused_and_runs_nothing(
    tmp_path: Path, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / SHARDS / DESCRIPTION
    foreign = (pickle.dumps(Intruder()), pickle.dumps([1]))
    for content in (*foreign, b"", path.read_bytes()[:-20]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is not the description of a checkpoint"):
            sharded_weights(tmp_path, model)
    path.write_bytes(BY_ATTRIBUTE)
    with pytest.raises(ValueError, match="it names touch of what is no enumeration"):
        sharded_weights(tmp_path, model)
    assert not Path("ran").exists()


def test_shards_of_another_model_are_refused(tmp_path: Path, model: nn.Module) -> None:
    with pytest.raises(ValueError, match="lacks model.embed_tokens.weight, lm_head.weight of the"):
        sharded_weights(tmp_path, tiny_model("llama", vocab_size=500))
