"""The one place that chooses an objective by a run's settings."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from derta.objectives.derta import DertaObjective
from derta.objectives.preference import PreferenceObjective
from derta.objectives.red_flag import RedFlagObjective
from derta.objectives.unlikelihood import UnlikelihoodObjective


def objective_of(settings: Any) -> DertaObjective:
    """Return the objective that settings describe.

    Args:
        settings: has the objective's fields under their own names, but for refusals, which the data
            may tell; unlikelihood_weight 0 leaves that term out, without preference there are no
            pairs, without red_flag no flag.

    Raises:
        ValueError: as the objective.
    """
    kind: type[DertaObjective] = DertaObjective
    if settings.preference is not None:
        kind = PreferenceObjective
    elif settings.red_flag is not None:
        kind = RedFlagObjective
    elif settings.unlikelihood_weight:
        kind = UnlikelihoodObjective
    names = {field.name for field in fields(kind)} - {"refusals"}
    return kind(**{name: getattr(settings, name) for name in names})
