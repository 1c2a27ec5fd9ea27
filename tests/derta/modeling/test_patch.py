"""The promises of `apply_derta` about a model before, during and after the patch."""

from __future__ import annotations

import copy
import gc
import json
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed import HashStore
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import flash_attention_mask

from derta.modeling.attention import packed_mask
from derta.modeling.patch import apply_derta, checkpoint_layers, remove_derta
from derta.objectives.preference import PreferenceObjective
from derta_kernels.attention import layout_of
from tiny import tiny_model

REFUSAL = 77

# Two examples: one of eight tokens, with a branch of three after the fifth, and one of six.
TRUNK, CUT, BRANCH, OTHER = 8, 5, 3, 6


def sequences() -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.randint(400, (TRUNK + BRANCH + OTHER,), generator=torch.Generator().manual_seed(1))
    trunk, branch, other = ids.split([TRUNK, BRANCH, OTHER])
    return trunk, torch.cat([trunk[:CUT], branch]), other


def pack() -> dict[str, Any]:
    """Return a pack: every row is trained to say token 9, the trunk's rows also to refuse."""
    trunk, branch, other = sequences()
    end = TRUNK + BRANCH
    until = [end] * CUT + [TRUNK] * (TRUNK - CUT) + [end] * BRANCH + [end + OTHER] * OTHER
    positions = [*range(TRUNK), *range(CUT, CUT + BRANCH), *range(OTHER)]
    return dict(
        input_ids=torch.cat([trunk, branch[CUT:], other])[None],
        position_ids=torch.tensor([positions]),
        visible_until=torch.tensor([until], dtype=torch.int32),
        shift_labels=torch.full((1, end + OTHER), 9),
        rto_mask=(torch.arange(end + OTHER) < TRUNK)[None],
        example_bounds=(((0, end), (end, end + OTHER)),),
    )


def separate_passes(model: nn.Module) -> Tensor:
    losses = []
    for sequence, new in zip(sequences(), (TRUNK, BRANCH, OTHER), strict=True):
        logits = model(input_ids=sequence[None]).logits[0, -new:]
        losses.append(F.cross_entropy(logits, torch.full((new,), 9), reduction="none"))
        if new == TRUNK:
            losses.append(F.cross_entropy(logits, torch.full((new,), REFUSAL), reduction="none"))
    return torch.cat(losses).mean()


def gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_one_pass_equals_separate_passes(model: nn.Module, expected_from: nn.Module) -> None:
    expected = separate_passes(expected_from)
    wanted = gradients(expected, expected_from)
    output = model(**pack())
    actual = gradients(output.loss, model)
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert actual.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (actual[name] - gradient).norm() <= 1e-6 * gradient.norm(), name


def double(architecture: str = "llama", **overrides: object) -> PreTrainedModel:
    return tiny_model(architecture, dtype=torch.float64, **overrides)


# --- a patched model is otherwise unchanged ------------------------------------------------------


def plain_behaviour(model: PreTrainedModel) -> list[Tensor]:
    """Return the logits of a padded batch, and generations from it, greedy and sampled."""
    ids = torch.stack(sequences()[:2])
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    torch.manual_seed(0)
    options = dict(max_new_tokens=12, return_dict_in_generate=True, output_logits=True)
    greedy = model.generate(ids, attention_mask=mask, do_sample=False, **options)
    sampled = model.generate(ids, attention_mask=mask, do_sample=True, **options)
    padded = model(input_ids=ids, attention_mask=mask, labels=ids)
    return [
        *(padded.loss, padded.logits, greedy.sequences, *greedy.logits),
        *(sampled.sequences, *sampled.logits),
    ]


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "mixtral"])
def test_generation_and_plain_calls_are_unchanged(architecture, implementation) -> None:
    # With router logits, transformers' own Mixtral cannot generate from a padded batch.
    router = {"output_router_logits": False} if architecture == "mixtral" else {}
    model = tiny_model(architecture, **router).eval()
    model.set_attn_implementation(implementation)
    before = plain_behaviour(model)
    attributes = set(vars(model))
    assert apply_derta(model, REFUSAL) is model
    assert_same(plain_behaviour(model), before)
    model(**pack())
    assert_same(plain_behaviour(model), before)
    assert remove_derta(model) is model
    assert_same(plain_behaviour(model), before)
    assert model.config._attn_implementation == implementation
    assert set(vars(model)) == attributes


