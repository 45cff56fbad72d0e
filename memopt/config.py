"""The options of one compilation, validated once and then frozen."""

import dataclasses
import difflib
import json
import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Literal

from memopt.budget import Budget, as_float
from memopt.errors import ConfigError, shown

KnownPasses = Mapping[str, Collection[str]]

# The keys of torch._inductor.list_mode_options() in torch 2.11 to 2.13.
MODES = ("default", "lite", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
_DEEPEST = 32  # levels of lists and mappings in an option


@dataclass(frozen=True, slots=True, repr=False)
class Settings(Mapping[str, object]):
    """A mapping that can be hashed, pickled and compared: sorted by name, frozen all through.

    Lists inside become tuples and mappings become ``Settings``; ``to_dict`` undoes both.
    """

    pairs: tuple[tuple[str, object], ...] = ()

    def __getitem__(self, name: str) -> object:
        for known, value in self.pairs:
            if known == name:
                return value
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self.pairs)

    def __len__(self) -> int:
        return len(self.pairs)

    def __repr__(self) -> str:
        return f"Settings({self.to_dict()!r})"

    def to_dict(self) -> dict[str, object]:
        """The mapping in plain dicts and lists."""
        return {name: _thaw(value) for name, value in self.pairs}


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """How a model is compiled.

    Build it with ``from_options``; the constructor takes values that are valid already.

    Attributes:
        memory_budget: the bound on the step's peak above what is resident when it starts.
        passes: by pass name, ``True`` or ``False`` to switch it on or off, or its options, which
            also switch it on. A pass that is not named keeps its default.
        lowering: ``"inductor"`` generates code; ``"eager"`` runs the planned graphs as they are.
        strict: raise when a pass fails, instead of undoing the pass and going on.
        cost: where the seconds of an operator come from: the device table, or a measurement.
        device: a name in the device table, or None for the device that the model is on.
        solver: how plans are searched; ``"auto"`` refines the greedy plan while time is left.
        solver_seconds: limit of the search, per graph, in seconds of its own work.
        repeats: how many times in a step a graph runs forward before its first backward, as one
            does that blocks share which are compiled one by one. All of them are in the budget.
        mode: a mode of ``torch.compile``, handed on to Inductor.
        inductor: patches to Inductor's own configuration, by dotted name.
        plan: path of a saved plan to replay instead of searching, or None.
    """

    memory_budget: Budget = field(default_factory=Budget)
    passes: Settings = field(default_factory=Settings)
    lowering: Literal["inductor", "eager"] = "inductor"
    strict: bool = False
    cost: Literal["roofline", "measured"] = "roofline"
    device: str | None = None
    solver: Literal["auto", "greedy", "exact"] = "auto"
    solver_seconds: float = 5.0
    repeats: int = 1
    mode: str | None = None
    inductor: Settings = field(default_factory=Settings)
    plan: str | None = None

    @classmethod
    def from_options(
        cls,
        options: Mapping[str, object] | None = None,
        *,
        mode: str | None = None,
        known_passes: KnownPasses | None = None,
    ) -> "Config":
        """Validate what a user wrote.

        Args:
            options: as given to ``torch.compile(..., options=options)``.
            mode: as given to ``torch.compile(..., mode=mode)``.
            known_passes: the option names of every pass, by pass name; None leaves the names in
                ``options["passes"]`` unchecked.

        Raises:
            ConfigError: an option is unknown, of the wrong type, or out of range.
        """
        if options is not None and not isinstance(options, Mapping):
            raise ConfigError(
                f"options must be a mapping of names to values, not {shown(options)}"
            )
        given = dict(options or {})
        known = [f.name for f in dataclasses.fields(cls)]
        for name in given:
            if name not in known:
                note = "; Inductor's own options go under 'inductor'"
                raise unknown("option", name, known, note=note)
        if mode is not None and given.setdefault("mode", mode) != mode:
            raise ConfigError(
                f"mode={mode!r} and option 'mode' = {shown(given['mode'])} disagree; give one of "
                "them"
            )
        values: dict[str, Any] = {name: _PARSERS[name](name, v) for name, v in given.items()}
        config = cls(**values)
        if known_passes is not None:
            _check_passes(config.passes, known_passes)
        return config

    def enabled(self, pass_name: str, *, default: bool = True) -> bool:
        """Whether a pass runs: options for it, even none, count as yes."""
        return self.passes.get(pass_name, default) is not False

    def pass_options(self, pass_name: str) -> Mapping[str, object]:
        """The options given for a pass; empty where it was only switched, or not named."""
        setting = self.passes.get(pass_name)
        return setting if isinstance(setting, Settings) else Settings()

    def key(self) -> str:
        """Every option as one line of JSON: equal for equal configurations, in any process."""
        values = {f.name: _thaw(getattr(self, f.name)) for f in dataclasses.fields(self)}
        return json.dumps(values, sort_keys=True, separators=(",", ":"))


