"""The memory of a step: the plan against torch's allocator, and the output of `derta plan`."""

from __future__ import annotations

import re
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama import modeling_llama

from allocated import peak_bytes
from benchmarks.plans import MODELS
from derta import apply_derta, derta_loss
from derta.cli import main
from derta.memory import StepMemory, StepSettings
from derta.memory.plan import GIB, Triples, describe, longest_pack, needed, turns
from derta.memory.probe import full_pack, probe, random_model
from derta.memory.step import FAR
from derta.memory.tracking import MemoryTracker
from derta.modeling.adapters import Method, adapt
from derta.modeling.liger import liger_layers
from derta.modeling.mlp_tiling import tile_mlp
from derta.modeling.patch import checkpoint_layers
from tiny import ARCHITECTURES, tiny_model

QLORA = pytest.param(
    "qlora", marks=pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="no bitsandbytes")
)
LIGER = pytest.mark.skipif(find_spec("liger_kernel") is None, reason="no Liger")
CPU = torch.device("cpu")
TOKENS = 1024
TINY = dict(
    vocab_size=2000,
    hidden_size=128,
    intermediate_size=352,
    num_hidden_layers=5,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=4096,
)


def allocated(step: StepSettings) -> int:
    """Return the peak bytes of a step's forward and backward pass on real tensors."""
    model = AutoModelForCausalLM.from_config(step.config, dtype=step.dtype)
    model.generation_config.use_cache = False
    adapted: Any = adapt(model, step.method)
    if step.checkpointing:
        checkpoint_layers(model)
    if step.mlp_tile is not None:
        tile_mlp(model, step.mlp_tile)
    head = dict(scratch_mb=step.scratch_mb, sparse_backward=step.sparse_backward)
    apply_derta(adapted, 1, **head).train()
    ids = torch.arange(TOKENS)[None] % 2000
    pack = dict(
        input_ids=ids,
        position_ids=torch.arange(TOKENS)[None],
        visible_until=torch.full((1, TOKENS), TOKENS, dtype=torch.int32),
        shift_labels=ids,
        rto_mask=torch.ones(1, TOKENS, dtype=torch.bool),
    )

    def backward() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=step.autocast):
            loss = adapted(**pack).loss
        loss.backward()

    with liger_layers(model) if step.liger else nullcontext():
        backward()
        tensors = {p.data_ptr(): p for p in adapted.parameters()}.values()
        held = sum(p.nbytes + (0 if p.grad is None else p.grad.nbytes) for p in tensors)
        return held + peak_bytes(backward)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", dict()),
        ("llama", dict(checkpointing=True)),
        ("llama", dict(checkpointing=True, mlp_tile=128)),
        ("llama", dict(checkpointing=True, autocast=True)),
        ("llama", dict(checkpointing=True, scratch_mb=1.0, sparse_backward=1e-3)),
        ("llama", dict(checkpointing=True, dtype=torch.bfloat16)),
        ("llama", dict(method=Method(method="lora"))),
        ("llama", dict(method=Method(method="lora", lora_dropout=0.0), checkpointing=True)),
        ("qwen2", dict(method=Method(method="lora"), checkpointing=True)),
        ("gpt_neox", dict(checkpointing=True)),
        pytest.param("llama", dict(liger=True, checkpointing=True), marks=LIGER),
        pytest.param("qwen2", dict(liger=True, mlp_tile=128), marks=LIGER),
    ],
    ids=str,
)
def test_the_plan_is_within_a_tenth_of_the_allocated_memory(
    family: str, options: dict[str, Any]
) -> None:
    tied = {"tie_word_embeddings": True} if family == "qwen2" else {}
    heads = {"num_key_value_heads": None} if family == "gpt_neox" else {}
    settings = {key: value for key, value in {**TINY, **tied, **heads}.items() if value is not None}
    config = AutoConfig.for_model(family, **settings)
    step = StepSettings(
        config=config, optim="sgd", device_type="cpu", **{"dtype": torch.float32} | options
    )
    assert StepMemory(step).peak(TOKENS).total() == pytest.approx(allocated(step), rel=0.1)


