"""How the networks are run: CPU threads, precision, compiled functions and CUDA graphs. What they compute stays the same."""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import count
from types import FunctionType, MethodType
from typing import Any

import torch as th

logger = logging.getLogger(__name__)

COMPILE_OPTIONS = (False, True, "auto")
PRECISIONS = ("float32", "tf32", "bfloat16")
# Up to this many decisions at once are denoised on one CPU thread.
ONE_THREAD_BATCH_SIZE = 256
# CUDA graphs of one function.
MAX_GRAPHS = 8
# Pairs in a slice of a minibatch on the CPU: activations of this many rows stay in its caches.
CPU_SLICE_SIZE = 3072


@contextmanager
def threads_for(batch_size: int) -> Iterator[None]:
    """Denoise small batches on one CPU thread: another gains little, and stalls where processes of envs want its core."""
    n_threads = th.get_num_threads()
    if th.compiler.is_exporting() or batch_size > ONE_THREAD_BATCH_SIZE or n_threads == 1:
        yield
        return
    th.set_num_threads(1)
    try:
        yield
    finally:
        th.set_num_threads(n_threads)


def keep_freed_memory() -> None:
    """
    Make glibc's allocator keep freed memory, up to 64 MiB, for the next activations instead of returning it to the system and
    getting it back page by page, which takes longer than an elementwise operation on it.
    """
    # Freeing a block of just under 32 MiB raises the allocator's thresholds to their largest (mallopt(3), M_MMAP_THRESHOLD).
    th.empty(2**25 - 2**16, dtype=th.uint8)


def precision_context(device: th.device, precision: str) -> AbstractContextManager[Any]:
    """A context in which linear layers and convolutions run in this precision."""
    if precision == "bfloat16":
        return th.autocast(device.type, dtype=th.bfloat16)
    return _tf32() if precision == "tf32" and device.type == "cuda" else nullcontext()


@contextmanager
def _tf32() -> Iterator[None]:
    before = th.backends.cuda.matmul.allow_tf32
    th.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        th.backends.cuda.matmul.allow_tf32 = before


class Compiled:
    """
    A method that ``torch.compile`` translates when it is first called. Where that fails, for want of a compiler for
    instance, the method runs as it is, and compilation is not tried again.

    :param function: The method.
    """

    _numbers = count()

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.failed = False
        self._compiled: dict[str, Callable[..., Any]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        # Copied and pickled without what was compiled, for it belongs to the original's function.
        return type(self), (self.function,)

    def __call__(self, device: th.device, *args: Any) -> Any:
        """
        :param device: Where the function's tensors are.
        :param args: Its arguments.
        :return: What it returns.
        """
        if self.failed:
            return self.function(*args)
        try:
            if device.type not in self._compiled:
                # A chain is hundreds of small calls: on the CPU made from C++, on the GPU recorded in a CUDA graph.
                options: dict[str, Any] = {"cpp_wrapper": True} if device.type == "cpu" else {"triton.cudagraphs": True}
                self._compiled[device.type] = th.compile(self._own_code(), options=options)
            return self._compiled[device.type](*args)
        except Exception as error:
            # If the function itself is at fault, this raises the error without the compiler's frames.
            result = self.function(*args)
            self.failed = True
            logger.info("Not compiled, but run as it is: %s", error)
            return result

    def _own_code(self) -> MethodType:
        """
        :return: The method with a code object of its own. PyTorch keeps what it compiled by code object, eight versions at
            most, and makes sizes that differed between two calls dynamic, which is slower: policies must not share one.
        """
        method: Any = self.function
        code = method.__code__.replace(co_name=f"{method.__name__}_{next(self._numbers)}")
        own = FunctionType(code, method.__globals__, code.co_name, method.__defaults__, method.__closure__)
        return MethodType(own, method.__self__)


class CudaGraphs:
    """
    A function of CUDA tensors as CUDA graphs, one per shapes and settings: a chain's many small kernels are launched as one.
    There are at most ``MAX_GRAPHS`` of them, for each holds memory: the most frequent; what else is asked for runs as it is.

    A graph repeats the kernels that it has recorded. So all that the function depends on must be in the tensors that it is
    given, in parameters that keep their addresses, or in the settings: whoever changes anything else calls :meth:`clear`.

    :param function: The function. It must not synchronise with the host.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.failed = False
        self._graphs: dict[Any, tuple[th.cuda.CUDAGraph, list[th.Tensor | None], Any]] = {}
        self._calls: Counter[Any] = Counter()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.function,)

    def clear(self) -> None:
        """Forget the graphs, which hold the addresses of the parameters."""
        self._graphs.clear()
        self._calls.clear()

    def __call__(self, tensors: Sequence[th.Tensor | None], *settings: Any) -> Any:
        """
        :param tensors: The function's first arguments.
        :param settings: Its other arguments, hashable, and equal only if the function does the same with them: all that it
            reads beside the tensors (a frozen dataclass of a sampler's settings, for instance). Another graph is recorded for
            others.
        :return: What it returns, valid until the next call.
        """
        if self.failed:
            return self.function(*tensors, *settings)
        key = (*(None if tensor is None else (tensor.shape, tensor.dtype, tensor.device) for tensor in tensors), *settings)
        self._calls[key] += 1
        if key not in self._graphs:
            if len(self._graphs) == MAX_GRAPHS:
                rarest = min(self._graphs, key=self._calls.__getitem__)
                if self._calls[key] <= self._calls[rarest]:
                    return self.function(*tensors, *settings)
                del self._graphs[rarest]
            try:
                self._graphs[key] = self._record(tensors, *settings)
            except RuntimeError as error:
                result = self.function(*tensors, *settings)
                self.failed = True
                logger.info("Not recorded as a CUDA graph, but run as it is: %s", error)
                return result
        graph, inputs, outputs = self._graphs[key]
        for static, tensor in zip(inputs, tensors, strict=True):
            if static is not None and tensor is not None:
                static.copy_(tensor)
        graph.replay()
        return outputs

    def _record(
        self, tensors: Sequence[th.Tensor | None], *settings: Any
    ) -> tuple[th.cuda.CUDAGraph, list[th.Tensor | None], Any]:
        inputs = [None if tensor is None else tensor.clone() for tensor in tensors]
        # Libraries allocate their workspaces at the first calls, which must not be recorded.
        stream = th.cuda.Stream()
        stream.wait_stream(th.cuda.current_stream())
        with th.cuda.stream(stream):
            for _ in range(3):
                self.function(*inputs, *settings)
        th.cuda.current_stream().wait_stream(stream)
        graph = th.cuda.CUDAGraph()
        with th.cuda.graph(graph):
            outputs = self.function(*inputs, *settings)
        return graph, inputs, outputs
