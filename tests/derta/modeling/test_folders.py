"""Damaged model folders: each of many seeded damages ends in one sentence that names a file.

Damages of values alone are left out: a folder without checksums cannot show them.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from derta.cli import main
from derta.manifest import write_manifest
from derta.modeling.folders import file_headers
from derta.modeling.loading import CLASSIFIER, load_model, load_tuned
from tiny import ARCHITECTURES, tiny_model, tiny_tokenizer

PROMISE = (
    "A damaged or mismatched model folder is refused by name, and never trained with random "
    "weights."
)
Damage = Callable[[Path], object]
WEIGHTS, ADAPTERS = "model.safetensors", "adapter_model.safetensors"
SHARD, INDEX = "model-00002-of-00004.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make whole folders: a model in one file and in shards, adapters, and a wider model."""
    root = tmp_path_factory.mktemp("good")
    model = tiny_model("llama")
    model.save_pretrained(root / "model")
    model.save_pretrained(root / "shards", max_shard_size="32kB")
    tiny_model("llama", hidden_size=48, vocab_size=300).save_pretrained(root / "wide")
    model.name_or_path = str(root / "model")
    settings = LoraConfig(task_type="CAUSAL_LM", r=4, modules_to_save=["lm_head"])
    get_peft_model(model, settings).save_pretrained(root / "adapters")
    for folder in root.iterdir():
        tiny_tokenizer().save_pretrained(folder)
    assert len(list((root / "shards").glob("model-0000*-of-00004.safetensors"))) == 4
    return root


def edit(name: str, **changes: Any) -> Damage:
    """Return a damage that changes keys of a JSON file; `...` takes one out."""

    def damage(folder: Path) -> None:
        values = json.loads((folder / name).read_text()) | changes
        kept = {key: value for key, value in values.items() if value is not ...}
        (folder / name).write_text(json.dumps(kept))

    return damage


def write(name: str, text: str) -> Damage:
    return lambda folder: (folder / name).write_text(text)


