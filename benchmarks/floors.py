"""The paper's work, the bare matrix products that it needs, and what times the two beside each other."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv
from torch import nn

from sb3_dppo import DPPO
from sb3_dppo.policies import PAPER_POLICY_KWARGS

OBS_DIM, ACTION_DIM, HORIZON = 11, 3, 4
N_ENVS, N_DECISIONS, BATCH_SIZE, N_EPOCHS = 40, 500, 50_000, 5
FT_STEPS = 10

Call = Callable[[], Any]


class NoOpVecEnv(VecEnv):
    """
    Envs of Hopper's spaces that take no time.

    :param n_envs: Number of envs.
    """

    def __init__(self, n_envs: int) -> None:
        obs_space = spaces.Box(-np.inf, np.inf, (OBS_DIM,))
        super().__init__(n_envs, obs_space, spaces.Box(-1.0, 1.0, (ACTION_DIM,)))
        rng = np.random.default_rng(0)
        self.obs: np.ndarray = rng.standard_normal((n_envs, OBS_DIM), dtype=np.float32)
        self.rewards = rng.random(n_envs, dtype=np.float32)
        self.dones = np.zeros(n_envs, dtype=bool)
        self.infos: list[dict[str, Any]] = [{} for _ in range(n_envs)]

    def reset(self) -> np.ndarray:
        return self.obs

    def step_async(self, actions: np.ndarray) -> None:
        pass

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        return self.obs, self.rewards, self.dones, self.infos

    def close(self) -> None:
        pass

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [None] * self.num_envs

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        pass

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        return [None] * self.num_envs

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        return [False] * self.num_envs


def make_model(env: VecEnv | None = None, policy: str = "DiffusionMlpPolicy", **kwargs: Any) -> DPPO:
    """
    :param env: The envs; ``None`` means one that takes no time.
    :param policy: The policy.
    :param kwargs: Arguments of ``DPPO`` that differ from the paper's.
    :return: A model for the paper's work.
    """
    env = NoOpVecEnv(N_ENVS) if env is None else env
    policy_kwargs = PAPER_POLICY_KWARGS | kwargs.pop("policy_kwargs", {})
    arguments = dict(
        n_steps=N_DECISIONS * HORIZON,
        batch_size=BATCH_SIZE,
        n_epochs=N_EPOCHS,
        ft_denoising_steps=FT_STEPS,
        clip_range=0.01,
        min_sampling_std=0.1,
        min_logprob_std=0.1,
        compile="auto",  # on a GPU, CUDA graphs
        policy_kwargs=policy_kwargs,
    )
    model = DPPO(policy, env, **(arguments | kwargs))
    model.set_random_seed(0)
    # What is measured is time: base steps without demonstrations are as good as any.
    model.pretrained_on_demonstrations = True
    model._setup_learn(total_timesteps=10**9)
    model.policy.set_training_mode(False)
    return model


# ------------------------------------------------------------------ floors


def linear_products(batch_size: int, sizes: list[tuple[int, int]], device: str, backward: bool = False) -> Call:
    """
    :param batch_size: Rows.
    :param sizes: Input and output size of each layer.
    :param device: Where.
    :param backward: Whether to include the products for the gradients: of all weights, and of all inputs but the first.
    :return: The bare matrix products of a multilayer perceptron, into memory that exists.
    """
    layers = []
    for n_in, n_out in sizes:
        x, weight = th.randn(batch_size, n_in, device=device), th.randn(n_in, n_out, device=device)
        y = th.empty(batch_size, n_out, device=device)
        layers.append((x, weight, y, th.empty_like(weight), th.empty_like(x)))

    def run() -> None:
        for x, weight, y, _, _ in layers:
            th.mm(x, weight, out=y)
        if backward:
            for i, (x, weight, y, weight_grad, x_grad) in reversed(list(enumerate(layers))):
                th.mm(x.t(), y, out=weight_grad)
                if i > 0:
                    th.mm(y, weight.t(), out=x_grad)

    return run


def chain_products(batch_size: int, inference_steps: int, ft_steps: int, device: str) -> Call:
    """
    :param batch_size: Decisions.
    :param inference_steps: Denoising steps.
    :param ft_steps: How many of them are fine-tuned.
    :param device: Where.
    :return: The bare products of a denoising chain: what does not change along it once, then each step's.
    """
    chunk, width, time_dim = HORIZON * ACTION_DIM, 512, 16
    calls = []
    for n_steps in (inference_steps - ft_steps, ft_steps):
        if n_steps > 0:
            # Two denoisers with weights of their own: the base and the fine-tuned one.
            calls.append(linear_products(batch_size, [(OBS_DIM, width)], device))
            calls.append(
                linear_products(n_steps, [(time_dim, 2 * time_dim), (2 * time_dim, time_dim), (time_dim, width)], device)
            )
            step = linear_products(batch_size, [(chunk, width), (width, width), (width, width), (width, chunk)], device)
            calls += [step] * n_steps
    return in_sequence(calls)


def critic_products(batch_size: int, device: str, backward: bool = False) -> Call:
    """
    :param batch_size: Decisions.
    :param device: Where.
    :param backward: See :func:`linear_products`.
    :return: The critic's bare products.
    """
    return linear_products(batch_size, [(OBS_DIM, 256), (256, 256), (256, 256), (256, 1)], device, backward)


def update_products(n_pairs: int, n_values: int, device: str) -> Call:
    """
    :param n_pairs: Pairs of a minibatch.
    :param n_values: The critic's decisions in it.
    :param device: Where.
    :return: The bare products of a gradient step.
    """
    inputs = HORIZON * ACTION_DIM + 16 + OBS_DIM
    actor = linear_products(n_pairs, [(inputs, 512), (512, 512), (512, 512), (512, HORIZON * ACTION_DIM)], device, True)
    return in_sequence([actor, critic_products(n_values, device, True)])


def recorded_products(network: nn.Module, call: Call, backward: bool = False) -> Call:
    """
    :param network: A network of linear layers and convolutions.
    :param call: Runs it once.
    :param backward: Whether to include the products for the gradients.
    :return: The bare products of its layers.
    """
    calls: list[Call] = []

    def record(layer: Any, inputs: tuple[th.Tensor, ...], output: th.Tensor) -> None:
        x, weight, y = inputs[0].detach(), layer.weight.detach(), th.randn_like(output)
        if isinstance(layer, nn.Linear):
            x, y = x.flatten(0, -2), y.flatten(0, -2)
            calls.append(lambda: th.mm(x, weight.t()))
            if backward:
                calls.append(lambda: (th.mm(y.t(), x), th.mm(y, weight)))
        else:
            options = (layer.stride, layer.padding, layer.dilation)
            calls.append(lambda: th.conv1d(x, weight, None, *options, layer.groups))
            if backward:
                backward_convolution = th.ops.aten.convolution_backward
                masks = [True, True, False]
                calls.append(lambda: backward_convolution(y, x, weight, None, *options, False, [0], layer.groups, masks))

    layers = [layer for layer in network.modules() if isinstance(layer, (nn.Linear, nn.Conv1d))]
    handles = [layer.register_forward_hook(record) for layer in layers]  # type: ignore[arg-type]
    call()
    for handle in handles:
        handle.remove()
    return in_sequence(calls)


def in_sequence(calls: list[Call]) -> Call:
    """
    :param calls: Calls.
    :return: One call that makes them.
    """

    def run() -> None:
        for call in calls:
            call()

    return run


def repeated(call: Call, times: int) -> Call:
    """
    :param call: A call.
    :param times: How often.
    :return: One call that makes it so often.
    """
    return in_sequence([call] * times)


# ------------------------------------------------------------------ time


def wait(device: str) -> None:
    """
    :param device: Where work may still be under way.
    """
    if device == "cuda":
        th.cuda.synchronize()


def timed(call: Call, device: str) -> float:
    """
    :param call: What to time.
    :param device: Where it runs.
    :return: Seconds.
    """
    wait(device)
    start = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - start


def measure(calls: dict[str, tuple[Call, Call]], rounds: int, device: str, compute_on_threads: bool = True) -> dict[str, Any]:
    """
    :param calls: For each measurement what to time and its floor.
    :param rounds: How often; the two take turns.
    :param device: Where they run.
    :param compute_on_threads: ``False`` times the floors on one CPU thread, as small batches run.
    :return: Median, quartiles, median floor and ratio of the medians.
    """
    results = {}
    for name, (call, floor) in calls.items():
        n_threads = th.get_num_threads()
        times: list[float] = []
        floors: list[float] = []
        for i in range(rounds + 1):
            times.append(timed(call, device))
            if not compute_on_threads:
                th.set_num_threads(1)
            floors.append(timed(floor, device))
            th.set_num_threads(n_threads)
            if i == 0:  # warm-up
                times.clear()
                floors.clear()
        results[name] = row(times, floors)
    return results


def row(times: list[float], floors: list[float]) -> dict[str, float]:
    """
    :param times: Seconds.
    :param floors: Seconds of the floor.
    :return: One row of the table.
    """
    median, floor = float(np.median(times)), float(np.median(floors))
    q1, q3 = (float(q) for q in np.quantile(times, [0.25, 0.75]))
    return dict(median_s=median, q1_s=q1, q3_s=q3, floor_s=floor, ratio=median / floor)