def test_a_model_without_sdpa_keeps_its_own_eager_attention() -> None:
    model = tiny_model("gemma2").eval()
    assert model.config._attn_implementation == "eager"
    before = plain_behaviour(model)
    apply_derta(model, REFUSAL)
    assert_same(plain_behaviour(model), before)


def test_a_flash_attention_model_still_loads_its_own_kernel() -> None:
    named = []

    def attention(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        named.append(module.config._attn_implementation)
        return sdpa_attention_forward(module, *args, **kwargs)

    name = "some-org/flash-stand-in"
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, flash_attention_mask)
    model = tiny_model("llama").eval()
    model.config._attn_implementation_internal = name
    ids = sequences()[0][None]
    before = model(ids).logits
    apply_derta(model, REFUSAL)
    assert "flash" in model.config._attn_implementation
    assert torch.equal(model(ids).logits, before)
    assert set(named) == {name}
    named.clear()
    model(**pack())
    assert named == []


def test_applying_and_removing_are_idempotent() -> None:
    model, fresh = double(), double()
    remove_derta(remove_derta(model))
    apply_derta(model, 3)
    apply_derta(model, REFUSAL, impl="reference", attention="reference")
    assert_one_pass_equals_separate_passes(model, fresh)
    remove_derta(model)
    assert "forward" not in vars(model)
    assert model.config._attn_implementation == "sdpa"
    remove_derta(model)
    assert_same([model(sequences()[0][None]).logits], [fresh(sequences()[0][None]).logits])


