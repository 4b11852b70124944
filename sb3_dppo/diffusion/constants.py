"""What many chains have in common, computed once."""

from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch as th


class Constants:
    """
    Values that follow from weights alone. They are kept while, as in a rollout, nothing learns; for a single decision they
    cost as much as what depends on its observation.
    """

    def __init__(self) -> None:
        self._kept: dict[Hashable, tuple[list[th.Tensor], tuple[int, ...] | None, Any]] | None = None

    @contextmanager
    def keep(self) -> Iterator[None]:
        """
        While networks are not exchanged. Weights may change: what follows from them is computed anew. What writes into
        ``parameter.data``, or as fused optimisers do unseen by autograd, has to be followed by :meth:`clear`.
        """
        before, self._kept = self._kept, {}
        try:
            yield
        finally:
            self._kept = before

    def clear(self) -> None:
        """Compute all of them anew."""
        if self._kept is not None:
            self._kept = {}

    def get(self, key: Hashable, weights: Callable[[], Iterable[th.Tensor]], compute: Callable[[], Any]) -> Any:
        """
        :param key: What is wanted.
        :param weights: What it follows from.
        :param compute: Computes it.
        :return: The value.
        """
        if self._kept is None:
            return compute()
        tensors, version, value = self._kept.get(key, ([], None, None))
        if version != _version(tensors):
            tensors = list(weights())
            value = compute()
            self._kept[key] = tensors, _version(tensors), value
        return value


def _version(tensors: list[th.Tensor]) -> tuple[int, ...]:
    """Where tensors are, and how often they were changed in place."""
    return tuple(number for tensor in tensors for number in (tensor.data_ptr(), tensor._version))
