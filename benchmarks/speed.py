"""
How long DPPO's parts take, beside the bare matrix products that they need, timed in the same run.

The work is the paper's fine-tuning of Hopper: a residual actor of 3 × 512 and a critic of 3 × 256, 20 denoising steps of which
10 are fine-tuned, chunks of 4 actions, 40 envs, 500 decisions per env and rollout, minibatches of 50 000 pairs, 5 epochs.
Prints a table and, where asked, writes a JSON object and a plot. Run it with nothing else running::

    python benchmarks/speed.py --json speed.json --plot speed.png
"""

import argparse
import importlib.util
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv
from torch import nn
from tqdm import tqdm

from sb3_dppo import DPPO
from sb3_dppo.envs.envpool import EnvPoolVecEnv
from sb3_dppo.features.extractors import VitExtractor
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
        policy_kwargs=policy_kwargs,
    )
    model = DPPO(policy, env, **(arguments | kwargs))
    model.set_random_seed(0)
    # What is measured is time: base steps without demonstrations are as good as any.
    model.pretrained_on_demonstrations = True
    model._setup_learn(total_timesteps=10**9)
    model.policy.set_training_mode(False)
    return model


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


# ------------------------------------------------------------------ measurements


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


def planning(device: str, rounds: int) -> dict[str, Any]:
    """
    :param device: Where.
    :param rounds: How often.
    :return: Planning calls at several batch sizes, and a control loop's at batch 1, compiled and not.
    """
    results: dict[str, Any] = {}
    ddim: dict[str, Any] = dict(scheduler="ddim", inference_steps=5, ft_denoising_steps=5)
    compiled, compiled_ddim = make_model(device=device, compile=True), make_model(device=device, compile=True, **ddim)
    eager, eager_ddim = make_model(device=device), make_model(device=device, **ddim)
    cases = {
        "planning_b1": (compiled, 1, 20, FT_STEPS),
        "planning_b1_not_compiled": (eager, 1, 20, FT_STEPS),
        "planning_ddim5_b1": (compiled_ddim, 1, 5, 5),
        "planning_ddim5_b1_not_compiled": (eager_ddim, 1, 5, 5),
        "planning_b40": (eager, 40, 20, FT_STEPS),
        "planning_b1000": (eager, 1000, 20, FT_STEPS),
    }
    for name, (model, batch_size, steps, ft_steps) in cases.items():
        obs = th.randn(batch_size, OBS_DIM, device=device)
        floor = chain_products(batch_size, steps, ft_steps, device)

        def plan(model: DPPO = model, obs: th.Tensor = obs) -> None:
            model.policy.sample_chain(obs)

        n = max(10, 10 * rounds if batch_size > 100 else 100 * rounds)
        plan()  # compiles
        results |= measure({name: (plan, floor)}, n, device, compute_on_threads=batch_size > 100)
    if device == "cuda":
        eager_cuda, obs = make_model(device=device, compile=False), th.randn(40, OBS_DIM, device=device)
        call = (lambda: eager_cuda.policy.sample_chain(obs), chain_products(40, 20, FT_STEPS, device))
        results |= measure({"planning_b40_without_graphs": call}, 100 * rounds, device)
    return results


def rollout(model: DPPO) -> None:
    """
    :param model: A model, whose rollout buffer is filled.
    """
    _, callback = model._setup_learn(total_timesteps=10**9, reset_num_timesteps=False)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)  # type: ignore[arg-type]


