"""What is measured: each function times a part of DPPO beside its floor."""

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from floors import (
    ACTION_DIM,
    BATCH_SIZE,
    FT_STEPS,
    HORIZON,
    N_DECISIONS,
    N_ENVS,
    N_EPOCHS,
    OBS_DIM,
    Call,
    NoOpVecEnv,
    chain_products,
    critic_products,
    in_sequence,
    make_model,
    measure,
    recorded_products,
    repeated,
    row,
    timed,
    update_products,
)
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv
from tqdm import tqdm

from sb3_dppo import DPPO
from sb3_dppo.buffers import DenoisingRolloutBufferSamples
from sb3_dppo.envs import EnvPoolVecEnv
from sb3_dppo.features.extractors import VitExtractor
from sb3_dppo.gradients import compute_gradients, gradient_step
from sb3_dppo.losses import Metrics


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


def gradients(model: DPPO, samples: DenoisingRolloutBufferSamples) -> Metrics:
    """
    :param model: A model.
    :param samples: A minibatch of it.
    :return: Metrics of the losses, whose gradients are computed as in ``DPPO.train``.
    """
    n_slices = model._default_slices(samples)
    return compute_gradients(model.policy, samples, model._advantages(samples), model._loss_settings(), n_slices=n_slices)


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
    condition = policy.denoiser.encode(policy.extract_features(obs))
    embeddings = policy.denoiser.embed_timesteps(policy.process.timesteps)
    step = recorded_products(
        policy.denoiser, lambda: policy.denoiser(th.randn(40, 16, 3, device=device), embeddings[0], condition)
    )
    gradient = recorded_products(policy, lambda: model.loss(samples), backward=True)

    def update() -> None:
        metrics = gradients(model, samples)
        gradient_step(model._optimizers(train_actor=True), metrics["loss"], model.max_grad_norm)

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
    calls: dict[str, tuple[Call, int]] = {"threads_gradient_step_b50000": (lambda: gradients(model, samples), rounds)}
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
        "import sys; sys.path.insert(0, sys.argv[1]); import parts\n"
        f"model = parts.make_model(device={device!r}, n_epochs=1); parts.rollout(model); model.train()\n"
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
