"""
Export a trained policy's planner as an ONNX graph, to run it without PyTorch.

Usage: python -m sb3_dppo.export agent.zip -o policy.onnx [--vec-normalize vecnormalize.pkl]
"""

import argparse
import json
import pickle
import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecNormalize
from torch import nn

from sb3_dppo._version import __version__
from sb3_dppo.actor_critic import DiffusionActorCriticPolicy
from sb3_dppo.dppo import DPPO
from sb3_dppo.runs.checkpoints import is_of_vec_normalize
from sb3_dppo.runs.files import CONFIG_FILE, atomic_write

# Of the graph's actions to PyTorch's, relative to the width of the action space.
TOLERANCE = 1e-5
BATCH_SIZES = (1, 3, 8)
MISSING = "{module} is not installed: pip install 'sb3-dppo[export]'"


class Planner(nn.Module):
    """
    What the graph computes: executable actions from observations and noise, as ``policy.plan`` does.

    :param policy: The policy.
    :param vec_normalize: Whose statistics of observations the policy was trained with, if any.
    """

    def __init__(self, policy: DiffusionActorCriticPolicy, vec_normalize: VecNormalize | None = None) -> None:
        super().__init__()
        self.policy = policy
        space = policy.observation_space
        self.keys = list(space.spaces) if isinstance(space, spaces.Dict) else []
        self.statistics: dict[str, tuple[th.Tensor, th.Tensor]] = {}
        if vec_normalize is not None and vec_normalize.norm_obs:
            self.obs_clip = float(vec_normalize.clip_obs)
            rms: Any = vec_normalize.obs_rms
            for key, value in (rms if isinstance(rms, dict) else {"": rms}).items():
                part = space if key == "" else getattr(space, "spaces", {}).get(key)
                if part is None or part.shape != value.mean.shape:
                    raise ValueError(f"vec_normalize has statistics of another env: {key} {value.mean.shape}, not of {space}.")
                self.statistics[key] = _mean_and_std(value, vec_normalize.epsilon)
        box: Any = policy.action_space
        self.low, self.high = (th.as_tensor(bound) for bound in _float_bounds(box.low, box.high))

    def forward(self, observations: tuple[th.Tensor, ...], noise: th.Tensor) -> th.Tensor:
        """
        :param observations: Shape (B, ...), one for each key of a ``Dict``.
        :param noise: Standard normal, shape (S+1, B, Tp, Da).
        :return: Actions in the env's units, shape (B, Tp - first_action, *action_space.shape).
        """
        parts = [self._normalize(key, part) for key, part in zip(self.keys or [""], observations, strict=True)]
        obs: Any = dict(zip(self.keys, parts, strict=True)) if self.keys else parts[0]
        chain = self.policy.sample_chain(obs, True, noise)
        # Bounds of another type than the graph's may have rounded outwards.
        return self.policy.executable(chain.actions, on_device=True).float().clamp(self.low, self.high)

    def _normalize(self, key: str, obs: th.Tensor) -> th.Tensor:
        if key not in self.statistics:
            return obs
        mean, std = self.statistics[key]
        return ((obs - mean) / std).clamp(-self.obs_clip, self.obs_clip)


def _mean_and_std(statistics: RunningMeanStd, epsilon: float) -> tuple[th.Tensor, th.Tensor]:
    std = np.sqrt(statistics.var + epsilon)
    return th.as_tensor(statistics.mean).float(), th.as_tensor(std).float()


