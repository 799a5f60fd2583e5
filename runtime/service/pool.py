"""The models of a service: loaded when they are first needed, the least recently used let go."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from ditrim.plugins.errors import UsageError
from ditrim.runtime.editing.opening import ModelSource
from ditrim.runtime.service.errors import UnknownModel
from ditrim.runtime.service.model import LoadedModel


@dataclass(slots=True)
class _Entry:
    model: LoadedModel
    users: int = 0


class ModelPool:
    """Hands out loaded models by name. Threads may share it."""

    def __init__(
        self,
        sources: Mapping[str, ModelSource],
        max_loaded: int,
        on_load: Callable[[LoadedModel], None] = lambda model: None,
    ) -> None:
        """Make a pool; nothing is loaded yet.

        Args:
            sources: what each name stands for; the first is the default.
            max_loaded: models in memory at once.
            on_load: called with a model before anybody gets it, as to warm it up.

        Raises:
            UsageError: there are no sources, or none may be loaded.
        """
        if not sources:
            raise UsageError("a service needs at least one model")
        if max_loaded < 1:
            raise UsageError(f"max_loaded is {max_loaded}; at least 1 model has to be loaded")
        self.sources = dict(sources)
        self.num_loads = 0
        self.num_evictions = 0
        self._max_loaded = max_loaded
        self._on_load = on_load
        self._changed = threading.Condition()
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._loading: set[str] = set()

    @property
    def default(self) -> str:
        """The name of the model that requests get which name none."""
        return next(iter(self.sources))

    def name_of(self, given: str | None) -> str:
        """The name of a request's model.

        Raises:
            UnknownModel: it is not served; says which are.
        """
        name = self.default if given is None else given
        if name not in self.sources:
            raise UnknownModel(f"there is no model {name!r}; served are: {', '.join(self.sources)}")
        return name

    def loaded(self, name: str) -> LoadedModel | None:
        """A model if it is in memory."""
        with self._changed:
            entry = self._entries.get(name)
            return None if entry is None else entry.model

    def names_loaded(self) -> tuple[str, ...]:
        """Names of the models in memory, the most recently used last."""
        with self._changed:
            return tuple(self._entries)

    @contextmanager
    def borrow(self, name: str) -> Iterator[LoadedModel]:
        """A model that stays loaded inside the block; loads it where it is not.

        Raises:
            UsageError, EngineSetError, DitrimError: it cannot be loaded.
        """
        entry = self._take(name)
        if entry is None:
            entry = self._load(name)
        try:
            yield entry.model
        finally:
            with self._changed:
                entry.users -= 1
                self._changed.notify_all()

    def close(self) -> None:
        """Let go of every model; those that are in use when their edits end."""
        with self._changed:
            entries = list(self._entries.values())
            self._entries.clear()
        for entry in entries:
            entry.model.close()

    def _take(self, name: str) -> _Entry | None:
        """A loaded model, counted as used; none where this thread is to load it."""
        with self._changed:
            while True:
                entry = self._entries.get(name)
                if entry is not None:
                    entry.users += 1
                    self._entries.move_to_end(name)
                    return entry
                if name not in self._loading and self._make_room():
                    self._loading.add(name)
                    return None
                self._changed.wait()

    def _make_room(self) -> bool:
        """Let go of the least recently used models that nobody uses; whether one more may load."""
        for name in [name for name, entry in self._entries.items() if entry.users == 0]:
            if len(self._entries) + len(self._loading) < self._max_loaded:
                break
            self._entries.pop(name).model.close()
            self.num_evictions += 1
        return len(self._entries) + len(self._loading) < self._max_loaded

    def _load(self, name: str) -> _Entry:
        try:
            model = LoadedModel(name, self.sources[name])
            self._on_load(model)
            entry = _Entry(model, users=1)
            with self._changed:
                self._entries[name] = entry
                self.num_loads += 1
            return entry
        finally:
            with self._changed:
                self._loading.discard(name)
                self._changed.notify_all()