def remove(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def tensors(name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def damage(folder: Path) -> None:
        held = load_file(folder / name)
        change(held)
        save_file(held, folder / name, {"format": "pt"})

    return damage


def flip(name: str, seed: int) -> Damage:
    """Return a damage that flips one bit of a header, or of its length."""

    def damage(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        place = random.Random(seed).randrange(8 + int.from_bytes(data[:8], "little"))
        data[place] ^= 1 << random.Random(seed).randrange(8)
        (folder / name).write_bytes(data)

    return damage


def truncate(name: str, share: float) -> Damage:
    def damage(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * share)])

    return damage


def header(name: str, change: Callable[[str], str]) -> Damage:
    """Return a damage that rewrites the text of a header."""

    def damage(folder: Path) -> None:
        data = (folder / name).read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        text = change(data[8:end].decode()).encode()
        (folder / name).write_bytes(len(text).to_bytes(8, "little") + text + data[end:])

    return damage


def swap(name: str, source: str) -> Damage:
    """Return a damage that takes a file of another folder."""
    return lambda folder: shutil.copy(folder.parent.parent / "good" / source, folder / name)


def weight_damages(name: str) -> Iterator[tuple[str, Damage]]:
    """Yield what any safetensors file may suffer."""
    for seed in range(14):
        yield f"{name}: bit {seed}", flip(name, seed)
    for share in (0.0, 0.0001, 0.01, 0.5, 0.999):
        yield f"{name}: {share} of it", truncate(name, share)
    yield f"{name}: longer", lambda at: (at / name).open("ab").write(b"\0" * 64)
    yield f"{name}: text", write(name, "not weights")
    yield f"{name}: no tensor", lambda at: save_file({}, at / name)
    lfs = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n"
    yield f"{name}: Git LFS", write(name, lfs)
    yield f"{name}: integers", header(name, lambda text: text.replace('"F32"', '"I32"'))
    yield f"{name}: twice", header(name, doubled)
    yield f"{name}: absent", remove(name)
    yield f"{name}: pickle", lambda at: (at / name).rename(at / "pytorch_model.bin")


def doubled(text: str) -> str:
    """Write the first tensor's entry twice."""
    first = next(key for key in json.loads(text) if key != "__metadata__")
    return text.rstrip()[:-1] + f', "{first}": {json.dumps(json.loads(text)[first])}' + "}"


def tensor_damages(name: str, names: list[str]) -> Iterator[tuple[str, Damage]]:
    """Yield a file without each of its tensors, and some renamed, cut or added."""
    for one in names:
        yield f"{name}: without {one}", tensors(name, lambda held, n=one: held.pop(n))
    for one in names[::5]:
        yield (
            f"{name}: {one} renamed",
            tensors(name, lambda held, n=one: held.update({n.replace("e", "E"): held.pop(n)})),
        )
        yield (
            f"{name}: {one} cut",
            tensors(name, lambda held, n=one: held.update({n: held[n][1:].clone()})),
        )
    yield f"{name}: one more", tensors(name, lambda held: held.update(more=torch.zeros(2)))


CONFIG = [
    *({"hidden_size": value} for value in ("x", None, 0, -1, 33, 64, 10**30)),
    *({"num_hidden_layers": value} for value in (-1, 0, 1, 3, 1.5, 10**9)),
    *({"num_attention_heads": value} for value in (0, -4, 5, "4")),
    *({"num_key_value_heads": value} for value in (0, 3, 1)),
    *({"vocab_size": value} for value in (0, 399, 401, 2**62)),
    {"intermediate_size": 49},
    {"hidden_act": "none"},
    {"rope_parameters": 5},
    {"rms_norm_eps": "a"},
    {"pad_token_id": 10**6},
    *({"model_type": value} for value in (..., 5, "none", "t5", "qwen2", "gemma2", "mixtral")),
    {"attention_bias": True},
    {"dtype": "floats"},
    {"quantization_config": 5},
    {"transformers_weights": "pytorch_model.bin"},
]
BROKEN = ("", "[]", '"x"', "5", "null", '{"a":', "\udcff", "[" * 100_000)


def json_damages(*names: str) -> Iterator[tuple[str, Damage]]:
    for name in names:
        for text in BROKEN:
            data = text.encode(errors="surrogateescape")
            yield f"{name}: {text[:9]!r}", lambda at, n=name, d=data: (at / n).write_bytes(d)


def model_damages() -> Iterator[tuple[str, Damage]]:
    yield from weight_damages(WEIGHTS)
    yield from tensor_damages(WEIGHTS, sorted(tiny_model("llama").state_dict()))
    yield from json_damages("config.json", "generation_config.json", "tokenizer.json")
    yield from json_damages("tokenizer_config.json")
    for change in CONFIG:
        yield f"config.json: {change}", edit("config.json", **change)
    for ids in ("x", [1, "x"], 1.5, {}):
        change = {"eos_token_id": ids}
        yield f"generation_config.json: {change}", edit("generation_config.json", **change)
    for text in ("{}", '{"version": "1.0", "model": {"type": "none"}, "added_tokens": []}'):
        yield f"tokenizer.json: {text}", write("tokenizer.json", text)
    yield "tokenizer.json: no vocabulary", edit("tokenizer.json", model={"type": "BPE"})
    yield "tokenizer.json: cut", truncate("tokenizer.json", 0.7)
    yield "tokenizer.json: absent", remove("tokenizer.json")
    yield "tokenizer.json: an empty vocabulary instead", empty_tokenizer
    yield "tokenizer.json: larger than the head", larger_tokenizer
    yield "config.json: absent", remove("config.json")
    for name in ("config.json", WEIGHTS):
        yield f"{name}: of a wider model", swap(name, f"wide/{name}")
    yield f"{WEIGHTS}: of adapters", swap(WEIGHTS, f"adapters/{ADAPTERS}")
    yield f"{INDEX}: of another model", swap(INDEX, f"shards/{INDEX}")
    yield "adapter_config.json: left over", swap("adapter_config.json", "wide/config.json")


def empty_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')


def larger_tokenizer(folder: Path) -> None:
    values = json.loads((folder / "tokenizer.json").read_text())
    values["model"]["vocab"]["zzz"] = 400
    (folder / "tokenizer.json").write_text(json.dumps(values))


def shard_damages() -> Iterator[tuple[str, Damage]]:
    yield from list(weight_damages(SHARD))[10:]
    yield from json_damages(INDEX)
    for places in ({}, [], {"a": 5}, {"a": "../model.safetensors"}, {"a": "pytorch_model.bin"}):
        yield f"{INDEX}: weight_map {places}", edit(INDEX, weight_map=places)
    yield f"{SHARD}: a copy of the first", swap(SHARD, "shards/model-00001-of-00004.safetensors")
    yield f"{SHARD}: of another model", swap(SHARD, f"wide/{WEIGHTS}")
    yield f"{INDEX}: one shard only", only_first
    yield f"{INDEX}: a tensor too many", add_place


def only_first(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    first = {key: file for key, file in index["weight_map"].items() if "00001" in file}
    edit(INDEX, weight_map=first)(folder)


def add_place(folder: Path) -> None:
    places = json.loads((folder / INDEX).read_text())["weight_map"]
    edit(INDEX, weight_map=places | {"model.more.weight": SHARD})(folder)


def adapter_damages(names: list[str]) -> Iterator[tuple[str, Damage]]:
    yield from weight_damages(ADAPTERS)
    yield from tensor_damages(ADAPTERS, names)
    yield from json_damages("adapter_config.json", "tokenizer_config.json")
    for change in (
        *({"r": value} for value in (-1, 0, 2, 8, "x")),
        *({"peft_type": value} for value in (..., "none", 5, "IA3")),
        *({"target_modules": value} for value in (["none"], ["k_proj"], 5)),
        *({"base_model_name_or_path": value} for value in (None, 5, "", "no/such/folder")),
        {"use_dora": True},
        {"lora_alpha": "x"},
        {"lora_dropout": 2},
    ):
        yield f"adapter_config.json: {change}", edit("adapter_config.json", **change)
    yield "adapter_config.json: a wider base", wider_base
    yield f"{ADAPTERS}: of a model", swap(ADAPTERS, f"model/{WEIGHTS}")


def wider_base(folder: Path) -> None:
    base = folder.parent.parent / "good" / "wide"
    edit("adapter_config.json", base_model_name_or_path=str(base))(folder)


def says_the_same(damaged: Path, good: Path) -> bool:
    """Return True if the weights' files hold the same tensors, so that nothing is wrong."""
    for path in good.glob("*.safetensors"):
        try:
            file_headers(damaged / path.name)
            held = load_file(damaged / path.name)
        except (OSError, ValueError):
            return False
        whole = load_file(path)
        if held.keys() != whole.keys() or any(
            not torch.equal(held[name], whole[name]) for name in whole
        ):
            return False
    return True


@pytest.mark.promise(PROMISE)
@pytest.mark.parametrize("kind", ["model", "shards", "adapters"])
def test_every_damage_of_a_folder_ends_in_one_sentence_with_its_name(
    kind: str, good: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    (tmp_path / "good").symlink_to(good)
    damages = {
        "model": model_damages,
        "shards": shard_damages,
        "adapters": lambda: adapter_damages(sorted(load_file(good / "adapters" / ADAPTERS))),
    }[kind]()
    wrong, cases = [], 0
    for number, (name, damage) in enumerate(damages):
        folder = tmp_path / "damaged" / str(number)
        shutil.copytree(good / kind, folder)
        damage(folder)
        cases += 1
        try:
            load_tuned(folder, torch.float32, None)
        except (OSError, ValueError) as error:
            if not str(error).startswith(str(tmp_path)) or "\n" in str(error):
                wrong.append(f"{name}: {type(error).__name__}: {error}")
        else:
            if name.rpartition(" ")[0].endswith("bit") and says_the_same(folder, good / kind):
                cases -= 1
            else:
                wrong.append(f"{name}: accepted")
        shutil.rmtree(folder)
    assert not wrong, "\n".join(wrong)
    record_property("cases", cases)


def of_integers(folder: Path) -> None:
    header(ADAPTERS, lambda text: text.replace('"F32"', '"I32"'))(folder)


MESSAGES: list[tuple[str, Damage, str]] = [
    ("model", write(WEIGHTS, "version https://"), f"/{WEIGHTS}: is a pointer of Git LFS, expected"),
    ("model", header(WEIGHTS, doubled), "is damaged: its header has lm_head.weight twice: copy or"),
    ("model", lambda at: save_file({}, at / WEIGHTS), f"/{WEIGHTS}: holds no tensor: copy or down"),
    (
        "model",
        header(WEIGHTS, lambda text: text.replace('"F32"', '"I32"')),
        f"/{WEIGHTS}: lm_head.weight is of I32, expected floating-point weights$",
    ),
    ("model", truncate(WEIGHTS, 0.9), f"/{WEIGHTS}: is damaged or incomplete: .*: copy or downl"),
    ("model", remove(WEIGHTS), ": has no model.safetensors$"),
    (
        "model",
        lambda at: (at / WEIGHTS).rename(at / "pytorch_model.bin"),
        "; pytorch_model.bin is a pickle, which is never read: convert it to safetensors$",
    ),
    ("model", write(INDEX, "{}"), f": has {WEIGHTS} and {INDEX}, expected one of them: remove"),
    ("shards", edit(INDEX, weight_map=[]), r"weight_map must map tensors to files, got \[\]$"),
    ("shards", edit(INDEX, weight_map={"a": "../b"}), "places a in '../b', expected a safetensors"),
    ("shards", remove(SHARD), f"/{SHARD}: no such file, which {INDEX} names: copy or download it"),
    (
        "shards",
        swap(SHARD, "shards/model-00001-of-00004.safetensors"),
        f"{SHARD}: holds .*, which model-00001-of-00004.safetensors holds too, expected every ten",
    ),
    ("shards", add_place, f"/{SHARD}: lacks model.more.weight, which {INDEX} places there: copy"),
    ("model", write("config.json", "[1]"), r"/config.json: expected a JSON object, got \[1\]$"),
    (
        "model",
        write("config.json", "{"),
        "/config.json: is damaged, expected JSON: .* at line 1, ",
    ),
    (
        "model",
        lambda at: (at / "config.json").write_bytes(b"\xff"),
        "/config.json: is damaged, expected UTF-8: invalid start byte at byte 0$",
    ),
    (
        "model",
        write("config.json", "[" * 100_000),
        "config.json: is damaged, expected JSON: .*re",
    ),
    (
        "model",
        edit("config.json", model_type="x"),
        "model_type is 'x', expected an architecture",
    ),
    ("model", edit("config.json", transformers_weights="x"), "has transformers_weights, expected"),
    ("model", edit("config.json", head_dim=0), "config.json cannot be loaded: head_dim must be at"),
    (
        "model",
        edit("config.json", num_hidden_layers=5000),
        "num_hidden_layers must be at most 409",
    ),
    (
        "model",
        edit("config.json", num_key_value_heads=3),
        "be a multiple of num_key_value_heads",
    ),
    ("model", edit("config.json", hidden_act="x"), "config.json cannot be loaded: KeyError: 'x'$"),
    (
        "model",
        edit("generation_config.json", eos_token_id="x"),
        "eos_token_id must be a token id or a list of them, got 'x'$",
    ),
    ("model", empty_tokenizer, "expected one of tokenizer.json, tokenizer.model, got none$"),
    ("model", larger_tokenizer, "gives 'zzz' the id 400, expected ids below 400, the model's voc"),
    ("adapters", edit("adapter_config.json", peft_type=5), "peft_type is 5, expected a method of"),
    (
        "adapters",
        edit("adapter_config.json", base_model_name_or_path=None),
        "is None, expected a",
    ),
    ("adapters", of_integers, "lm_head.weight is of I32, expected floating-point weights$"),
    (
        "adapters",
        edit("adapter_config.json", r=2),
        "does not fit adapter_config.json and the base model .* has shape .4, 32., expected .2, 3",
    ),
]


@pytest.mark.parametrize(("kind", "damage", "said"), MESSAGES, ids=[said for *_, said in MESSAGES])
def test_the_sentence_says_what_is_wrong(
    kind: str, damage: Damage, said: str, good: Path, tmp_path: Path
) -> None:
    (tmp_path / "good").symlink_to(good)
    folder = tmp_path / "damaged" / "0"
    shutil.copytree(good / kind, folder)
    damage(folder)
    with pytest.raises((OSError, ValueError), match=said):
        load_tuned(folder, torch.float32, None)


def test_a_model_of_the_hub_is_checked_once_it_is_loaded(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its headers are not read before. transformers is silent about what it draws at random."""
    monkeypatch.setattr("derta.modeling.loading.check_weights", lambda *_: None)
    folder = tmp_path / "model"
    shutil.copytree(good / "model", folder)
    load_model(str(folder), torch.float32)
    tensors(WEIGHTS, lambda held: held.update({"lm_head.weight": torch.zeros(399, 32)}))(folder)
    with pytest.raises(ValueError, match=r"lm_head.weight has shape \(399, 32\), expected \(400"):
        load_model(str(folder), torch.float32)


@pytest.mark.promise(PROMISE)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_whole_folders_of_every_architecture_are_accepted_and_incomplete_ones_are_not(
    architecture: str, tmp_path: Path
) -> None:
    """Tied heads and merged experts are no faults; a missing expert is."""
    model = tiny_model(architecture)
    model.save_pretrained(tmp_path, max_shard_size="40kB")
    loaded = load_model(str(tmp_path), torch.float32)
    for (name, one), other in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(one, other), name
    shard = sorted(tmp_path.glob("*.safetensors"))[-1].name
    lost = next(iter(load_file(tmp_path / shard)))
    tensors(shard, lambda held: held.pop(lost))(tmp_path)
    index = tmp_path / INDEX
    if index.is_file():
        places = json.loads(index.read_text())["weight_map"]
        edit(INDEX, weight_map={key: at for key, at in places.items() if key != lost})(tmp_path)
    said = "its weights do not fit config.json: .* missing: use all files of one model$"
    if architecture == "mixtral":  # its experts are joined
        said = "the model cannot be loaded: model.layers.1.mlp.experts.* cannot be made of the file"
    with pytest.raises(ValueError, match=f"^{tmp_path}: {said}"):
        load_model(str(tmp_path), torch.float32)


def test_buffers_of_old_files_are_no_fault(good: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(good / "model", folder)
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    tensors(WEIGHTS, lambda held: held.update(old))(folder)
    load_model(str(folder), torch.float32)


def test_a_tied_head_needs_no_weight_and_an_untied_one_does(tmp_path: Path) -> None:
    tiny_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / WEIGHTS)
    load_model(str(tmp_path), torch.float32)
    edit("config.json", tie_word_embeddings=False)(tmp_path)
    with pytest.raises(ValueError, match="do not fit config.json: lm_head.weight missing: use all"):
        load_model(str(tmp_path), torch.float32)


def test_a_language_model_is_no_classifier_with_a_random_head(good: Path) -> None:
    folder = str(good / "model")
    with pytest.raises(ValueError, match="score.weight missing; lm_head.weight unexpected: use"):
        load_model(folder, torch.float32, kind=CLASSIFIER)


def test_special_tokens_that_no_chat_contains_may_lie_beyond_the_head(
    good: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(good / "model", folder)
    tokenizer = load_tuned(folder, torch.float32, None)[1]
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|picture|>"]})
    tokenizer.save_pretrained(folder)
    assert len(load_tuned(folder, torch.float32, None)[1]) == 401
    with pytest.raises(
        ValueError, match=r"gives '<\|picture\|>' the id 400, expected ids below 400"
    ):
        load_tuned(folder, torch.float32, "{{ messages }}<|picture|>")


RUNS = {
    "train": "--sources {path:~rows.jsonl,~role:~safety} --output_dir out --use_cpu --max_steps 1",
    "eval": "--harmful rows.jsonl --output_dir out --max_new_tokens 1",
    "plan": "--gpu 8",
    "chat": "--device cpu",
    "merge": "--output_dir out",
    "doctor": "",
}
FAULTS: list[tuple[str, Damage, str, str]] = [
    ("model", tensors(WEIGHTS, lambda held: held.pop("lm_head.weight")), "train", "lm_head.weight"),
    (
        "model",
        edit("config.json", num_hidden_layers=1),
        "train eval chat doctor",
        "model.layers.1.",
    ),
    ("model", write("config.json", "[]"), "train eval plan chat doctor", "damaged/config.json: "),
    (
        "model",
        edit("config.json", num_attention_heads=0),
        "train plan doctor",
        "config.json cannot",
    ),
    ("model", write("tokenizer.json", "{}"), "train chat doctor", "the tokenizer cannot be loaded"),
    ("model", truncate(WEIGHTS, 0.5), "train eval doctor", f"damaged/{WEIGHTS}: is damaged"),
    ("model", remove("config.json"), "train plan doctor", "config.json"),
    ("shards", remove(SHARD), "train doctor", f"damaged/{SHARD}: no such file, which"),
    ("adapters", edit("adapter_config.json", r=2), "merge chat doctor", "has shape (4, 32), expec"),
    ("adapters", write("adapter_config.json", "[]"), "merge eval doctor", "expected a JSON object"),
    ("adapters", remove(ADAPTERS), "merge doctor", "adapters without adapter_model.safetensors"),
    ("adapters", lambda folder: None, "train plan", "damaged: holds adapters, expected a whole mo"),
    (
        "model",
        write("trainer_state.json", "{"),
        "eval doctor",
        "damaged/trainer_state.json: is dam",
    ),
    (
        "model",
        write("trainer_state.json", "{}"),
        "doctor",
        "global_step and max_steps must be whole",
    ),
    (
        "model",
        write("trainer_state.json", '{"log_history": 5}'),
        "eval",
        "log_history must be a lis",
    ),
]


@pytest.mark.promise(PROMISE)
def test_commands_end_with_the_sentence_and_write_nothing(
    good: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    record_property: Callable[[str, object], None],
) -> None:
    monkeypatch.chdir(tmp_path)
    row = {"prompt": "How?", "safe": "Sorry, no.", "harmful": "Step one, step two."}
    Path("rows.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    cases = 0
    for kind, damage, commands, said in FAULTS:
        shutil.copytree(good / kind, "damaged")
        damage(Path("damaged"))
        for command in commands.split():
            named = (
                ["damaged"] if command in ("chat", "merge", "doctor") else ["--model", "damaged"]
            )
            options = [part.replace("~", " ") for part in RUNS[command].split()]
            capsys.readouterr()
            assert main([command, *named, *options]) == 1, (command, said)
            told = capsys.readouterr().err
            assert told.startswith(f"derta {command}: damaged"), told
            assert said in told and told.count("\n") == 1, told
            assert not Path("out").exists()
            cases += 1
        shutil.rmtree("damaged")
    record_property("cases", cases)


def test_doctor_says_what_a_folder_is(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(folder: Path) -> list[str]:
        assert main(["doctor", str(folder)]) == 0
        return capsys.readouterr().out.splitlines()

    size = (good / "model" / WEIGHTS).stat().st_size
    model = f"LlamaForCausalLM, 41,120 parameters, F32, {size / 1e6:.1f} MB in 1 file"
    tokenizer = "tokenizer   400 tokens, a chat template"
    assert told(good / "model") == [f"model       {model}", tokenizer]
    assert told(good / "shards")[0].endswith("MB in 4 files")
    adapters, base, _ = told(good / "adapters")
    assert adapters.startswith("adapters    LORA of rank 4, ") and ", F32, " in adapters
    assert base == f"base model  {good / 'model'}: {model}"
    checkpoint = tmp_path / "checkpoint-2"
    shutil.copytree(good / "model", checkpoint)
    (checkpoint / "trainer_state.json").write_text('{"global_step": 2, "max_steps": 30}')
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (checkpoint / name).unlink()
    assert told(checkpoint)[1:] == ["tokenizer   none", "training    step 2 of 30"]
    for trained, said in (
        (5, "{0!r} (id 5)"),
        ([5, 6], "a set of 2 tokens: {0!r} (id 5), {1!r} (id 6)"),
    ):
        tuned = tmp_path / f"tuned-{said[:1]}"
        shutil.copytree(good / "model", tuned)
        write_manifest(tuned, "model", run={"refusal token": trained})
        texts = [tiny_tokenizer().decode([id]) for id in (5, 6)]
        assert told(tuned)[-1] == f"refusal     {said.format(*texts)}"
    assert main(["doctor", str(tmp_path)]) == main(["doctor", "none"]) == 1
    empty, absent = capsys.readouterr().err.splitlines()
    assert empty == f"derta doctor: {tmp_path}: holds no model, expected config.json or " + (
        "adapter_config.json in it"
    )
    assert absent == "derta doctor: none: no such folder"
