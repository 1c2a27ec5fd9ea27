"""Data: from record files (`records`) through token ids (`tokens`) to packs (`packs`).

Names are imported on first use, so that each room can be imported by itself.
"""

from derta._lazy import lazy_package

__getattr__, __dir__ = lazy_package(__name__, __file__)
