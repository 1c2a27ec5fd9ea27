"""The description of a setting: help, range, heading and default, kept with its dataclass field.

Everything that speaks of a setting reads this one place: `derta COMMAND --help`, the checks of
ranges and choices, and the JSON Schema. Class docstrings therefore do not repeat the keys.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import inspect
import math
import typing
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass
from typing import Any

_ABOUT = "derta"


@dataclass(frozen=True, kw_only=True)
class About:
    """A setting's description.

    Args:
        help: one or two sentences, without the type, the range and the default.
        ge, gt, le, lt: the bounds of a number: at least, above, at most, below.
        unit: the unit of the bounds, if messages name it.
        heading: the title of a group of settings. It holds for this one and those after it in the
            same class.
        shown: the default as help shows it, if its value does not say it.
        option_only: if True, the key counts on the command line only. A file's value is another
            command's.
    """

    help: str
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    unit: str = ""
    heading: str | None = None
    shown: str | None = None
    option_only: bool = False

    @property
    def range(self) -> str | None:
        """The range in words: "at least 1", "above 0" or "in [0, 1]"."""
        low = self.gt if self.ge is None else self.ge
        high = self.lt if self.le is None else self.le
        if low is None:
            return None
        if high is not None:
            opened, closed = "[" if self.gt is None else "(", "]" if self.lt is None else ")"
            return f"in {opened}{_number(low)}, {_number(high)}{closed}"
        unit = f" {self.unit}" if self.unit else ""
        return f"{'at least' if self.gt is None else 'above'} {_number(low)}{unit}"

    def holds(self, value: float) -> bool:
        """Return True if the number lies in the range. NaN lies in none."""
        return (
            (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le)
            and (self.lt is None or value < self.lt)
        )


def _number(bound: float) -> str:
    short = f"{bound:g}"
    return short if float(short) == bound and "e" not in short else str(bound)


@dataclass(frozen=True)
class Key:
    """A described field of a dataclass.

    Attributes:
        field: the field.
        about: its description.
        hint: its type.
        heading: the title of its group, "" for the first settings of a class without one.
    """

    field: dataclasses.Field[Any]
    about: About
    hint: Any
    heading: str

    @property
    def name(self) -> str:
        return self.field.name

    @property
    def required(self) -> bool:
        return self.field.default is MISSING and self.field.default_factory is MISSING

    @property
    def default(self) -> Any:
        """The value of a key that is not given; None for a required one."""
        if self.field.default_factory is not MISSING:
            return self.field.default_factory()
        return None if self.field.default is MISSING else self.field.default


def setting(default: Any = MISSING, help: str = "", *, factory: Any = MISSING, **about: Any) -> Any:
    """Return a dataclass field with a description.

    Args:
        default: the default; without it and `factory` the key is required.
        help: see `About`.
        factory: a function that returns the default, for lists and mappings.
        about: the other arguments of `About`.
    """
    metadata = {_ABOUT: About(help=help, **about)}
    return dataclasses.field(default=default, default_factory=factory, metadata=metadata)


def about_of(field: dataclasses.Field[Any]) -> About:
    """Return the description of a field, an empty one if it has none."""
    return field.metadata.get(_ABOUT) or About(help="")


@functools.cache
def keys_of(config_class: Any) -> dict[str, Key]:
    """Return the described keys of a dataclass, those of the class itself before its bases'."""
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    found: dict[str, Key] = {}
    for owner in config_class.__mro__:
        heading = ""
        hints: dict[str, Any] = {}
        for name in inspect.get_annotations(owner):
            if name in found or name not in fields or _ABOUT not in fields[name].metadata:
                continue
            hints = hints or typing.get_type_hints(owner)
            about = fields[name].metadata[_ABOUT]
            heading = heading if about.heading is None else about.heading
            found[name] = Key(fields[name], about, hints[name], heading)
    return found


def element_of(hint: Any) -> Any:
    """Return the dataclass that `hint` is a list of, None if it is something else."""
    (element,) = typing.get_args(hint) if typing.get_origin(hint) is list else (None,)
    return element if dataclasses.is_dataclass(element) else None


def choices_of(hint: Any) -> tuple[Any, ...]:
    """Return the values that a type allows, none of them if it allows others too.

    A choice of transformers' may be given as text, so that str stands beside it.
    """
    if typing.get_origin(hint) is typing.Literal:
        return typing.get_args(hint)
    for part in (hint, *typing.get_args(hint)):
        if isinstance(part, type) and issubclass(part, enum.Enum):
            return tuple(one.value for one in part)
    parts = [one for one in typing.get_args(hint) if one is not type(None)]
    return choices_of(parts[0]) if len(parts) == 1 and type(None) in typing.get_args(hint) else ()


def leaves(value: Any) -> Iterator[Any]:
    """Yield the values within lists and mappings, or the value itself if it is neither."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for one in value:
            yield from leaves(one)
    else:
        yield value


def all_finite(value: Any) -> bool:
    """Return True if a value, with all values of a list or a mapping, holds no NaN or infinity."""
    return all(math.isfinite(one) for one in leaves(value) if isinstance(one, float))


def check_ranges(config: Any, others: Mapping[str, About] | None = None) -> None:
    """Check every described setting of a dataclass against its range and its choices.

    Args:
        config: the dataclass.
        others: ranges of fields that are not described where they are defined.

    Raises:
        ValueError: a value lies outside, or a number is NaN or infinite.
    """
    config_class: Any = type(config)
    for name, key in keys_of(config_class).items():
        value, choices = getattr(config, name), choices_of(key.hint)
        if value is None:
            continue
        if choices and value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
        if isinstance(value, str) and (words := words_of(key.hint)):
            if value not in words:
                lists = any(typing.get_origin(one) is list for one in typing.get_args(key.hint))
                kind = "a list" if lists else "a number"
                raise ValueError(f"{name} must be {kind} or {', '.join(words)}, got {value!r}")
        else:
            _check_range(name, key.about, value)
    for name, about in (others or {}).items():
        # Another version of a library may lack the field.
        if getattr(config, name, None) is not None:
            _check_range(name, about, getattr(config, name))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if not all_finite(value):
            raise ValueError(f"{field.name} must be finite, got {value}")


def words_of(hint: Any) -> tuple[Any, ...]:
    """Return the words that stand beside numbers in a type."""
    parts = [one for one in typing.get_args(hint) if typing.get_origin(one) is typing.Literal]
    return tuple(word for part in parts for word in typing.get_args(part))


def _check_range(name: str, about: About, value: Any) -> None:
    if about.range is not None and not about.holds(value):
        within = about.range.replace("in ", "lie in ", 1)
        verb = "" if within.startswith("lie") else "be "
        raise ValueError(f"{name} must {verb}{within}, got {value}")
