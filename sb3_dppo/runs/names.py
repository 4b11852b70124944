"""Arguments of constructors by name."""

import difflib
import inspect
from collections.abc import Iterable
from typing import Any, get_type_hints

from stable_baselines3.common.vec_env import VecEnv


def constructor_arguments(cls: type) -> dict[str, Any]:
    """
    :param cls: A class.
    :return: The annotations of its constructor's arguments by name, with those of the classes that it hands ``**kwargs`` to,
        up to the algorithm itself.
    """
    arguments: dict[str, Any] = {}
    for base in cls.__mro__:
        parameters = inspect.signature(base.__init__).parameters.values()  # type: ignore[misc]
        named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name != "self"]
        try:
            hints = get_type_hints(base.__init__, localns=dict(VecEnv=VecEnv))  # type: ignore[misc]
        except NameError:  # names that are for type checkers only
            hints = {}
        arguments = {name: hints.get(name, Any) for name in named} | arguments
        # DPPO takes ``**unknown`` to refuse them.
        if not any(p.kind is p.VAR_KEYWORD and p.name != "unknown" for p in parameters):
            break
    return arguments


def refuse_unknown(function: str, given: Iterable[str], known: Iterable[str]) -> None:
    """
    :param function: What was called.
    :param given: Names of arguments.
    :param known: Those that it takes.
    :raises TypeError: for one that is not known, naming the one that was probably meant.
    """
    known = sorted(known)
    for name in given:
        if name not in known:
            similar = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {similar[0]!r}?" if similar else f"it takes {known}."
            raise TypeError(f"{function} got an unexpected argument {name!r}: {hint}")