def test_a_forward_set_on_the_instance_is_restored() -> None:
    model = tiny_model("llama")
    calls = []

    def hooked(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        calls.append(self)
        return type(self).forward(self, *args, **kwargs)

    model.forward = before = MethodType(hooked, model)
    apply_derta(model, REFUSAL)
    calls.clear()
    model(sequences()[0][None])
    assert calls == [model]
    remove_derta(model)
    assert model.forward is before


def test_a_forward_wrapped_by_accelerate_stays_wrapped() -> None:
    model = tiny_model("llama")
    apply_derta(model, REFUSAL)
    AcceleratorState._reset_state(reset_partial_state=True)  # left by a trainer in another test
    Accelerator(cpu=True, mixed_precision="bf16").prepare_model(model)
    wrapper = model.forward
    loss = model(**pack()).loss
    apply_derta(model, REFUSAL)
    assert model.forward is wrapper
    assert model(**pack()).loss == loss
    remove_derta(model)
    plain = model(sequences()[0][None]).logits
    assert plain.dtype == torch.float32
    with pytest.raises(ValueError, match="visible_until needs apply_derta, which has been removed"):
        model(**pack())


def test_a_copy_is_patched_independently() -> None:
    model = double()
    apply_derta(model, REFUSAL)
    twin = copy.deepcopy(model)
    remove_derta(model)
    assert_one_pass_equals_separate_passes(twin, double())


def test_a_patched_model_is_saved_as_an_ordinary_one(tmp_path: Path) -> None:
    model = tiny_model("llama").eval()
    apply_derta(model, REFUSAL)
    model.save_pretrained(tmp_path)
    for path in tmp_path.glob("*.json"):
        assert "derta" not in path.read_text()
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [
        "LlamaForCausalLM"
    ]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"
    assert_same(plain_behaviour(loaded), plain_behaviour(model))


# --- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma2"])
def test_gradient_checkpointing_gives_the_same_gradients(architecture, use_reentrant) -> None:
    model = tiny_model(architecture).train()
    apply_derta(model, REFUSAL)
    expected = gradients(model(**pack()).loss, model)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    actual = gradients(model(**pack()).loss, model)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(actual[name], gradient), name


def test_layers_are_checkpointed_without_a_warning() -> None:
    model = tiny_model("llama")
    with warnings.catch_warnings(action="error"):
        checkpoint_layers(model)
    assert model.is_gradient_checkpointing


def test_a_checkpointing_model_passes_the_self_check() -> None:
    model = double().train()
    checkpoint_layers(model)
    apply_derta(model, REFUSAL)
    assert_one_pass_equals_separate_passes(model, double())


def test_a_frozen_head_allocates_no_gradient() -> None:
    model = tiny_model("llama")
    model.lm_head.requires_grad_(False)
    apply_derta(model, REFUSAL)
    size = model.lm_head.weight.numel()
    held = {model.lm_head.weight.data_ptr(), model.model.embed_tokens.weight.data_ptr()}
    made = []

    class Allocations(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            made.extend(
                func
                for leaf in tree_leaves(result)
                if isinstance(leaf, Tensor) and leaf.numel() >= size and leaf.data_ptr() not in held
            )
            return result

    model.model.embed_tokens.requires_grad_(False)
    with Allocations():
        model(**pack()).loss.backward()
    assert made == []
    assert model.lm_head.weight.grad is None

    model.lm_head.requires_grad_(True)
    with Allocations():
        model(**pack()).loss.backward()
    assert made != []


def test_autocast_rounds_no_more_than_in_separate_passes() -> None:
    model = tiny_model("llama")
    fresh = copy.deepcopy(model)
    apply_derta(model, REFUSAL)
    oracle = separate_passes(copy.deepcopy(fresh).double()).item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        eager = separate_passes(fresh).item()
        output = model(**pack())
    band = torch.finfo(torch.bfloat16).eps * oracle
    assert abs(output.loss.item() - oracle) <= 2 * (abs(eager - oracle) + band)
    assert all(gradient.isfinite().all() for gradient in gradients(output.loss, model).values())


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "mixtral"])
def test_bfloat16_rounds_no_more_than_in_separate_passes(architecture: str) -> None:
    router = {"output_router_logits": False} if architecture == "mixtral" else {}
    model = tiny_model(architecture, dtype=torch.bfloat16, **router)
    exact = tiny_model(architecture, dtype=torch.float64, **router)
    exact.load_state_dict(model.state_dict())
    oracle, eager = separate_passes(exact).item(), separate_passes(model).item()
    apply_derta(model, REFUSAL)
    output = model(**pack())
    assert output.loss.dtype == torch.float32
    band = torch.finfo(torch.bfloat16).eps * oracle
    assert abs(output.loss.item() - oracle) <= 2 * (abs(eager - oracle) + band)


def test_a_batch_lives_only_until_it_is_recomputed() -> None:
    model = tiny_model("mistral").train()
    apply_derta(model, REFUSAL)
    checkpoint_layers(model)
    masks = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(
            weakref.ref(layout_of(*kwargs["attention_mask"][:, 0].unbind(1), None))
        ),
        with_kwargs=True,
    )
    output = model(**pack())
    hook.remove()
    assert masks[0]() is not None
    output.loss.backward()
    del output
    gc.collect()
    assert masks[0]() is None


def test_given_bounds_avoid_reading_the_device() -> None:
    """The meta device has no values, so reading one would be an error."""
    inputs = pack()
    bounds = inputs["example_bounds"]
    mask = packed_mask(
        inputs["visible_until"].to("meta"), inputs["position_ids"].to("meta"), bounds
    )
    assert mask.shape == (1, 1, 2, TRUNK + BRANCH + OTHER)
    examples = layout_of(*mask[:, 0].unbind(1), None).examples
    assert tuple((example.start, example.end) for example in examples) == bounds[0]


@pytest.fixture
def one_rank() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "mixtral"])
def test_fsdp_gathers_the_head_for_the_loss(architecture: str, one_rank: None) -> None:
    """FSDP2 hides the model's class, and with it the modeling file."""
    model, whole = tiny_model(architecture), tiny_model(architecture)
    apply_derta(whole, REFUSAL)
    expected = gradients(whole(**pack()).loss, whole)
    apply_derta(model, REFUSAL)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    actual = gradients(model(**pack()).loss, model)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(actual[name].full_tensor(), gradient), name


