"""Ranges of transformers' own settings, which it does not check, or only once a model is loaded."""

from __future__ import annotations

from derta.settings.fields import About

_SEED = About(help="", ge=0, le=2**32 - 1)
_SHARE = About(help="", ge=0, lt=1)
_AT_LEAST_0 = About(help="", ge=0)
_AT_LEAST_1 = About(help="", ge=1)
_ABOVE_0 = About(help="", gt=0)

RANGES = {
    "max_steps": About(help="", ge=-1, le=10**12),
    "warmup_steps": _AT_LEAST_0,
    "weight_decay": About(help="", ge=0, le=100),
    "adam_beta1": _SHARE,
    "adam_beta2": _SHARE,
    "adam_epsilon": About(help="", gt=0, le=1),
    "max_grad_norm": _AT_LEAST_0,
    "neftune_noise_alpha": About(help="", ge=0, le=1000),
    "torch_empty_cache_steps": _AT_LEAST_1,
    "logging_steps": _ABOVE_0,
    "eval_steps": _ABOVE_0,
    "eval_delay": _AT_LEAST_0,
    "eval_accumulation_steps": _AT_LEAST_1,
    "per_device_eval_batch_size": _AT_LEAST_1,
    "save_steps": _ABOVE_0,
    "save_total_limit": _AT_LEAST_1,
    "data_seed": _SEED,
    "dataloader_num_workers": About(help="", ge=0, le=1024),
    "dataloader_prefetch_factor": _AT_LEAST_1,
    "ddp_bucket_cap_mb": _AT_LEAST_1,
    "ddp_timeout": About(help="", ge=1, le=10**9, unit="second"),
}
