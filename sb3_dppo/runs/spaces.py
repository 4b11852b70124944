"""Gymnasium's spaces as JSON, of which a stranger's asks for no more than it should."""

import math
from collections import OrderedDict
from typing import Annotated, Any, Literal

import numpy as np
from gymnasium import spaces
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

MAX_ITEMS = 256  # keys of a Dict, layers of a network, options of a class
MAX_OBSERVATION_SIZE = 2**22  # numbers in an observation or action: an image of 1024 × 1024 with four channels


def make_fields(name: str, hints: dict[str, Any]) -> Any:
    """The type of dictionaries that hold values of these types, by name, and nothing else."""
    fields = TypedDict(name, hints)  # type: ignore[misc]
    fields.__pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[attr-defined]
    return fields


def _check_shape(shape: list[int]) -> list[int]:
    if math.prod(shape) > MAX_OBSERVATION_SIZE:
        raise ValueError(f"it is of more than {MAX_OBSERVATION_SIZE} numbers")
    return shape


def _make(described: dict[str, Any]) -> spaces.Space:
    dtype: Any = np.dtype(described.get("dtype", "int64"))
    try:
        match described:
            case {"type": "Box", "shape": shape}:
                low, high = (_make_bound(name, described[name], shape, dtype) for name in ("low", "high"))
                return spaces.Box(low, high, tuple(shape), dtype)
            case {"type": "Discrete" | "MultiDiscrete" as kind, **arguments}:
                return getattr(spaces, kind)(**arguments)
            case {"type": "MultiBinary", "shape": shape}:
                return spaces.MultiBinary(shape[0] if len(shape) == 1 else shape)
    except (AssertionError, TypeError, OverflowError) as error:
        raise ValueError(f"there is no such space: {error}") from error
    # Ordered, because a Dict sorts other dictionaries, but the order is that of the normalisation's rows.
    parts, size = OrderedDict[str, spaces.Space](), 0
    for key, part in described["spaces"].items():
        parts[key] = _make(part)
        size += spaces.flatdim(parts[key])
        _check_shape([size])
    return spaces.Dict(parts)


def _make_bound(name: str, value: Any, shape: list[int], dtype: np.dtype) -> np.ndarray:
    numbers = value if isinstance(value, list) else [value]
    if len(numbers) not in (1, math.prod(shape)):
        raise ValueError(f"{name} has {len(numbers)} numbers, but the space the shape {shape}")
    try:
        with np.errstate(all="ignore"):
            array = np.array(numbers, dtype=dtype)
    except OverflowError:
        array = np.array([])
    if array.tolist() != numbers:
        raise ValueError(f"{name} has numbers that {dtype} does not hold")
    return np.broadcast_to(array, math.prod(shape)).reshape(shape).copy()


# JSON has no infinity.
Finite = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Infinity = Annotated[Literal["inf", "-inf"], AfterValidator(float)]
_Integer = Annotated[int, Field(strict=True)]
_Bounds = _Integer | Finite | Infinity | list[_Integer | Finite | Infinity]  # one for all, or one for each
_Size = Annotated[int, Field(strict=True, ge=1, le=MAX_OBSERVATION_SIZE)]
_Shape = Annotated[list[_Size], AfterValidator(_check_shape)]
_Dtype = Literal["float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]
_Part: Any = (
    make_fields("Box", dict(type=Literal["Box"], shape=_Shape, dtype=_Dtype, low=_Bounds, high=_Bounds))
    | make_fields("Discrete", dict(type=Literal["Discrete"], n=_Size, start=_Integer))
    | make_fields("MultiDiscrete", dict(type=Literal["MultiDiscrete"], nvec=list[_Size], dtype=_Dtype))
    | make_fields("MultiBinary", dict(type=Literal["MultiBinary"], shape=_Shape))
)
_Parts: Any = Annotated[dict[str, Annotated[_Part, Field(discriminator="type")]], Field(max_length=MAX_ITEMS)]
_Dict = make_fields("Dict", dict(type=Literal["Dict"], spaces=_Parts))
# What stands for a space in JSON, and becomes one.
Space: Any = Annotated[_Part | _Dict, Field(discriminator="type"), AfterValidator(_make)]


def describe_space(name: str, space: spaces.Space) -> dict[str, Any]:
    """What ``Space`` reads as this observation or action space. The name is for errors."""
    described: dict[str, Any] = dict(type=type(space).__name__)
    match space:
        case spaces.Box():
            described |= dict(shape=list(space.shape), dtype=str(space.dtype))
            described |= dict(low=_describe_bound(space.low), high=_describe_bound(space.high))
        case spaces.Discrete():
            described |= dict(n=int(space.n), start=int(space.start))
        case spaces.MultiDiscrete():
            described |= dict(nvec=space.nvec.flatten().tolist(), dtype=str(space.dtype))
        case spaces.MultiBinary():
            described |= dict(shape=list(space.shape))
        case spaces.Dict():
            described |= dict(spaces={key: describe_space(f"{name}[{key!r}]", part) for key, part in space.spaces.items()})
    try:
        if TypeAdapter(Space).validate_python(described) == space:
            return described
        reason = "it would come out as another"
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
    raise ValueError(
        f"{name}={space} can't be shared ({reason}): use a Box, Discrete, MultiDiscrete, MultiBinary or a Dict of these."
    )


def _describe_bound(bound: np.ndarray) -> Any:
    values = [value if math.isfinite(value) else str(value) for value in bound.flatten().tolist()]
    return values[0] if len(set(values)) == 1 else values