def test_memory_is_counted_by_part() -> None:
    tracker = MemoryTracker(
        lambda name: "products" if name == "aten::mm" else "rest",
        lambda name, *_: 1000 if name == "aten::mm" else 0,
    )
    with tracker:
        x = torch.ones(10, 10)
        y = x @ x
        with tracker.elsewhere():
            other = x * 2
        view = y[2:]
        del y
        assert tracker.now == {"rest": 400, "products": 400}  # the view keeps the whole storage
        del view, other
        tracker.count([x], "kept")
        assert tracker.now.total() == tracker.now["kept"] == 400
    assert tracker.peaks["products"] == {"rest": 400, "products": 1400}
    assert tracker.peaks["rest"] == {"rest": 400, "products": 400}


def test_offloading_leaves_two_checkpoints_on_the_device() -> None:
    """The two belong to the layer in computation and to the next one, which is being copied."""
    config = AutoConfig.for_model("llama", **TINY | dict(num_hidden_layers=12))
    tokens = 4096
    step = StepSettings(config=config, checkpointing=True, capacity=GIB)
    kept, offloaded = (
        StepMemory(replace(step, offload=offload)).peak(tokens) for offload in (False, True)
    )
    one = tokens * 128 * 2
    assert kept["checkpoints"] == 12 * one
    assert 0 < offloaded["checkpoints"] <= 2 * one
    assert kept.total() - offloaded.total() >= 10 * one
    triples = Triples(branches=1, rto_keep=1.0, prompt=40, safe=70)
    assert "offload_checkpoints: true" in describe(step, tokens, triples)


@LIGER
def test_ligers_layers_take_less_memory_and_leave_the_family_unchanged() -> None:
    before = dict(vars(modeling_llama))
    config = AutoConfig.for_model("llama", **TINY | dict(intermediate_size=1408))
    step = StepSettings(config=config, optim="sgd", device_type="cpu", checkpointing=True)
    plain, liger = (StepMemory(replace(step, liger=liger)).peak(TOKENS) for liger in (False, True))
    assert liger.total() < 0.9 * plain.total()
    assert vars(modeling_llama) == before


def test_settings_together_save_more_than_any_one() -> None:
    config = AutoConfig.for_model("llama", **TINY)
    step = StepSettings(config=config, checkpointing=True, optim="sgd", capacity=GIB)
    said = describe(step, 32_768, Triples(branches=1, rto_keep=1.0, prompt=40, safe=70))
    before, together = map(float, re.findall(r"takes ([\d.]+) GiB", said))
    saved = [float(size) for size in re.findall(r"^  \w+: \w+ +([\d.]+) GiB", said, re.M)]
    assert len(saved) >= 2 and together <= before - max(saved) - 0.02
    tokens = re.findall(r"(?:fits has|packs of) ([\d,]+) tokens(?: fit)?[:\n]", f"{said}\n")
    longest, longest_together = (int(number.replace(",", "")) for number in tokens)
    assert longest_together > longest