def _float_bounds(low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The largest box of float32 numbers inside these bounds."""
    inside_low, inside_high = low.astype(np.float32), high.astype(np.float32)
    inside_low = np.where(inside_low < low, np.nextafter(inside_low, np.float32(np.inf)), inside_low)
    return inside_low, np.where(inside_high > high, np.nextafter(inside_high, np.float32(-np.inf)), inside_high)


def export_onnx(model: DPPO, path: str | Path, vec_normalize: VecNormalize | None = None) -> float:
    """
    Write the whole planner of a model as one ONNX graph: normalisation, features, all denoising steps, actions in the env's
    units, clipped to its bounds. It plans as ``predict(deterministic=True)`` does, with the noise as an input.

    Inputs are the observations, called "observation" or by the keys of a ``Dict``, shape (B, ...), images with channels first,
    float32 where they are not integers, and "noise", shape (S+1, B, Tp, Da), for any B; the output is "actions", shape
    ``(B, Tp - first_action, *action_space.shape)``. The file's metadata tell ``act_steps`` and ``deterministic_noise``. The
    result is compared with PyTorch's in ONNX Runtime.

    :param model: What to export; it stays as it is.
    :param path: File to write, .onnx.
    :param vec_normalize: The ``VecNormalize`` that the model was trained with, to put its statistics into the graph. ``None``:
        that of the model's env, if it has one.
    :return: The largest difference to PyTorch's actions, relative to the width of the action space.
    :raises ImportError: Without the extra ``export``.
    :raises ValueError: For another ending, for statistics of another env, or where the graph does not compute what PyTorch
        does; then nothing is written.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401, what torch.onnx needs
    except ImportError as error:
        raise ImportError(MISSING.format(module=error.name)) from error
    path = Path(path)
    if path.suffix != ".onnx":
        raise ValueError(f"path={str(path)!r} must end in .onnx.")
    policy = _cpu_policy(model)
    planner = Planner(policy, model.get_vec_normalize_env() if vec_normalize is None else vec_normalize).eval()
    names = planner.keys or ["observation"]
    batch = th.export.Dim("batch", min=1)
    rng = np.random.default_rng(0)
    observations, noise = _example(policy, 2, rng)
    with warnings.catch_warnings(), th.no_grad():
        warnings.simplefilter("ignore")  # of PyTorch to itself
        planner(observations, noise)  # what the sampler computes once should be numbers, and not a part of the graph
        program = th.onnx.export(
            planner,
            (observations, noise),
            input_names=[*names, "noise"],
            output_names=["actions"],
            dynamic_shapes=(tuple({0: batch} for _ in observations), {1: batch}),
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    graph = program.model_proto
    config = policy.sampler.config
    details = dict(act_steps=policy.sampler.act_steps, deterministic_noise=config.deterministic_noise)
    onnx.helper.set_model_props(graph, {name: json.dumps(value) for name, value in details.items()})
    graph.producer_name, graph.producer_version = "sb3-dppo", __version__
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors: it tells which operators it computes only when it runs
    data = graph.SerializeToString()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    difference = _difference(planner, session, rng)
    if not difference <= TOLERANCE:
        raise ValueError(
            f"The graph's actions would differ from PyTorch's by {difference:.1g} of the action space's width, so {path} was "
            "not written. A features extractor of your own may do what ONNX can't: try one of Stable-Baselines3's."
        )
    with atomic_write(path) as file:
        file.write(data)
    return difference


def _cpu_policy(model: DPPO) -> DiffusionActorCriticPolicy:
    """A copy that plans in the same way, as plainly as possible: what is learned about noise is not for acting."""
    plain = dict(compile=False, precision="float32", learn_eta=None, learn_std=None)
    parameters = model.policy._get_constructor_parameters() | plain
    with th.random.fork_rng():  # a run that goes on draws what it would have drawn
        policy = type(model.policy)(**parameters).cpu()
    policy.load_state_dict(model.policy.state_dict())
    return policy


def _example(policy: DiffusionActorCriticPolicy, n: int, rng: np.random.Generator) -> tuple[tuple[th.Tensor, ...], th.Tensor]:
    """Random observations, shape (n, ...) each, and noise."""
    space = policy.observation_space
    parts = list(space.spaces.values()) if isinstance(space, spaces.Dict) else [space]
    tensors = [th.as_tensor(np.stack([_random_value(part, rng) for _ in range(n)])) for part in parts]
    noise = rng.standard_normal(policy.sampler.noise_shape(n), dtype=np.float32)
    return tuple(tensors), th.as_tensor(noise)


def _random_value(space: spaces.Space, rng: np.random.Generator) -> Any:
    """Of ordinary size, also where bounds are far away."""
    if isinstance(space, spaces.Box) and space.dtype.kind == "f":  # type: ignore[union-attr]
        return np.clip(rng.standard_normal(space.shape), space.low, space.high).astype(np.float32)
    space = deepcopy(space)  # whose generator the env's owner may use
    space.seed(int(rng.integers(2**31)))
    return space.sample()


def _difference(planner: Planner, session: Any, rng: np.random.Generator) -> float:
    space: Any = planner.policy.action_space
    width = np.where(space.high > space.low, space.high - space.low, 1.0)
    names = [value.name for value in session.get_inputs()]
    largest = 0.0
    for n in BATCH_SIZES:
        observations, noise = _example(planner.policy, n, rng)
        with th.no_grad():
            expected = planner(observations, noise).numpy()
        feed = dict(zip(names, (part.numpy() for part in (*observations, noise)), strict=True))
        (actions,) = session.run(None, feed)
        if actions.shape != expected.shape:
            raise ValueError(f"The graph's actions have the shape {actions.shape}, PyTorch's {expected.shape}.")
        largest = max(largest, float((np.abs(actions - expected) / width).max()))
    return largest


def _read_vec_normalize(path: str) -> VecNormalize:
    try:
        with open(path, "rb") as file:
            value = pickle.load(file)
    except (pickle.UnpicklingError, EOFError, AttributeError, ImportError) as error:
        raise ValueError(f"vec-normalize={path!r} can't be read as statistics of VecNormalize ({error}).") from error
    if not isinstance(value, VecNormalize):
        raise ValueError(f"vec-normalize={path!r} holds a {type(value).__name__}, not a VecNormalize.")
    return value


def _read_agent(path: str, env: str | None) -> DPPO:
    """From a zip or a folder. An env is needed for statistics of VecNormalize that a folder holds."""
    if not Path(path).is_dir():
        return DPPO.load(path, device="cpu")
    model = DPPO.from_pretrained(path, env=env, device="cpu")
    if env is None and json.loads((Path(path) / CONFIG_FILE).read_text("utf-8"))["vec_normalize"] is not None:
        raise ValueError(
            f"{path} was trained under VecNormalize: name its env by --env, so that its statistics are read, too."
        )
    return model


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m sb3_dppo.export", description=__doc__.split("\n\n")[0])
    parser.add_argument("agent", help="what was saved by save (.zip) or by save_pretrained (a folder)")
    parser.add_argument("-o", "--output", default="policy.onnx", help="file to write")
    parser.add_argument("--vec-normalize", help="vecnormalize.pkl of the same training, where observations were normalised so")
    parser.add_argument("--env", help="id of its env, for a folder whose agent was trained under VecNormalize")
    args = parser.parse_args()
    try:
        vec_normalize = None if args.vec_normalize is None else _read_vec_normalize(args.vec_normalize)
        model = _read_agent(args.agent, args.env)
        if vec_normalize is None and model.env is None and is_of_vec_normalize(model):
            raise ValueError(f"{args.agent} was trained under VecNormalize: pass --vec-normalize.")
        difference = export_onnx(model, args.output, vec_normalize)
    except (ValueError, ImportError, OSError) as error:
        parser.error(str(error))
    print(f"Saved {args.output}: its actions differ from PyTorch's by {difference:.1g} of the action space's width")


if __name__ == "__main__":
    main()
