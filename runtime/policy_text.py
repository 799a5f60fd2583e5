"""Policies as a person types them: `coverage tau=0.85 interval=10 cache=0.05`.

An option is a field of the policy's class, read as the field's type says; a policy inside another
(the one whose count `random` takes) shares its options. `cache` and the further fields of
`StepCache` make a step cache beside the policy; with `tea`, a file of `calibrate-cache`, or with
`coefficients` it is a `TeaCache`.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import sys
from dataclasses import MISSING, Field, fields, is_dataclass
from types import NoneType, UnionType
from typing import (
    TYPE_CHECKING,
    Any,
    Literal,
    NamedTuple,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from ditrim.plugins.errors import UsageError

if TYPE_CHECKING:
    from ditrim.engines.sets.engine_set import EngineSet
    from ditrim.runtime.caches.step_cache import Cache
    from ditrim.runtime.policy import Policy

# Name -> where its class is; imported at use.
POLICIES: dict[str, str] = {
    "full": "ditrim.runtime.policy:FullContext",
    "topi": "ditrim.runtime.policies.topi:ToPi",
    "coverage": "ditrim.runtime.policies.topi:CoverageToPi",
    "random": "ditrim.runtime.policies.baselines:RandomDrop",
    "tokendrop": "ditrim.runtime.policies.tokendrop:TokenDrop",
    "ibtm": "ditrim.runtime.policies.importance_merge:ImportanceMerge",
    "tomesd": "ditrim.runtime.policies.baselines:ToMeSD",
    "toma": "ditrim.runtime.policies.baselines:ToMA",
    "auto": "ditrim.runtime.policies.auto:Auto",
}
_THRESHOLD = "cache"  # a step cache's threshold, under the name that a person types
_TEA_FILE = "tea"
_TRUTHS = {"true": True, "false": False, "yes": True, "no": False}


class PolicyChoice(NamedTuple):
    """A policy and the step cache beside it, if there is one."""

    policy: Policy
    cache: Cache | None


def policy_from_text(
    text: str, model: str | None = None, engine_set: EngineSet | None = None
) -> PolicyChoice:
    """Read a policy.

    Args:
        text: a name of `POLICIES` and `option=value` pairs, apart by spaces.
        model: the engine set's model, for defaults that differ between models.
        engine_set: what a file of `calibrate-cache` must have been measured on; none takes any.

    Raises:
        UsageError: names the policy, the option and what is allowed.
    """
    if engine_set is not None:
        model = engine_set.manifest.model
    words = text.split()
    if not words:
        raise UsageError(f"the policy is empty; allowed: {', '.join(POLICIES)}")
    name, given = words[0], _pairs(words)
    cls = policy_class(name)
    policy_options, cache_options = _options(cls), _cache_options()
    for option in given:
        if option not in policy_options and option not in cache_options:
            raise UsageError(_unknown(name, option, [*policy_options, *cache_options]))
    cached = {key: given.pop(key) for key in list(given) if key not in policy_options}
    values = {key: _value(name, key, word, policy_options[key]) for key, word in given.items()}
    read = {key: _value(name, key, word, cache_options[key]) for key, word in cached.items()}
    try:
        return PolicyChoice(_build(cls, values, model), _cache(read, engine_set))
    except UsageError as error:
        raise UsageError(f"policy {text!r}: {error}") from error


def policy_to_text(policy: Policy, cache: Cache | None = None) -> str:
    """The shortest text that gives this policy and cache; options at their defaults are left out.

    Raises:
        UsageError: the policy's class has no name in `POLICIES`.
    """
    where = f"{type(policy).__module__}:{type(policy).__qualname__}"
    name = next((name for name, place in POLICIES.items() if place == where), None)
    if name is None:
        raise UsageError(f"{type(policy).__qualname__} is no policy that can be written as text")
    words = [f"{key}={_word(value)}" for key, value in _changed(policy).items()]
    if cache is not None:
        words += [
            f"{_THRESHOLD if key == 'threshold' else key}={_word(value)}"
            for key, value in _changed(cache).items()
        ]
    return " ".join([name, *words])


def policy_class(name: str) -> Any:
    """The class of a policy's name.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in POLICIES:
        near = difflib.get_close_matches(name, POLICIES, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UsageError(f"policy {name!r} is unknown; allowed: {', '.join(POLICIES)}{hint}")
    module, attribute = POLICIES[name].split(":")
    return getattr(importlib.import_module(module), attribute)


def options_of(name: str) -> dict[str, str]:
    """The options of a policy and what each takes, in words."""
    return {option: _allowed(hint) for option, hint in _options(policy_class(name)).items()}


def cache_options() -> dict[str, str]:
    """The options of a step cache and what each takes, in words."""
    return {option: _allowed(hint) for option, hint in _cache_options().items()}


def split_label(text: str) -> tuple[str, str]:
    """`label: policy` as (label, policy); the policy is its own label where none is given.

    Raises:
        UsageError: nothing stands before or after the colon.
    """
    label, colon, rest = text.partition(":")
    if not colon:
        label = rest = text
    label, rest = " ".join(label.split()), " ".join(rest.split())
    if not label or not rest:
        raise UsageError(f"--policy {text!r}: give 'policy option=value ...' or 'label: policy'")
    return label, rest


def _pairs(words: list[str]) -> dict[str, str]:
    given: dict[str, str] = {}
    for word in words[1:]:
        key, equals, value = word.partition("=")
        key = key.replace("-", "_")
        if not equals or not key or not value:
            raise UsageError(
                f"policy {' '.join(words)!r}: {word!r} is no option; write option=value"
            )
        if key in given:
            raise UsageError(f"policy {' '.join(words)!r}: {key} is given twice")
        given[key] = value
    return given


def _unknown(name: str, option: str, allowed: list[str]) -> str:
    near = difflib.get_close_matches(option, allowed, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"policy {name} has no option {option!r}; allowed: {', '.join(allowed)}{hint}"


@functools.lru_cache
def _hints(cls: Any) -> dict[str, tuple[Field[Any], Any]]:
    """Return the fields of a dataclass with their types.

    Types are looked up one by one, where their class was written: other annotations of the class
    may name what is imported for type checking only.
    """
    found = {}
    for field in fields(cls):
        if not field.init or field.name.startswith("_"):
            continue
        home = next(c for c in cls.__mro__ if field.name in vars(c).get("__annotations__", {}))
        alone = type(home.__name__, (), {"__annotations__": {field.name: field.type}})
        hints = get_type_hints(alone, globalns=vars(sys.modules[home.__module__]))
        found[field.name] = (field, hints[field.name])
    return found


def _is_policy(hint: Any) -> bool:
    return is_dataclass(hint)


def _options(cls: Any) -> dict[str, Any]:
    """Option -> type; the class's own come before those of a policy inside it."""
    own = {name: hint for name, (_, hint) in _hints(cls).items() if not _is_policy(hint)}
    inner: dict[str, Any] = {}
    for _, hint in _hints(cls).values():
        if _is_policy(hint):
            inner |= {key: kind for key, kind in _options(hint).items() if key not in inner}
    own.pop("model", None)  # the engine set says
    return own | {key: kind for key, kind in inner.items() if key not in own}


def _cache_options() -> dict[str, Any]:
    from ditrim.runtime.caches.step_cache import StepCache, TeaCache

    hints = _hints(StepCache) | _hints(TeaCache)
    renamed = {
        (_THRESHOLD if key == "threshold" else key): hint for key, (_, hint) in hints.items()
    }
    return renamed | {_TEA_FILE: str}


def _cache(values: dict[str, Any], engine_set: EngineSet | None) -> Cache | None:
    """The step cache that the options ask for."""
    from ditrim.runtime.caches.calibration import load_calibration, load_tea_cache
    from ditrim.runtime.caches.step_cache import StepCache, TeaCache

    if not values:
        return None
    if _THRESHOLD not in values:
        raise UsageError(
            f"{next(iter(values))} is the step cache's: say when a step is reused with "
            f"{_THRESHOLD}=<threshold>"
        )
    rest = dict(values)
    threshold, file = rest.pop(_THRESHOLD), rest.pop(_TEA_FILE, None)
    if file is not None:
        others = [key for key in rest if key != "max_reuses"]
        if others:
            raise UsageError(f"{_TEA_FILE}={file} says {others[0]} already; leave it out")
        if engine_set is None:
            return load_calibration(file).cache(threshold, rest.get("max_reuses"))
        return load_tea_cache(file, engine_set, threshold=threshold, **rest)
    if "coefficients" in rest:
        return TeaCache(threshold=threshold, **rest)
    if "measured" in rest:
        raise UsageError("measured goes with coefficients")
    return StepCache(threshold=threshold, **rest)


def _build(cls: Any, values: dict[str, Any], model: str | None) -> Any:
    """An instance; `values` that are not the class's own go to the policies inside it."""
    hints = _hints(cls)
    arguments = {key: value for key, value in values.items() if key in hints}
    rest = {key: value for key, value in values.items() if key not in hints}
    for name, (field, hint) in hints.items():
        if _is_policy(hint):
            for_it = {key: value for key, value in rest.items() if key in _options(hint)}
            has_default = not (field.default is MISSING and field.default_factory is MISSING)
            if for_it or not has_default or "model" in _hints(hint):
                arguments[name] = _build(hint, for_it, model)
        elif name == "model" and model is not None:
            arguments[name] = model
    return cls(**arguments)


def _changed(item: Any) -> dict[str, Any]:
    """Fields that are not at their defaults; those of policies inside come last."""
    cls: Any = type(item)
    hints = _hints(cls)
    own: dict[str, Any] = {}
    inner: dict[str, Any] = {}
    for name, (field, hint) in hints.items():
        value = getattr(item, name)
        if _is_policy(hint):
            inner = _changed(value) | inner
        elif name != "model" and (field.default is MISSING or value != field.default):
            own[name] = value
    return own | {name: value for name, value in inner.items() if name not in hints}


def _value(name: str, option: str, word: str, hint: Any) -> Any:
    try:
        return _read(word, hint)
    except ValueError:
        raise UsageError(
            f"policy {name}: {option} must be {_allowed(hint)}, got {word!r}"
        ) from None


def _read(word: str, hint: Any) -> Any:
    """A word as a type says; raises `ValueError`."""
    origin, parts = get_origin(hint), get_args(hint)
    named: dict[Any, dict[str, Any]] = {bool: _TRUTHS, NoneType: {"none": None}}
    if hint in named:
        return _chosen(word.lower(), named[hint])
    if hint in (int, float, str):
        return hint(word)
    if origin is Literal:
        return _chosen(word, {str(part): part for part in parts})
    if origin in (Union, UnionType):
        return _read_any(word, parts)
    if origin is tuple:
        return tuple(_read(part, parts[0]) for part in word.split(","))
    raise UsageError(f"an option of the type {hint} cannot be written as text")


def _chosen(word: str, values: dict[str, Any]) -> Any:
    if word not in values:
        raise ValueError
    return values[word]


def _read_any(word: str, hints: tuple[Any, ...]) -> Any:
    """A word as the first type that takes it says.

    A whole number stays one where both kinds are allowed; text is tried last.
    """
    order = [NoneType, bool, int, float]
    for hint in sorted(hints, key=lambda p: order.index(p) if p in order else len(order)):
        try:
            return _read(word, hint)
        except ValueError:
            continue
    raise ValueError


def _word(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(_word, value))
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


def _allowed(hint: Any) -> str:
    """Return the values that a type takes, in words."""
    origin, parts = get_origin(hint), get_args(hint)
    plain = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}
    if hint is NoneType:
        return "none"
    if hint in plain:
        return plain[hint]
    if origin is Literal:
        return f"one of {', '.join(map(str, parts))}"
    if origin in (Union, UnionType):
        kinds = [p for p in parts if not (p is int and float in parts)]
        return " or ".join(_allowed(part) for part in kinds)
    if origin is tuple:
        return f"{_allowed(parts[0])}, or several with commas between"
    return str(hint)
