"""A folder with a manifest is what was written, or is refused by the name of the file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from derta.cli import main
from derta.manifest import COMPLETE, MANIFEST, DamagedError, read_manifest, verify, write_manifest
from derta.modeling.loading import load_tuned
from tiny import tiny_model, tiny_tokenizer

SEEN = "One flipped bit in the weights of a tuned or merged model is seen before it is used."


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "optimizer_0").mkdir()
    (folder / "optimizer_0" / "states").write_text("states")
    write_manifest(folder, "model", step=3, finished=True)
    return folder


def flip_last_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_a_manifest_is_read_as_it_was_written(folder: Path) -> None:
    manifest = verify(folder)
    assert manifest == read_manifest(folder)
    assert (manifest.kind, manifest.step, manifest.finished) == ("model", 3, True)
    assert set(manifest.files) >= {"model.safetensors", "config.json", "optimizer_0/states"}
    assert manifest.size == sum(
        path.stat().st_size
        for path in folder.rglob("*")
        if path.is_file() and path.name != MANIFEST
    )


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"files": 1, "sha256": "0"}', "not JSON", "[" * 100_000]
)
def test_a_manifest_of_another_shape_is_damaged(folder: Path, text: str) -> None:
    (folder / MANIFEST).write_text(text)
    with pytest.raises(DamagedError, match=r"manifest.json: damaged, it is not the manifest that"):
        verify(folder)


@pytest.mark.promise(SEEN)
@pytest.mark.parametrize("name", ["model.safetensors", "adapter_model.safetensors"])
def test_a_flipped_bit_in_a_model_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    tuned = folder
    if name.startswith("adapter"):
        tuned = tmp_path / "adapters"
        model = tiny_model("llama")
        model.name_or_path = str(folder)
        get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2)).save_pretrained(tuned)
        write_manifest(tuned, "adapters")
    load_tuned(tuned, torch.float32, None)
    flip_last_bit(tuned / name)
    message = rf"{name}: damaged, its SHA-256 is not .*: copy or save it again; if it was changed"
    with pytest.raises(ValueError, match=message):
        load_tuned(tuned, torch.float32, None)
    (tuned / MANIFEST).unlink()
    load_tuned(tuned, torch.float32, None)


def test_a_model_needs_no_states_of_its_run(folder: Path) -> None:
    """A checkpoint without its optimizer is a model as good as any."""
    shutil.rmtree(folder / "optimizer_0")
    (folder / "optimizer.pt").touch()
    load_tuned(folder, torch.float32, None)
    with pytest.raises(DamagedError, match=r"optimizer_0/states: missing, manifest.json names it"):
        verify(folder)


def test_a_model_that_was_being_saved_names_the_remedy(folder: Path) -> None:
    (folder / COMPLETE).mkdir()
    with pytest.raises(ValueError, match="its run was killed while it saved this model: start"):
        load_tuned(folder, torch.float32, None)


def test_doctor_says_whether_a_folder_is_whole(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", str(folder)]) == 0
    assert "whole       model of step 3, the end of its run, " in capsys.readouterr().out
    flip_last_bit(folder / "optimizer_0" / "states")
    assert main(["doctor", str(folder)]) == 1
    assert "optimizer_0/states: damaged, its SHA-256 is not" in capsys.readouterr().err
    for path in folder.glob("*"):
        if path.name not in (MANIFEST, "optimizer_0"):
            path.unlink()
    (folder / MANIFEST).unlink()
    write_manifest(folder, "checkpoint", step=4)  # a sharded one has no configuration
    assert main(["doctor", str(folder)]) == 0
    assert "whole       checkpoint of step 4, 1 files, " in capsys.readouterr().out
    assert json.loads((folder / MANIFEST).read_text())["kind"] == "checkpoint"
