"""A trainer that saves sharded models without any rank holding one as a whole.

transformers gathers all weights on the first rank. Here every rank fetches them one after the
other, and writes the files that are its own; adapters are gathered without the model beneath them.
What is saved is what a run on one GPU saves: engines train some weights in other dtypes.
"""

from __future__ import annotations

import socket
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import _CHECKPOINT_PREFIX
from transformers import PreTrainedModel, Trainer

from derta.modeling.folders import INDEX
from derta.modeling.sharding import whole
from derta.modeling.streaming import Fetch, Plan, blueprint_of, plan_save, write_weights
from derta.training.together import failing_together

# Engines by the files of their checkpoints, and how they are asked for.
ENGINES = {
    "whole": "shard: none or ddp",
    "fsdp sharded": "shard: fsdp with state_dict_type: SHARDED_STATE_DICT in fsdp_config",
    "fsdp full": "shard: fsdp with state_dict_type: FULL_STATE_DICT in fsdp_config",
    "zero1": "DeepSpeed's ZeRO-1",
    "zero2": "shard: zero2",
    "zero3": "shard: zero3",
}


class SavingTrainer(Trainer):
    """transformers' trainer, but for models whose weights are in shards."""

    # Dtypes of a model's weights before an engine shards it.
    _dtypes: dict[str, torch.dtype] | None = None
    _blueprint: PreTrainedModel | None = None  # of a model that is saved as a whole
    _adapters: list[str]  # the names of what PEFT saves of the others

    @property
    def engine(self) -> str:
        """The engine of the run, as far as its checkpoints depend on it: one of `ENGINES`."""
        state = self.accelerator.state
        if state.deepspeed_plugin is not None:
            return f"zero{state.deepspeed_plugin.zero_stage}"
        if self.is_fsdp_enabled:
            return f"fsdp {state.fsdp_plugin.state_dict_type.name.split('_')[0].lower()}"
        return "whole"

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """Prepare as transformers does, once it is known that the model can be saved.

        Raises:
            ValueError: it cannot.
        """
        if self.is_fsdp_enabled and not self.accelerator.is_fsdp2:
            raise ValueError("fsdp_config: expected version: 2, got the first version of FSDP")
        if self._dtypes is None and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            self._take_down(self.model)
        return super()._prepare_for_training(*args, **kwargs)

    def _take_down(self, model: Any) -> None:
        """Keep what is to be saved, before an engine changes names, shapes or dtypes.

        Raises:
            ValueError: it could not be saved in the end.
        """
        weights = _weights(model)
        dtypes = {
            # ZeRO-3 reads weights in the dtype of its passes, which may be another one.
            name: model.config.dtype if hasattr(one, "ds_id") else one.dtype
            for name, one in weights.items()
        }
        if isinstance(model, PeftModel):
            saved = get_peft_model_state_dict(model, state_dict=weights).values()
            ids = set(map(id, saved))
            self._adapters = [name for name, one in weights.items() if id(one) in ids]
        else:
            self._blueprint = blueprint_of(model, dtypes)
            with tempfile.TemporaryDirectory() as folder:
                plan_save(self._blueprint, Path(folder))
        self._dtypes = dtypes

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as `Trainer.save_model`; every rank writes its share of a sharded model.

        A sharded checkpoint of FSDP has the weights already: it gets what else a model consists of.

        Raises:
            OSError: a rank cannot write its share; all ranks say so.
        """
        if self._dtypes is None:
            super().save_model(output_dir, _internal_call)
            return
        folder = Path(output_dir or str(self.args.output_dir))
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
        self.accelerator.wait_for_everyone()
        fetch = self._fetch()
        if self._blueprint is None:
            adapters = {name: fetch(name).cpu() for name in self._adapters}
            if self.args.should_save:
                self._save(str(folder), adapters)
            return
        with tempfile.TemporaryDirectory() as aside:
            plan = plan_save(self._blueprint, folder if self.args.should_save else Path(aside))
        if self.args.should_save and self.processing_class is not None:
            self.processing_class.save_pretrained(str(folder))
        if not (_internal_call and self.engine == "fsdp sharded"):
            self._write(plan, folder, fetch)
        elif self.args.should_save:
            (folder / INDEX).unlink(missing_ok=True)

    def _write(self, plan: Plan, folder: Path, fetch: Fetch) -> None:
        """Write all weights, together with the other ranks that have the folder before them."""
        node = socket.gethostname() if self.args.save_on_each_node else "all"
        nodes = gather_object([node if folder.is_dir() else None])
        before = nodes[: self.args.process_index].count(node)
        writers = min(Counter(filter(None, nodes)).values())
        writer = before if folder.is_dir() and before < writers else None
        with failing_together(OSError):
            write_weights(plan, folder, fetch, writer=writer, writers=writers)

    def _fetch(self) -> Fetch:
        """Return how a weight is fetched by all ranks together: whole, in its former dtype."""
        weights = _weights(self.accelerator.unwrap_model(self.model, keep_torch_compile=False))

        @torch.no_grad()
        def fetch(name: str) -> Tensor:
            assert self._dtypes is not None
            return whole(weights[name], self._dtypes[name])

        return fetch


def _weights(model: nn.Module) -> dict[str, Any]:
    """Return what may be saved of a model, by its name before it was sharded."""
    if isinstance(model, PeftModel):  # 4-bit weights have a state that they cannot tell in shards
        named = model.named_parameters(remove_duplicate=False)
        return {name.replace(_CHECKPOINT_PREFIX, ""): one for name, one in named}
    return model.state_dict(keep_vars=True)
