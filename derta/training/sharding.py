"""The engine of a run on several GPUs: from our keys to those of transformers.

Accelerate runs the engine, FSDP2 or DeepSpeed, and wraps the model by its own no-split modules. On
CPUs, where Accelerate has neither, a run is sharded likewise, so that it can be tried without GPUs.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, str_to_bool
from torch.distributed.fsdp import MixedPrecisionPolicy

from derta.training.settings import Shard

# Variables by which `accelerate launch` chooses an engine, and their values then. Accelerate sets
# them too, and they would decide over the next run of this process.
LAUNCHERS = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}
ENGINES = {"shard: fsdp": "FSDP", "shard: zero2": "DeepSpeed", "shard: zero3": "DeepSpeed"}
AT_LAUNCH = {name: os.environ.get(name) for name in LAUNCHERS}


def engine_keys(
    shard: Shard, offload: bool, fsdp_config: dict[str, Any] | None, *, only_model: bool
) -> dict[str, Any]:
    """Return transformers' keys for an engine.

    Args:
        shard, offload: `shard` and `offload_parameters` of `ShardSettings`.
        fsdp_config: transformers' own keys of FSDP, which take precedence.
        only_model: if True, checkpoints hold a model, without what a run continues with.
    """
    if shard == "fsdp":
        ours = {
            "version": 2,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "reshard_after_forward": True,
            "cpu_ram_efficient_loading": True,
            "state_dict_type": "FULL_STATE_DICT" if only_model else "SHARDED_STATE_DICT",
            "cpu_offload": offload,
        }
        return {"fsdp": True, "fsdp_config": {**ours, **(fsdp_config or {})}}
    if shard in ("zero2", "zero3"):
        return {"deepspeed": _deepspeed(3 if shard == "zero3" else 2, offload)}
    return {}


def _deepspeed(stage: int, offload: bool) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": True, "contiguous_gradients": True}
    if stage == 3:
        zero |= dict.fromkeys(("reduce_bucket_size", "stage3_prefetch_bucket_size"), "auto")
        zero["stage3_param_persistence_threshold"] = "auto"
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    if offload:
        on_host = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        zero |= {"offload_param": on_host, "offload_optimizer": on_host}
    sizes = "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"
    return {
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # which is compiled at the first step
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "gradient_clipping": "auto",
        **dict.fromkeys(sizes, "auto"),
    }


def forget_earlier_runs() -> None:
    """Let the launch alone say which engine runs, and no earlier run of this process."""
    for name, value in AT_LAUNCH.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


def announce_fsdp() -> None:
    """Let transformers load weights on one rank of a machine, if FSDP is asked to do so.

    It reads the variable that Accelerate sets, but only once there is an accelerator.
    """
    os.environ["ACCELERATE_USE_FSDP"] = "true"


def running_engine(accelerator: Accelerator) -> Shard:
    """Return the engine that runs, also if `accelerate launch` or a file of keys chose it."""
    if getattr(accelerator.state, "fsdp_plugin", None) is not None:  # it may have none
        return "fsdp"
    if accelerator.state.deepspeed_plugin is not None:
        return "zero3" if accelerator.state.deepspeed_plugin.zero_stage == 3 else "zero2"
    return "ddp" if accelerator.num_processes > 1 else "none"


def check_launch(engine: str) -> None:
    """Check that processes were launched for an engine, and for no other one.

    Args:
        engine: the key that asks for it, as "shard: fsdp".

    Raises:
        ValueError: there is one process only, or `accelerate launch` chose another engine.
    """
    chosen = [LAUNCHERS[name] for name, value in AT_LAUNCH.items() if str_to_bool(value or "0")]
    if engine.startswith("shard: ") and chosen and ENGINES.get(engine) != chosen[0]:
        raise ValueError(
            f"{engine}, but accelerate launch chose {chosen[0]}: leave shard out, or launch with "
            "torchrun"
        )
    if "LOCAL_RANK" not in os.environ:
        raise ValueError(
            f"{engine} needs a process for each GPU, got one that was started by itself: "
            "torchrun --nproc_per_node 8 -m derta train ..."
        )


def with_exact_sums(policy: MixedPrecisionPolicy) -> MixedPrecisionPolicy:
    """Return a policy that rounds weights and activations, but no sums.

    Weights are gathered in the policy's dtype, and so are the embedding's outputs and the residual
    stream, which autocast alone keeps in the dtype of the weights. Gradients are summed over ranks
    in float32, and counts and weights of targets come in, and losses go out, as they are.
    """
    return replace(policy, reduce_dtype=torch.float32, output_dtype=None, cast_forward_inputs=False)


def shard_on_cpus(*, with_deepspeed: bool) -> None:
    """Let Accelerate shard over CPU processes, which it has no engine for.

    Its FSDP takes the processes of any accelerator alike, so they pass for such. DeepSpeed must be
    told of the process group, which Accelerate sets up for other devices only.
    """
    if PartialState().distributed_type != DistributedType.MULTI_CPU:
        return
    if with_deepspeed:
        from deepspeed import comm, ops

        # A sum for inference, which each first start compiles. A start that is killed meanwhile
        # leaves a lock that all later ones would wait for.
        ops.__compatible_ops__["deepspeed_shm_comm"] = False
        comm.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    else:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