# --- PEFT ----------------------------------------------------------------------------------------


def with_lora(model: PreTrainedModel, **options: object) -> nn.Module:
    """Return the model with random LoRA factors, so that the adapter matters."""
    torch.manual_seed(3)
    config = LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM", **options)
    peft_model = get_peft_model(model, config)
    return peft_model.double()


@pytest.mark.parametrize("modules_to_save", [None, ["lm_head"]])
def test_adapters_are_trained(modules_to_save: list[str] | None) -> None:
    options = dict(target_modules=["q_proj", "v_proj"], modules_to_save=modules_to_save)
    model, fresh = (with_lora(double(), **options) for _ in range(2))
    if modules_to_save:
        for one in (model, fresh):
            one.base_model.model.lm_head.modules_to_save["default"].weight.data.mul_(1.5)
    assert apply_derta(model, REFUSAL) is model
    assert_one_pass_equals_separate_passes(model, fresh)
    remove_derta(model)
    assert "forward" not in vars(model.get_base_model())


def test_an_adapter_on_the_head_is_refused() -> None:
    model = with_lora(double(), target_modules=["q_proj", "lm_head"])
    with pytest.raises(ValueError, match="LlamaForCausalLM has an adapter on its head"):
        apply_derta(model, REFUSAL)

    late = double()
    apply_derta(late, REFUSAL)
    late = with_lora(late, target_modules=["lm_head"])
    with pytest.raises(ValueError, match="take the head out of target_modules"):
        late(**pack())


# --- models unfit for packs ----------------------------------------------------------------------


def small(model_type: str, **settings: object) -> PreTrainedModel:
    settings = dict(vocab_size=400, hidden_size=32, num_hidden_layers=2) | settings
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings))