def iteration_floors(device: str) -> dict[str, Call]:
    """
    :param device: Where.
    :return: The floors of a rollout, an epoch and an iteration.
    """
    n_decisions = N_ENVS * N_DECISIONS
    n_batches = n_decisions * FT_STEPS // BATCH_SIZE
    decision = in_sequence([chain_products(N_ENVS, 20, FT_STEPS, device), critic_products(N_ENVS, device)])
    gradient_step = update_products(BATCH_SIZE, n_decisions // n_batches, device)
    return dict(rollout=repeated(decision, N_DECISIONS), update_epoch=repeated(gradient_step, n_batches))


def iterations(device: str, rounds: int) -> dict[str, Any]:
    """
    :param device: Where.
    :param rounds: How often.
    :return: A rollout's compute, one epoch of updates and a whole iteration, without and with real envs.
    """
    floors = iteration_floors(device)
    model = make_model(device=device, n_epochs=1)
    envs = make_vec_env("Hopper-v5", N_ENVS, seed=0)
    envs.reset()
    real = make_model(envs, device=device)
    actions = np.zeros((N_ENVS, ACTION_DIM), dtype=np.float32)
    names = ("rollout", "update_epoch", "iteration_compute", "iteration")
    times: dict[str, list[float]] = {name: [] for name in names}
    floor_times: dict[str, list[float]] = {name: [] for name in names}
    n_threads = th.get_num_threads()
    for i in tqdm(range(rounds + 1), desc="iterations"):
        rollout_s = timed(lambda: rollout(model), device)
        epoch_s = timed(model.train, device)
        iteration_s = timed(in_sequence([lambda: rollout(real), real.train]), device)
        # Planning's floor on one thread, as planning runs.
        th.set_num_threads(1)
        rollout_floor = timed(floors["rollout"], device)
        th.set_num_threads(n_threads)
        epoch_floor = timed(floors["update_epoch"], device)
        step_s = timed(lambda: [envs.step(actions) for _ in range(N_DECISIONS * HORIZON)], device)
        if i == 0:  # warm-up
            continue
        compute_floor = rollout_floor + N_EPOCHS * epoch_floor
        for name, seconds, floor in (
            ("rollout", rollout_s, rollout_floor),
            ("update_epoch", epoch_s, epoch_floor),
            ("iteration_compute", rollout_s + N_EPOCHS * epoch_s, compute_floor),
            ("iteration", iteration_s, compute_floor + step_s),
        ):
            times[name].append(seconds)
            floor_times[name].append(floor)
    envs.close()
    return {name: row(times[name], floor_times[name]) for name in names}


def unet(device: str, rounds: int) -> dict[str, Any]:
    """
    :param device: Where.
    :param rounds: How often.
    :return: Planning and a gradient step of a UNet policy with chunks of 16 actions.
    """
    options = dict(horizon=16, net_arch=dict(pi=[64, 128], vf=[256, 256, 256]))
    n_steps, n_pairs = 16 * 50, 2500
    model = make_model(policy="DiffusionUnetPolicy", device=device, policy_kwargs=options, n_steps=n_steps, batch_size=n_pairs)
    policy, obs = model.policy, th.randn(40, OBS_DIM, device=device)
    rollout(model)
    samples = next(model.rollout_buffer.get(n_pairs))
    condition = policy.encode(policy.extract_features(obs))
    embeddings = policy.denoiser.embed_timesteps(policy.process.timesteps)
    step = recorded_products(
        policy.denoiser, lambda: policy.denoiser(th.randn(40, 16, 3, device=device), embeddings[0], condition)
    )
    gradient = recorded_products(policy, lambda: model.loss(samples), backward=True)

    def update() -> None:
        metrics = model._compute_gradients(samples)
        model._step(train_actor=True, loss=metrics["loss"])

    return measure(
        {"unet_planning_b40": (lambda: policy.sample_chain(obs), repeated(step, 20))}, 3 * rounds, device, False
    ) | measure({"unet_gradient_step": (update, gradient)}, 2 * rounds, device)


def pixels(device: str, rounds: int) -> dict[str, Any]:
    """
    :param device: Where.
    :param rounds: How often.
    :return: An epoch of updates with the vision transformer on images of 64 × 64, of 10 denoising steps beside 1 ("floor"):
        the encoder's work is that of the decisions, not of the pairs.
    """
    models = {}
    for n_steps in (10, 1):
        env = NoOpVecEnv(8)
        env.observation_space = spaces.Box(0, 255, (3, 64, 64), np.uint8)
        env.obs = np.random.default_rng(0).integers(0, 256, (8, 3, 64, 64), dtype=np.uint8)
        model = make_model(
            env,
            "DiffusionCnnPolicy",
            device=device,
            n_steps=16 * HORIZON,
            batch_size=64 * n_steps,
            n_epochs=1,
            ft_denoising_steps=n_steps,
            policy_kwargs=dict(features_extractor_class=VitExtractor),
        )
        rollout(model)
        models[n_steps] = model
    return measure({"pixels_update_epoch": (models[10].train, models[1].train)}, 3 * rounds, device)


def threads(rounds: int) -> dict[str, Any]:
    """
    :param rounds: How often.
    :return: Planning and a gradient step with torch's number of threads, beside one thread.
    """
    results: dict[str, Any] = {}
    n_threads = th.get_num_threads()
    model = make_model(device="cpu", n_epochs=1)
    rollout(model)
    samples = next(model.rollout_buffer.get(BATCH_SIZE))
    calls: dict[str, tuple[Call, int]] = {"threads_gradient_step_b50000": (lambda: model._compute_gradients(samples), rounds)}
    for batch_size in (1, 40, 1000):
        obs = th.randn(batch_size, OBS_DIM)
        n = rounds * (10 if batch_size > 100 else 100)
        calls[f"threads_planning_b{batch_size}"] = (lambda obs=obs: model.policy.sample_chain(obs), n)  # type: ignore[misc]
    for name, (call, n) in calls.items():
        call()
        times: dict[int, list[float]] = {1: [], n_threads: []}
        for _ in range(n):
            for number in (1, n_threads):
                th.set_num_threads(number)
                times[number].append(timed(call, "cpu"))
        results[name] = row(times[n_threads], times[1])
    return results


def vec_envs(rounds: int, n_steps: int = 200) -> dict[str, Any]:
    """
    :param rounds: How often.
    :param n_steps: Steps of all envs.
    :return: Stepping 40 Hopper envs in this process, in processes of their own and, if it is installed, in EnvPool; the floor
        is MuJoCo's own time in one process.
    """
    results: dict[str, Any] = {}
    actions = np.random.default_rng(0).uniform(-1, 1, (n_steps, N_ENVS, ACTION_DIM)).astype(np.float32)
    bare: Any = gym.make("Hopper-v5").unwrapped
    bare.reset(seed=0)

    def simulate() -> None:
        for action in actions.reshape(-1, ACTION_DIM):
            bare.do_simulation(action, bare.frame_skip)

    makers: dict[str, Callable[[], VecEnv]] = dict(
        dummy=lambda: make_vec_env("Hopper-v5", N_ENVS, seed=0, vec_env_cls=DummyVecEnv),
        subproc=lambda: make_vec_env("Hopper-v5", N_ENVS, seed=0, vec_env_cls=SubprocVecEnv),
    )
    if importlib.util.find_spec("envpool"):
        makers["envpool"] = lambda: EnvPoolVecEnv("Hopper-v5", N_ENVS, seed=0)
    for name, make in makers.items():
        env = make()
        env.reset()

        def step(env: VecEnv = env) -> None:
            for action in actions:
                env.step(action)

        results |= measure({f"vec_env_{name}": (step, simulate)}, rounds, "cpu")
        env.close()
    return results


def growth(device: str, rounds: int) -> dict[str, Any]:
    """
    :param device: Where.
    :param rounds: How often.
    :return: Seconds of a rollout and an epoch, and bytes of the rollout, against one setting at a time.
    """
    base: dict[str, Any] = dict(n_envs=20, ft_denoising_steps=10, batch_size=10_000, horizon=4)
    values = dict(
        n_envs=[5, 10, 20, 40, 80],
        ft_denoising_steps=[1, 5, 10, 20],
        batch_size=[500, 2000, 10_000, 50_000],
        horizon=[1, 4, 8, 16],
    )
    results: dict[str, Any] = {}
    for name in tqdm(values, desc="growth"):
        results[name] = []
        for value in values[name]:
            setting = base | {name: value}
            horizon = setting["horizon"]
            model = make_model(
                NoOpVecEnv(setting["n_envs"]),
                device=device,
                n_steps=50 * horizon,
                n_epochs=1,
                batch_size=min(setting["batch_size"], setting["n_envs"] * 50 * setting["ft_denoising_steps"]),
                ft_denoising_steps=setting["ft_denoising_steps"],
                policy_kwargs=dict(horizon=horizon),
            )
            seconds: list[tuple[float, float]] = []
            for _ in range(rounds + 1):
                seconds.append((timed(lambda model=model: rollout(model), device), timed(model.train, device)))  # type: ignore[misc]
            rollout_s, epoch_s = np.median(seconds[1:], axis=0)
            n_bytes = sum(value.nbytes for value in vars(model.rollout_buffer).values() if isinstance(value, th.Tensor))
            results[name].append(dict(value=value, rollout_s=rollout_s, update_epoch_s=epoch_s, rollout_bytes=n_bytes))
    return results


def peak_memory(device: str) -> float:
    """
    :param device: Where.
    :return: Peak memory of one iteration in bytes: of a fresh process, or of the GPU's allocator.
    """
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import speed\n"
        f"model = speed.make_model(device={device!r}, n_epochs=1); speed.rollout(model); model.train()\n"
        "import re, torch\n"
        # Not ru_maxrss, which a process inherits from the one that started it.
        "peak = 1024 * int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
        f"print(torch.cuda.max_memory_allocated() if {device!r} == 'cuda' else peak)"
    )
    folder = str(Path(__file__).parent)
    output = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True).stdout
    return float(output.split()[-1])