def unknown(kind: str, name: object, known: Collection[str], *, note: str = "") -> ConfigError:
    """The error for a name that is not in ``known``; it names the nearest one that is."""
    near = difflib.get_close_matches(_words(name), known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    allowed = ", ".join(sorted(known)) or "none"
    return ConfigError(f"unknown {kind} {shown(name)}; {hint}known: {allowed}{note}")


def _wrong(name: str, value: object, allowed: str) -> ConfigError:
    return ConfigError(f"option {name!r} = {shown(value)}: allowed is {allowed}")


def _words(value: object) -> str:
    return value.lower() if isinstance(value, str) else shown(value).lower()


def _check_passes(passes: Settings, known: KnownPasses) -> None:
    for name, setting in passes.items():
        if name not in known:
            raise unknown("pass", name, known)
        for option in setting if isinstance(setting, Settings) else ():
            if option not in known[name]:
                raise unknown(f"option of pass {name!r}:", option, known[name])


def _freeze(path: str, value: object, depth: int) -> object:
    """``value`` made of tuples, ``Settings`` and plain scalars; ``path`` is for the error."""
    if depth > _DEEPEST:  # or a container is inside itself
        name = path.split(".")[0].split("[")[0]
        raise ConfigError(f"option {name!r} is nested deeper than the {_DEEPEST} levels allowed")
    if isinstance(value, Mapping):
        return _settings(path, value, depth)
    if isinstance(value, list | tuple):
        return tuple(_freeze(f"{path}[{i}]", item, depth + 1) for i, item in enumerate(value))
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if callable(serialise := getattr(value, "to_json", None)):  # a plan
        value = serialise()
    finite = not isinstance(value, int | float) or math.isfinite(as_float(value))
    if finite and (value is None or isinstance(value, bool | int | float | str)):
        return value
    allowed = "a bool, finite number, string, None, or a list or mapping of these"
    raise _wrong(path, value, f"{allowed}: it becomes part of the compile cache's key")


def _thaw(value: object) -> object:
    if isinstance(value, Budget):
        return str(value)
    if isinstance(value, Settings):
        return value.to_dict()
    return [_thaw(item) for item in value] if isinstance(value, tuple) else value


def _settings(name: str, value: object, depth: int = 0) -> Settings:
    if not isinstance(value, Mapping):
        raise _wrong(name, value, "a mapping of names to values")
    for key in value:
        if not isinstance(key, str):
            raise ConfigError(f"option {name!r} has the key {shown(key)}: allowed are strings")
    frozen = ((key, _freeze(f"{name}.{key}", value[key], depth + 1)) for key in sorted(value))
    return Settings(tuple(frozen))


def _passes(name: str, value: object) -> Settings:
    settings = _settings(name, value)
    for pass_name, setting in settings.items():
        if not isinstance(setting, bool | Settings):
            allowed = "True (on), False (off), or a mapping of the pass's options"
            raise _wrong(f"{name}.{pass_name}", setting, allowed)
    return settings


def _bool(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise _wrong(name, value, "True or False")
    return value


def _seconds(name: str, value: object) -> float:
    seconds = as_float(value) if isinstance(value, Real) else math.nan
    if isinstance(value, bool) or not 0 < seconds < math.inf:
        raise _wrong(name, value, "a finite number of seconds above 0, such as 5.0")
    return seconds


def _count(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise _wrong(name, value, "an int of at least 1, such as the number of blocks")
    return int(value)


def _text(name: str, value: object) -> str | None:
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if value is not None and not (isinstance(value, str) and value.strip()):
        raise _wrong(name, value, "None or a string that is not empty")
    return value


def _one_of(*allowed: str | None) -> Callable[[str, object], str | None]:
    def parse(name: str, value: object) -> str | None:
        if value is None and None in allowed:
            return None
        if isinstance(value, str) and value in allowed:
            return value
        words = [word for word in allowed if word]
        near = difflib.get_close_matches(_words(value), words, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise _wrong(name, value, " or ".join(repr(word) for word in allowed) + hint)

    return parse


_PARSERS: Mapping[str, Callable[[str, object], object]] = {
    "memory_budget": lambda name, value: Budget.parse(value),
    "passes": _passes,
    "lowering": _one_of("inductor", "eager"),
    "strict": _bool,
    "cost": _one_of("roofline", "measured"),
    "device": _text,
    "solver": _one_of("auto", "greedy", "exact"),
    "solver_seconds": _seconds,
    "repeats": _count,
    "mode": _one_of(None, *MODES),
    "inductor": _settings,
    "plan": _text,
}