def test_the_longest_pack_fits_and_a_longer_one_does_not() -> None:
    config = AutoConfig.for_model("llama", **TINY)
    triples = Triples(branches=1, rto_keep=1.0, prompt=40, safe=70)
    step = StepSettings(config=config, checkpointing=True, capacity=int(1.5 * GIB))
    memory = StepMemory(step)
    longest = longest_pack(memory, triples)
    assert needed(memory, longest, triples).total() <= step.capacity
    assert needed(memory, int(1.02 * longest), triples).total() > step.capacity
    assert longest_pack(StepMemory(StepSettings(config=config, capacity=GIB // 2)), triples) == 0


def test_the_memory_of_long_packs_is_extrapolated() -> None:
    memory = StepMemory(
        StepSettings(config=AutoConfig.for_model("llama", **TINY), checkpointing=True)
    )
    followed = memory.peak(40_000)
    memory.far = 40_000
    assert followed.total() == pytest.approx(memory.peak(40_000).total(), rel=1e-3)


def test_the_largest_part_may_change_with_the_packs_length(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    half = {"head": Counter(head=100), "layers": Counter(layers=10)}
    full = {"head": Counter(head=110), "layers": Counter(layers=60)}
    memory = StepMemory(StepSettings(config=AutoConfig.for_model("llama", **TINY), optim="sgd"))
    monkeypatch.setattr(memory, "_whole", lambda tokens, _: full if tokens == FAR else half)
    assert memory.peak(FAR) == Counter(head=110)
    assert memory.peak(3 * FAR) == Counter(layers=60 + 4 * 50)


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_every_family_runs_without_storage(family: str) -> None:
    config = tiny_model(family).config
    peak = StepMemory(StepSettings(config=config, checkpointing=True)).peak(256)
    assert peak["checkpoints"] == config.num_hidden_layers * 256 * config.hidden_size * 2


def test_impossible_settings_are_not_advised() -> None:
    triples = Triples(branches=1, rto_keep=1.0, prompt=40, safe=70)
    for family, advised in (("llama", True), ("mixtral", False)):
        config = tiny_model(family, hidden_size=64, intermediate_size=128).config
        said = describe(
            StepSettings(config=config, checkpointing=True, capacity=GIB), 4096, triples
        )
        assert "it fits" in said and "optim: adamw_8bit" in said
        assert ("mlp_tile: 1024" in said) == advised


def test_full_training_is_advised_of_both_lora_and_qlora() -> None:
    step = StepSettings(
        config=AutoConfig.for_model("llama", **TINY | dict(num_hidden_layers=1)),
        dtype=torch.float32,
        optim="sgd",
        checkpointing=True,
        offload=True,
        mlp_tile=2048,
        liger=True,
        device_type="cpu",
        capacity=GIB,
    )
    said = describe(step, 256, Triples(branches=0, rto_keep=1.0, prompt=40, safe=70))
    saved = re.findall(r"^  method: (\w+) +[\d.]+ GiB", said, re.M)
    assert saved == ["lora", "qlora"]
    assert "with all of them (method: qlora), a step takes" in said
    assert "with a prompt of 40;" in said  # no safe response follows


def test_a_red_flag_costs_a_reference_or_a_trained_head() -> None:
    step = StepSettings(config=AutoConfig.for_model("llama", **TINY), red_flag=True)
    peak = StepMemory(step).peak(128)
    assert peak["reference"] == pytest.approx(peak["weights"], rel=1e-3)
    plain = StepMemory(replace(step, red_flag=False)).peak(128)
    of_head = 4 * TINY["vocab_size"] * TINY["hidden_size"]  # the divergence has its own, in float32
    assert peak["head"] >= plain["head"] + of_head
    adapted = replace(step, method=Method(method="lora"))
    more = StepMemory(adapted).peak(128)
    assert "reference" not in more
    assert more.total() > StepMemory(replace(adapted, red_flag=False)).peak(128).total()
    assert "method: qlora" not in {**dict(turns(step)), **dict(turns(adapted))}


def test_bfloat16_weights_are_advised_only_for_frozen_ones() -> None:
    """Training in bfloat16 would lose small updates."""
    step = StepSettings(config=AutoConfig.for_model("llama", **TINY), dtype=torch.float32)
    assert "dtype: bfloat16" not in dict(turns(step))
    for method in ("lora", "qlora"):
        turn = dict(turns(replace(step, method=Method(method=method))))["dtype: bfloat16"]
        assert turn(step).dtype == torch.bfloat16


BILLIONS = {"Llama-3-8B": 8.030, "Qwen2.5-7B": 7.616, "Gemma-2-2B": 2.614}  # parameters


@pytest.mark.parametrize("name", MODELS)
def test_plans_of_known_models(name: str) -> None:
    config = AutoConfig.for_model(**MODELS[name])
    triples = Triples(branches=1, rto_keep=1.0, prompt=40, safe=70)
    step = StepSettings(config=config, method=Method(method="qlora"), checkpointing=True)
    memory, longest = StepMemory(step), []
    for gpu in (8, 16, 24):
        step.capacity = gpu * GIB
        longest.append(longest_pack(memory, triples))
    assert 0 < longest[0] < longest[1] < longest[2]
    weights = StepMemory(StepSettings(config=config)).peak(128)["weights"]
    assert weights / 2e9 == pytest.approx(BILLIONS[name], rel=1e-3)


def test_a_training_configuration_can_be_planned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    planned: list[StepSettings] = []
    monkeypatch.setattr("derta.cli.plan.describe", lambda step, *_: planned.append(step) or "")
    AutoConfig.for_model("llama", **TINY).save_pretrained(tmp_path)
    path = tmp_path / "run.yaml"
    path.write_text(
        "sources: {path: a, role: safety}\noutput_dir: b\nmethod: lora\nlora_r: 4\nmlp_tile: 9\n"
        "scratch_mb: 64\nsparse_backward: 0.01\nrefusal_tokens: [Sorry, I, 5]\n",
        encoding="utf-8",
    )
    assert main(["plan", str(path), "--model", str(tmp_path), "--gpu", "8"]) == 0
    (step,) = planned
    assert (step.method, step.mlp_tile) == (Method(method="lora", lora_r=4), 9)
    assert step.capacity == 8 * GIB
    assert (step.scratch_mb, step.sparse_backward, step.refusals) == (64, 0.01, 3)
    for extra, refusals in (("--refusal_tokens auto", 8), ("--preference simpo --rto_keep 0", 1)):
        options = ["--model", str(tmp_path), "--gpu", "8", *extra.split()]
        assert main(["plan", str(path), *options]) == 0
        assert planned[-1].refusals == refusals
    path.write_text("lora_rank: 4\n", encoding="utf-8")
    assert main(["plan", str(path), "--model", str(tmp_path), "--gpu", "8"]) == 1
    assert f"{path}: unknown key 'lora_rank'; did you mean 'lora_r'?" in capsys.readouterr().err


def test_a_set_of_refusal_tokens_is_counted_and_named() -> None:
    config = AutoConfig.for_model("llama", **TINY | dict(num_hidden_layers=2))
    alone, several = (
        StepSettings(config=config, capacity=GIB, device_type="cpu", refusals=refusals)
        for refusals in (1, 64)
    )
    triples = Triples(1, 0.5, 40, 70)
    added = needed(StepMemory(several), 1024, triples) - needed(StepMemory(alone), 1024, triples)
    rows = int(1024 * triples.live(1024))
    assert 0 < added["head"] <= 8 * rows * 64 * 4 and added.keys() == {"head"}
    assert "working memory of the head loss, with a set of 64 refusal tokens" in describe(
        several, 1024, triples
    )
    assert "refusal tokens" not in describe(alone, 1024, triples)
    assert "through random weights, forward and backward, runs" in probe(several, 300, triples, CPU)


@pytest.mark.parametrize("method", ["full", QLORA])
def test_a_config_is_enough_for_a_probe(method: Any) -> None:
    config = AutoConfig.for_model("llama", **TINY | dict(num_hidden_layers=2))
    step = StepSettings(
        config=config, method=Method(method=method), autocast=True, checkpointing=True, mlp_tile=128
    )
    said = probe(step, 300, Triples(2, 0.5, 40, 70), CPU)
    # Rows of the trunk predict both branches' first tokens.
    assert "probe: a pack of 298 tokens through random weights, forward and backward, runs" in said


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="no bitsandbytes")
@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize(("width", "inner"), [(32, 128), (40, 64), (64, 128)])
def test_qlora_of_any_width_can_be_probed_on_any_cpu(
    width: int, inner: int, packs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CPU packs weights for bitsandbytes or does not."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: packs)
    config = tiny_model("llama", hidden_size=width, intermediate_size=inner).config
    step = StepSettings(config=config, method=Method(method="qlora"), autocast=True)
    assert "forward and backward, runs" in probe(step, 200, Triples(2, 0.5, 40, 30), CPU)


LLAMAS = {  # by billions of parameters
    1: dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16),
    3: dict(hidden_size=3072, intermediate_size=8192, num_hidden_layers=28),
    8: dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32),
}


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="PyTorch sees no CUDA device whose memory a plan could be held against",
)
@pytest.mark.parametrize("liger", [False, pytest.param(True, marks=LIGER)])
@pytest.mark.parametrize(
    ("billions", "method"),
    [(1, "full"), (3, "lora"), (8, "lora"), pytest.param(8, "qlora", marks=QLORA.marks)],
)
def test_the_plan_is_within_a_tenth_of_a_gpus_allocated_memory(
    billions: int, method: Any, liger: bool
) -> None:
    config = AutoConfig.for_model(
        "llama",
        vocab_size=128256,
        num_attention_heads=24 if billions == 3 else 32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        **LLAMAS[billions],
    )
    step = StepSettings(
        config=config,
        method=Method(method=method),
        autocast=method != "full",
        checkpointing=True,
        liger=liger,
        capacity=torch.cuda.get_device_properties(0).total_memory,
    )
    said = probe(step, 8192, Triples(1, 1.0, 40, 70), torch.device("cuda", 0))
    took, planned = map(float, re.findall(r"(?:took|says) ([\d.]+)", said))
    assert planned == pytest.approx(took, rel=0.1)


@pytest.mark.parametrize(("tokens", "context"), [(300, 4096), (300, 128)])
def test_a_probed_pack_has_as_few_triples_as_the_context_allows(tokens: int, context: int) -> None:
    triples = Triples(branches=2, rto_keep=1.0, prompt=10, safe=20)
    batch = full_pack(tokens, triples, context)
    assert len(batch.example_ids) == (1 if context > tokens else 3)
    assert 0.97 * tokens < batch.input_ids.shape[1] <= tokens
    assert int(batch.position_ids.max()) < context


@pytest.mark.parametrize("method", ["lora", QLORA])
def test_random_weights_match_the_method(method: Any) -> None:
    config = AutoConfig.for_model("llama", **TINY | dict(num_hidden_layers=1))
    model: Any = random_model(config, Method(method=method), torch.bfloat16, CPU)
    fresh = AutoModelForCausalLM.from_config(config)
    for (name, buffer), (_, drawn) in zip(
        fresh.named_buffers(), model.named_buffers(), strict=True
    ):
        assert torch.equal(buffer, drawn), name
    assert float(model.lm_head.weight.std()) == pytest.approx(config.initializer_range, rel=0.1)
    layer = model.model.layers[0].mlp.up_proj
    assert (layer.weight.dtype == torch.uint8) == (method == "qlora")
    adapted: Any = adapt(model, Method(method=method))
    planned = StepMemory(StepSettings(config=config, method=Method(method=method))).peak(128)[
        "weights"
    ]
    held = {p.untyped_storage().data_ptr(): p.nbytes for p in adapted.parameters()}
    assert sum(held.values()) == pytest.approx(planned, rel=0.05)


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="no bitsandbytes")
def test_4_bit_models_are_never_held_unquantized() -> None:
    sizes = dict(num_hidden_layers=6, vocab_size=100, intermediate_size=384)
    config = AutoConfig.for_model("llama", **TINY | sizes)
    quarter, whole = (
        peak_bytes(lambda m=method: random_model(config, Method(method=m), torch.bfloat16, CPU))
        for method in ("qlora", "lora")
    )
    assert quarter < 0.7 * whole


