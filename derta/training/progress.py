"""The terminal of a training run: one bar, and one line for each log."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


def format_figures(step: int, logs: dict[str, float]) -> str:
    """Return a line of a training log, from the figures that `DertaTrainer` logs."""
    parts = [f"step {step:>5}", f"loss {logs['loss']:.4f}"]
    parts += [
        f"{name.removesuffix('_loss')} {value:.4f}"
        for name, value in logs.items()
        if name.endswith("_loss")
    ]
    tenths = [logs[key] for key in (f"refusal_p_{i}" for i in range(1, 11)) if key in logs]
    if tenths:
        parts.append(f"p(refusal) {tenths[0]:.2f} first tenth, {tenths[-1]:.2f} last")
    if "reward_margin" in logs:
        right = f"{logs['reward_accuracy']:.0%} of pairs above 0"
        parts.append(f"reward margin {logs['reward_margin']:.3f}, {right}")
    if "benign_refusal_p" in logs:
        what = "" if tenths else "p(refusal) "
        parts.append(f"{what}{logs['benign_refusal_p']:.2f} harmless")
    if "skipped_gradient" in logs:
        parts.append(f"{logs['skipped_gradient']:.2%} of the head's gradient skipped")
    parts.append(f"lr {logs['learning_rate']:.2e}")
    parts.append(f"{logs['tokens_per_s']:,.0f} tok/s")
    return "  ".join(parts)


def format_evaluation(step: int, logs: dict[str, float]) -> str:
    """Return a line of the figures that `DertaTrainer` logs for held-out records."""
    names = {
        "loss": "loss",
        "asr": "attack success",
        "over_refusal": "over-refusal",
        "over_refusal_borderline": "of borderline requests",
        "trade_off": "trade-off",
    }
    figures = {text: logs[f"eval_{name}"] for name, text in names.items() if f"eval_{name}" in logs}
    parts = [f"{text} {value:.4f}" for text, value in figures.items()]
    return "  ".join([f"step {step:>5}", "held out:", *parts])


def format_probe(logs: dict[str, float]) -> str:
    """Return a line of the figures that `DertaTrainer` logs for its probe."""
    peak = f", {logs['probe_gib']:.2f} GiB at its peak" if "probe_gib" in logs else ""
    return f"probe: the largest pack fits, {logs['probe_tokens']:,} tokens{peak}"


class Progress(TrainerCallback):
    """A bar over the steps of a run; with `lines`, also a line per log.

    Args:
        title: title of the bar.
        lines: if True, every log is a line of its own.
    """

    def __init__(self, title: str, *, lines: bool = True) -> None:
        self.title = title
        self.lines = lines
        self.bar: tqdm | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.is_world_process_zero:
            self.bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                desc=self.title,
                unit="step",
                file=sys.stderr,
                dynamic_ncols=True,
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if self.bar is None or not logs:
            return
        if "probe_tokens" in logs:
            tqdm.write(format_probe(logs))
        if "eval_loss" in logs:
            tqdm.write(format_evaluation(state.global_step, logs))
        if "loss" not in logs:
            return
        self.bar.set_postfix_str(f"loss {logs['loss']:.3f}")
        if self.lines:
            tqdm.write(format_figures(state.global_step, logs))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
