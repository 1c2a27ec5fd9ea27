"""The reference of a run with a red flag: hidden states of the model before its first step.

Under adapters it is the model without them, at no memory; else a frozen copy, which takes that of
the weights once more. A run that continues begins with the model that it was made from, so its
reference is that of the first start. A reference runs over the packs of the run, one pass without
gradients for each pack with dialogues, and the loss reads its states row by row.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping
from typing import Any

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from derta.modeling.introspection import evaluating, head_of, transformers_model
from derta.modeling.patch import apply_derta, computing
from derta.objectives.red_flag import States


class ReferenceStates:
    """The states of a reference, pack by pack.

    Args:
        model: the model before its first step: under adapters itself, else to be copied.
        flag: id of the red flag, which the reference does not know, nor any id after it.
        attention: see `apply_derta`.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, flag: int, attention: str) -> None:
        self.flag = flag
        self.model: Any = model
        if not isinstance(model, PeftModel):
            self.model = copy.deepcopy(model).requires_grad_(False)
            apply_derta(self.model, flag, attention=attention)

    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the tensors that the loss of a pack reads.

        No engine runs this pass, as other ranks may have no dialogues to run it for.

        Args:
            inputs: the model's inputs for the pack.

        Returns:
            reference_hidden (1, N, d), reference_weight (flag, d), and reference_bias (flag,) of a
            head with a bias.
        """
        is_adapted = isinstance(self.model, PeftModel)
        with (
            evaluating(self.model),
            self.model.disable_adapter() if is_adapted else contextlib.nullcontext(),
            computing(self.model, States()),
        ):
            head = head_of(transformers_model(self.model))
            found = {
                "reference_hidden": self.model(**inputs).rows["hidden"],
                "reference_weight": head.weight[: self.flag].detach(),
            }
        if head.bias is not None:
            found["reference_bias"] = head.bias[: self.flag].detach()
        return found
