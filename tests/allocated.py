"""What torch's CPU allocator hands out, as its profiler sees it."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile


def peak_bytes(function: Callable[[], Any]) -> int:
    """Most bytes alive at once of those that `function` allocates."""
    gc.collect()  # what waits for it would be freed meanwhile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        function()
    events = [e.nbytes() for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(events, initial=0))
