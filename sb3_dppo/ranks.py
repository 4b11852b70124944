"""
Training in several processes, the *ranks*, each with envs of its own: what they tell each other (torch.distributed). Alone, a
process is the only rank and nothing is sent.
"""

import atexit
import faulthandler
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch as th
import torch.distributed as dist
from torch import nn

# After so long without progress a rank ends, and with it all; 0 means never.
HANG_SECONDS = float(os.environ.get("SB3_DPPO_HANG_SECONDS", 60))
_last_progress = 0.0
_is_watched = False


def join() -> None:
    """Join the other ranks, if torchrun has started this process as one of several."""
    if not dist.is_available() or dist.is_initialized() or int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    if not dist.is_torchelastic_launched():  # WORLD_SIZE may be there for another reason.
        return
    if th.cuda.is_available():
        th.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # Imported later, as optimizers do, it would hold the group in default arguments (group.WORLD) for ever, and with it Gloo's
    # threads: one that still frees a tensor while the interpreter ends aborts the process.
    import torch.distributed.nn  # noqa: F401

    # Tensors of a GPU go by NCCL, others by Gloo.
    dist.init_process_group("cpu:gloo,cuda:nccl" if th.cuda.is_available() else "gloo")
    atexit.register(leave)


def leave() -> None:
    """Leave the other ranks."""
    if dist.is_initialized():
        dist.destroy_process_group()


def launched_rank() -> int:
    """The number that torchrun has given to this process, also before it has joined the others; 0 without torchrun."""
    return int(os.environ.get("RANK", 0)) if dist.is_available() and dist.is_torchelastic_launched() else 0


def size() -> int:
    """How many ranks there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this one, from 0."""
    return dist.get_rank() if size() > 1 else 0


def progress() -> None:
    """
    Say that this rank is not stuck, in a simulator for instance. One that is prints where and ends, whereupon torchrun ends
    the others, which would wait for it. To wait for others, who may be busy with an evaluation, is not to be stuck.
    """
    global _last_progress
    if _is_watched and size() > 1 and HANG_SECONDS > 0 and time.monotonic() - _last_progress > HANG_SECONDS / 10:
        _last_progress = time.monotonic()
        faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)


def rest() -> None:
    """Nobody expects progress until the next call of :func:`progress`."""
    global _last_progress
    if size() > 1:
        faulthandler.cancel_dump_traceback_later()
        _last_progress = 0.0


@contextmanager
def watched() -> Iterator[None]:
    """Expect progress."""
    global _is_watched
    before, _is_watched = _is_watched, True
    try:
        yield
    finally:
        _is_watched = before
        rest()


@contextmanager
def _waiting() -> Iterator[None]:
    rest()
    yield
    progress()


def sum_over_ranks(tensors: Iterable[th.Tensor]) -> None:
    """Add up each of these tensors, in place and all at once."""
    if size() == 1:
        return
    tensors = list(tensors)
    flat = th.cat([tensor.detach().flatten() for tensor in tensors])
    with _waiting():
        dist.all_reduce(flat)
    for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.detach().copy_(total.view_as(tensor))


def gather(value: Any) -> list[Any]:
    """What each rank passes, in their order."""
    values: list[Any] = [value]
    if size() > 1:
        values = values * size()
        with _waiting():
            dist.all_gather_object(values, value)
    return values


def all_agree(vote: bool) -> bool:
    """Whether all ranks vote for it."""
    return all(gather(vote))


def moments(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """
    :param values: Shape (n, ...); there may be another n in each rank.
    :return: Mean and variance of those of all ranks, shape (...), and their number.
    """
    parts = gather((np.mean(values, axis=0), np.var(values, axis=0), len(values)))
    if len(parts) == 1:
        return parts[0]
    means, variances, counts = (np.stack([part[i] for part in parts]) for i in range(3))
    weights = (counts / counts.sum()).reshape(-1, *[1] * values[0].ndim)
    mean = (weights * means).sum(axis=0)
    return mean, (weights * (variances + (means - mean) ** 2)).sum(axis=0), int(counts.sum())


def share_random_numbers(device: th.device) -> None:
    """Let all ranks draw what the first one will, from PyTorch's generators."""
    if size() == 1:
        return
    state = th.get_rng_state()
    with _waiting():
        dist.broadcast(state, src=0)
    th.set_rng_state(state)
    if device.type == "cuda":
        state = th.cuda.get_rng_state(device)
        dist.broadcast(state, src=0)
        th.cuda.set_rng_state(state, device)


def check_same(what: str, value: Any) -> None:
    """
    :param what: What it is, for the error.
    :param value: A number or text.
    :raises ValueError: if it is not the same in all ranks.
    """
    values = gather(value)
    if any(other != values[0] for other in values):
        raise ValueError(f"{what} must be the same in all processes, not {values}.")


def same_parameters(module: nn.Module) -> None:
    """Let a network have the first rank's parameters and buffers."""
    for tensor in module.state_dict().values():
        dist.broadcast(tensor, src=0)