def test_a_plan_is_probed_only_on_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("derta.cli.plan.describe", lambda *_: "the plan")
    AutoConfig.for_model("llama", **TINY).save_pretrained(tmp_path)
    path = tmp_path / "run.yaml"
    path.write_text("output_dir: b\nprobe: true\n", encoding="utf-8")  # keys of the training run
    arguments = ["--model", str(tmp_path / "config.json"), "--gpu", "8", "--max_tokens", "200"]
    assert main(["plan", str(path), *arguments]) == 0
    assert capsys.readouterr().out == "the plan\n"
    assert main(["plan", str(path), *arguments, "--probe"]) == 0
    assert capsys.readouterr().out.startswith(
        "the plan\nprobe: a pack of 199 tokens through random"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", ".inf"], "gpu: expected finite numbers, got inf"),
        (["--gpu", "0"], "gpu must lie in (0, 100000], got 0.0"),
        (["--gpu", "8", "--optim", "lion"], "optim: nothing is known of 'lion'"),
        (["--gpu", "8", "--offload_checkpoints"], "offload_checkpoints needs gradient_checkpoin"),
        (["--gpu", "8", "--max_tokens", "111"], "must leave room for a harmful response beside pr"),
        (["--gpu", "8", "--prompt_tokens", "4090"], "(4090) and 1 x safe_tokens (70), got 4096"),
        (["--gpu", "8", "--safe_tokens", "0"], "safe_tokens must be at least 1, got 0"),
        (["--gpu", "8", "--rto_keep", "2"], "rto_keep must lie in [0, 1], got 2.0"),
        (["--gpu", "8", "--mlp_tile", "0"], "mlp_tile must be at least 1 token, got 0"),
        (["--gpu", "8", "--lora_r", "0"], "lora_r must lie in [1, 8192], got 0"),
        (["--gpu", "8", "--lora_dropout", "1"], "lora_dropout must lie in [0, 1), got 1.0"),
        (["--gpu", "8", "--refusal_tokens", "[]"], "refusal_tokens must have 1 to 64 tokens, got"),
        (["--gpu", "8", "--gpus", "0"], "gpus must lie in [1, 100000], got 0"),
        (["--gpu", "8", "--shard", "fsdp"], "gpus must be at least 2 with shard: fsdp, got 1"),
        (["--gpu", "8", "--gpus", "2", "--probe"], "gpus must be 1 with probe, which runs on one"),
        (["--gpu", "8", "--offload_parameters"], "offload_parameters needs shard: fsdp or zero3"),
    ],
)
def test_impossible_plans_are_refused_with_the_reason(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    AutoConfig.for_model("llama", **TINY).save_pretrained(tmp_path)
    assert main(["plan", "--model", str(tmp_path), *arguments]) == 1
    assert message in capsys.readouterr().err


def test_other_models_than_causal_language_models_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    AutoConfig.for_model("t5").save_pretrained(tmp_path)
    assert main(["plan", "--model", str(tmp_path), "--gpu", "8"]) == 1
    said = "config.json cannot be loaded: t5 is not a causal language model"
    assert capsys.readouterr().err == f"derta plan: {tmp_path}: {said}\n"


def test_a_probe_that_exceeds_the_cpus_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("derta.memory.probe.physical_memory", lambda _: 2**20)
    step = StepSettings(config=AutoConfig.for_model("llama", **TINY))
    with pytest.raises(MemoryError, match=r"^probe: there is no GPU, .* has only 0\.00 GiB"):
        probe(step, 300, Triples(1, 1.0, 40, 70), CPU)


def test_the_memory_of_the_loss_does_not_grow_with_its_rows() -> None:
    """Only the gradient of hidden grows, which is a result."""
    vocabulary, width = 8000, 64
    weight = torch.randn(vocabulary, width)
    beyond = []
    for rows in (1024, 2048, 4096):
        hidden = torch.randn(rows, width, requires_grad=True)
        target = torch.randint(vocabulary, (rows,))

        def backward(hidden: torch.Tensor = hidden, target: torch.Tensor = target) -> None:
            derta_loss(hidden, weight, target, scratch_mb=8.0).backward()

        backward()
        beyond.append(peak_bytes(backward) - hidden.nbytes)
    assert max(beyond) < 1.1 * min(beyond)
    assert max(beyond) < 0.3 * 1024 * vocabulary * 4


def test_a_pack_beyond_the_models_context_is_noted() -> None:
    config = tiny_model("llama", max_position_embeddings=300).config
    text = describe(
        StepSettings(config=config, device_type="cpu", capacity=GIB // 32),
        256,
        Triples(branches=1, rto_keep=1.0, prompt=10, safe=10),
    )
    assert "and 1 safe response of 10; the model's context is 300 tokens\n" in f"{text}\n"