class Scaled(LlamaForCausalLM):
    """A model that scales its logits without a trace in the config."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 2
        return output


class DeafBody(LlamaModel):
    """A model that ignores the given mask."""

    def forward(self, *args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        return super().forward(*args, attention_mask=None, **kwargs)


def deaf() -> PreTrainedModel:
    model = tiny_model("llama")
    model.model.__class__ = DeafBody
    return model


def scaled() -> PreTrainedModel:
    model = tiny_model("llama")
    model.__class__ = Scaled
    return model


def without_head() -> PreTrainedModel:
    return tiny_model("llama").model


def on_meta() -> PreTrainedModel:
    return tiny_model("llama").to("meta")


def quantized() -> PreTrainedModel:
    model = tiny_model("llama")
    weight = torch.zeros(400, 32, dtype=torch.int8)
    model.lm_head.weight = nn.Parameter(weight, requires_grad=False)
    return model


def encoder_decoder() -> PreTrainedModel:
    config = AutoConfig.for_model("t5", vocab_size=400, d_model=32, d_kv=8, d_ff=48, num_layers=1)
    return AutoModelForSeq2SeqLM.from_config(config)


REFUSED: dict[str, tuple[Callable[[], PreTrainedModel], str]] = {
    "bloom": (
        lambda: small("bloom", n_head=4),
        "BloomForCausalLM computes its attention itself, packs need to replace it",
    ),
    "falcon": (
        lambda: small("falcon", num_attention_heads=4),
        "FalconForCausalLM computes its attention itself, packs need to replace it",
    ),
    "mamba": (lambda: small("mamba"), "MambaForCausalLM has layers that no mask governs"),
    "chunked": (
        lambda: small("llama", num_attention_heads=4, layer_types=["chunked_attention"] * 2),
        r"LlamaForCausalLM has layers that no mask governs \(chunked_attention\)",
    ),
    "sinks": (
        lambda: small(
            "gpt_oss",
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            intermediate_size=16,
            num_local_experts=2,
            num_experts_per_tok=1,
        ),
        "GptOssForCausalLM cannot run a pack: GptOssAttention passes s_aux to its attention",
    ),
    "window in the mask": (
        lambda: small(
            "phimoe",
            num_attention_heads=4,
            num_key_value_heads=4,
            intermediate_size=16,
            num_local_experts=2,
            sliding_window=7,
        ),
        "PhimoeForCausalLM cannot run a pack: PhimoeAttention has a sliding window, but leaves it",
    ),
    "scaled": (scaled, "Scaled cannot be trained on packs: next-token losses of one pass differ"),
    "deaf": (deaf, "LlamaForCausalLM cannot be trained on packs: hidden states of one pass differ"),
    "without head": (without_head, "LlamaModel must have a body and a language model's head"),
    "encoder-decoder": (encoder_decoder, "T5ForConditionalGeneration is an encoder-decoder"),
    "meta": (on_meta, "LlamaForCausalLM must have its weights to prove itself, some are in"),
    "quantized": (quantized, r"got Linear with torch.int8: a quantized head cannot be used"),
    "router without a loss": (
        lambda: small(
            "jetmoe",
            num_attention_heads=4,
            num_key_value_heads=4,
            output_router_logits=True,
            pad_token_id=0,
        ),
        "JetMoeForCausalLM has output_router_logits on but lacks .*router_aux_loss_coef: turn it",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_model_unfit_for_packs_is_refused_by_name(case: str) -> None:
    build, message = REFUSED[case]
    model = build()
    implementation, attributes = model.config._attn_implementation, set(vars(model))
    with pytest.raises(ValueError, match=message):
        apply_derta(model, REFUSAL)
    assert model.config._attn_implementation == implementation
    assert set(vars(model)) == attributes


def test_a_router_loss_of_another_shape_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("mixtral")
    model.num_experts_per_tok = 1
    own = type(model).forward

    def forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        self.num_experts_per_tok = 2
        output = own(self, *args, **kwargs)
        self.num_experts_per_tok = 1
        return output

    forward.__wrapped__ = own
    monkeypatch.setattr(type(model), "forward", forward)
    with pytest.raises(ValueError, match="MixtralForCausalLM cannot be trained on packs: router"):
        apply_derta(model, REFUSAL)


def test_the_self_check_changes_nothing() -> None:
    model = tiny_model("llama").train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    separate_passes(model).backward()
    before = [parameter.grad.clone() for parameter in model.parameters()]
    state = torch.get_rng_state()
    apply_derta(model, REFUSAL)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert_same([parameter.grad for parameter in model.parameters()], before)
    assert torch.is_grad_enabled()


def test_anything_but_a_transformers_model_is_a_type_error() -> None:
    message = "model must be a transformers PreTrainedModel or a PEFT model of one, got Linear"
    with pytest.raises(TypeError, match=message):
        apply_derta(nn.Linear(2, 2), REFUSAL)
    with pytest.raises(TypeError, match=message):
        remove_derta(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(impl="fast"), ValueError, "impl must be one of auto, .*, got 'fast'"),
        (dict(attention="fast"), ValueError, "impl must be one of auto, reference, sdpa"),
        (dict(refusal_token_id=400), ValueError, "refusal_token_id must lie in"),
        (dict(refusal_token_id="Sorry"), TypeError, "refusal_token_id must be int"),
        (dict(refusal_token_id=[3, 400]), ValueError, "refusal_token_id must lie in"),
        (dict(refusal_token_id=[3, 3]), ValueError, "must have distinct tokens, got 3 twice"),
    ],
)
def test_wrong_settings_are_refused_and_leave_the_model_unchanged(options, error, message) -> None:
    model = tiny_model("llama")
    attributes = set(vars(model))
    with pytest.raises(error, match=message):
        apply_derta(model, **{"refusal_token_id": REFUSAL, **options})
    assert set(vars(model)) == attributes
    assert model.config._attn_implementation == "sdpa"


# --- calls unfit for packs -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            dict(attention_mask=torch.ones(1, 17, dtype=torch.int64)),
            ValueError,
            "attention_mask must be None with visible_until",
        ),
        (dict(labels=torch.ones(1, 17)), ValueError, "labels must be None with visible_until"),
        (dict(past_key_values=()), ValueError, "past_key_values must be None with visible_until"),
        (dict(position_ids=None), ValueError, "position_ids are required with visible_until"),
        (dict(visible_until=None), ValueError, "shift_labels needs visible_until, got None"),
        (
            dict(visible_until=None, shift_labels=None),
            ValueError,
            "rto_mask needs visible_until, got None",
        ),
        (
            dict(term_weights={"mle": 2.0}),
            ValueError,
            "term_weights: mle is the main term, its factor must be 1, got 2.0: weigh the others",
        ),
        (dict(term_weights={"x": 1.0}), ValueError, "term_weights must be of mle, rto, got 'x'"),
        (
            dict(visible_until=torch.ones(1, 17)),
            ValueError,
            "visible_until must be torch.int32, got torch.float32",
        ),
        (
            dict(position_ids=torch.ones(17, dtype=torch.int64)),
            ValueError,
            r"position_ids must have shape \(B, N\) as visible_until has \(1, 17\), got \(17,\)",
        ),
        (
            dict(output_attentions=True),
            NotImplementedError,
            "LlamaAttention passes output_attentions=True to its attention, which attention over",
        ),
        (
            dict(is_causal=False),
            NotImplementedError,
            "LlamaAttention passes is_causal=False to its attention, which attention over packs",
        ),
        (
            dict(cu_seq_lens_q=torch.tensor([0, 17])),
            NotImplementedError,
            "LlamaAttention passes cu_seq_lens_q to its attention, which attention over packs",
        ),
    ],
)
def test_a_call_unfit_for_packs_is_refused(change, error, message) -> None:
    model = tiny_model("llama")
    apply_derta(model, REFUSAL)
    with pytest.raises(error, match=message):
        model(**{**pack(), **change})


def test_columns_without_pairs_are_refused_by_a_preference_loss() -> None:
    def refused(preference: str, beta: float, columns: dict[str, Any]) -> str:
        objective = PreferenceObjective(
            branches=1,
            preference=preference,
            preference_beta=beta,
            preference_weight=1.0,
            simpo_gamma=1.0 if preference == "simpo" else None,
        )
        model = apply_derta(tiny_model("llama"), REFUSAL, objective=objective)
        given = {name: values for name, values in pack().items() if name != "rto_mask"}
        with pytest.raises(ValueError, match="^") as caught:
            model(**given | columns)
        return str(caught.value)

    end = "is required by the model's objective, got None: pack batches with the objective that"
    assert refused("simpo", 2.0, {}).startswith(f"pair_back {end}")
    pairs = {"pair_back": torch.full((1, 17), -1)}
    assert refused("simpo", 2.0, pairs).startswith(f"rejected_labels {end}")
    # Without the reference's numbers, DPO would train towards another one.
    pairs["rejected_labels"] = torch.full((1, 17), -100)
    assert refused("dpo", 0.1, pairs).startswith(f"chosen_reference {end}")


def test_term_weights_may_be_partial() -> None:
    model = tiny_model("llama")
    apply_derta(model, REFUSAL)
    whole = model(**pack()).loss
    for given in ({}, {"mle": 1.0}, {"rto": 1.0}):
        assert torch.equal(model(**pack(), term_weights=given).loss, whole)
    assert not torch.equal(model(**pack(), term_weights={"rto": 0.5}).loss, whole)


def test_attention_dropout_is_refused_only_in_training() -> None:
    model = tiny_model("llama", attention_dropout=0.1).train()
    apply_derta(model, REFUSAL)
    with pytest.raises(ValueError, match="must be 0 to train on packs, LlamaAttention has 0.1"):
        model(**pack())
    assert model.eval()(**pack()).loss.isfinite()


def test_a_later_change_of_the_attention_implementation_is_noticed() -> None:
    model = tiny_model("llama")
    apply_derta(model, REFUSAL)
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="was set to 'eager' after apply_derta: apply it again"):
        model(**pack())
    apply_derta(model, REFUSAL)
    assert model(**pack()).loss.isfinite()
    remove_derta(model)
    assert model.config._attn_implementation == "eager"
