"""Names to objects, with a suggestion for a near miss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from dtr.errors import RecipeError, did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """A named collection that is filled by decorator and refuses unknown names.

    >>> MIXERS: Registry[type] = Registry("mixer")
    >>> @MIXERS.register("gated_deltanet")
    ... class GatedDeltaNet: ...
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._items: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        assert name not in self._items, f"{self._what} '{name}' is registered twice"

        def keep(item: T) -> T:
            self._items[name] = item
            return item

        return keep

    def __getitem__(self, name: str) -> T:
        if name not in self._items:
            raise RecipeError(
                self._what, got=f"'{name}'", expected=f"a known {self._what}", hint=did_you_mean(name, self._items)
            )
        return self._items[name]

    def __contains__(self, name: object) -> bool:
        return name in self._items

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._items))