def import_time(rounds: int) -> dict[str, float]:
    """
    :param rounds: How often.
    :return: Seconds to import the package and what it needs; the floor is SB3 and diffusers' schedulers.
    """
    floor_code = "import stable_baselines3; from diffusers import DDIMScheduler, DDPMScheduler"
    code = floor_code + "; from sb3_dppo import DPPO"
    times: dict[str, list[float]] = {code: [], floor_code: []}
    for _ in range(rounds):
        for command, seconds in times.items():
            seconds.append(timed(lambda command=command: subprocess.run([sys.executable, "-c", command], check=True), "cpu"))  # type: ignore[misc]
    return row(times[code], times[floor_code])


# ------------------------------------------------------------------ output


def print_table(results: dict[str, Any]) -> None:
    """
    :param results: Rows by name.
    """
    print(f"{'measurement':34} {'median':>11} {'quartiles':>23} {'floor':>11} {'ratio':>7}")
    for name, result in results.items():
        if "ratio" in result:
            milliseconds = [1e3 * result[key] for key in ("median_s", "q1_s", "q3_s", "floor_s")]
            print("{:34} {:8.2f} ms {:9.2f} – {:8.2f} ms {:8.2f} ms {:7.2f}".format(name, *milliseconds, result["ratio"]))


def plot(results: dict[str, Any], path: str) -> None:
    """
    :param results: What was measured.
    :param path: Where to write the picture.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = {
        name: result for name, result in results.items() if "ratio" in result and not name.startswith(("threads", "vec_env"))
    }
    figure, axes = plt.subplots(1, 5, figsize=(20, 4.5), width_ratios=[2, 1, 1, 1, 1], layout="constrained")
    axes[0].barh(list(rows), [result["ratio"] for result in rows.values()])
    axes[0].axvline(1.0, color="black", linewidth=1)
    axes[0].invert_yaxis()
    axes[0].set_xlabel("time / time of the bare matrix products")
    for ax, (name, points) in zip(axes[1:], results.get("growth", {}).items(), strict=False):
        x = [point["value"] for point in points]
        ax.plot(x, [point["rollout_s"] for point in points], "o-", label="rollout of 50 decisions per env")
        ax.plot(x, [point["update_epoch_s"] for point in points], "s-", label="update epoch")
        ax.set_xlabel(name)
        ax.set_ylabel("seconds")
        ax.set_ylim(bottom=0)
        if name == "batch_size":
            ax.set_xscale("log")
    axes[1].legend()
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=3, help="repetitions of the longest measurements; others have more")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; default: torch's own number")
    parser.add_argument(
        "--only",
        nargs="*",
        default=None,
        help="parts to run: planning iterations unet pixels threads envs growth memory import",
    )
    parser.add_argument("--json", metavar="FILE", default=None, help="write all results there")
    parser.add_argument("--plot", metavar="FILE", default=None, help="write a plot there")
    args = parser.parse_args()
    if args.device == "cuda" and not th.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here; use --device cpu.")
    if args.threads is not None:
        th.set_num_threads(args.threads)
    parts: dict[str, Callable[[], dict[str, Any]]] = dict(
        planning=lambda: planning(args.device, args.rounds),
        iterations=lambda: iterations(args.device, args.rounds),
        unet=lambda: unet(args.device, args.rounds),
        pixels=lambda: pixels(args.device, args.rounds),
        threads=lambda: threads(args.rounds),
        envs=lambda: vec_envs(args.rounds),
        growth=lambda: {"growth": growth(args.device, args.rounds)},
        memory=lambda: {"peak_memory": {"bytes": peak_memory(args.device)}},
        **{"import": lambda: {"import": import_time(args.rounds)}},
    )
    unknown = set(args.only or []) - set(parts)
    if unknown:
        parser.error(f"--only {' '.join(unknown)}: choose from {' '.join(parts)}.")
    results: dict[str, Any] = {}
    for name in args.only or parts:
        print(f"… {name}", file=sys.stderr)
        results |= parts[name]()
    print(
        f"{args.device}, {th.get_num_threads()} threads, torch {th.__version__}, {platform.processor() or platform.machine()}"
    )
    print_table(results)
    if "peak_memory" in results:
        print(f"peak memory of an iteration: {results['peak_memory']['bytes'] / 2**20:.0f} MiB")
    if args.json:
        with open(args.json, "w") as file:
            json.dump(results, file, indent=2)
    if args.plot:
        plot(results, args.plot)


if __name__ == "__main__":
    main()
