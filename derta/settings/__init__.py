"""Settings: fields described once, and read from files, options, help and a JSON Schema.

Names are imported on first use: a dataclass of settings needs neither pydantic nor PyYAML.
"""

from derta._lazy import lazy_package

__getattr__, __dir__ = lazy_package(__name__, __file__)
