"""
Export a trained policy's planner as an ONNX graph, to run it without PyTorch.

Usage: python -m sb3_dppo.export agent.zip -o policy.onnx [--vec-normalize vecnormalize.pkl]
"""

import argparse
import json
import pickle
import warnings
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
                self.statistics[key] = _mean_and_std(value, vec_normalize.epsilon)

    def forward(self, observations: tuple[th.Tensor, ...], noise: th.Tensor) -> th.Tensor:
        """
        :param observations: Shape (B, ...), one for each key of a ``Dict``.
        :param noise: Standard normal, shape (S+1, B, Tp, Da).
        :return: Actions in the env's units, shape (B, Tp - first_action, *action_space.shape).
        """
        parts = [self._normalize(key, part) for key, part in zip(self.keys or [""], observations, strict=True)]
        obs: Any = dict(zip(self.keys, parts, strict=True)) if self.keys else parts[0]
        chain = self.policy.sample_chain(obs, True, noise)
        return self.policy.executable(chain.actions, on_device=True).float()

    def _normalize(self, key: str, obs: th.Tensor) -> th.Tensor:
        if key not in self.statistics:
            return obs
        mean, std = self.statistics[key]
        return ((obs - mean) / std).clamp(-self.obs_clip, self.obs_clip)


def _mean_and_std(statistics: RunningMeanStd, epsilon: float) -> tuple[th.Tensor, th.Tensor]:
    std = np.sqrt(statistics.var + epsilon)
    return th.as_tensor(statistics.mean).float(), th.as_tensor(std).float()


def export_onnx(model: DPPO, path: str | Path, vec_normalize: VecNormalize | None = None) -> float:
    """
    Write the whole planner of a model as one ONNX graph: normalisation, features, all denoising steps, actions in the env's
    units, clipped to its bounds. It plans as ``predict(deterministic=True)`` does, with the noise as an input.

    Inputs are the observations, called "observation" or by the keys of a ``Dict``, shape (B, ...), float32 where they are not
    integers, and "noise", shape (S+1, B, Tp, Da), for any B; the output is "actions", shape
    ``(B, Tp - first_action, *action_space.shape)``. The file's metadata tell ``act_steps`` and ``deterministic_noise``. The
    result is compared with PyTorch's in ONNX Runtime.

    :param model: What to export; it stays as it is.
    :param path: File to write, .onnx.
    :param vec_normalize: The ``VecNormalize`` that the model was trained with, to put its statistics into the graph. ``None``:
        that of the model's env, if it has one.
    :return: The largest difference to PyTorch's actions, relative to the width of the action space.
    :raises ImportError: Without the extra ``export``.
    :raises ValueError: For another ending, or where the graph does not compute what PyTorch does.
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
    observations, noise = _example(policy, 2)
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
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(graph, path)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors: it tells which operators it computes only when it runs
    difference = _difference(planner, onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]))
    if not difference <= TOLERANCE:
        raise ValueError(f"The actions of {path} differ from PyTorch's by {difference:.1g} of the action space's width.")
    return difference


def _cpu_policy(model: DPPO) -> DiffusionActorCriticPolicy:
    """A copy that plans in the same way, as plainly as possible: what is learned about noise is not for acting."""
    plain = dict(compile=False, precision="float32", learn_eta=None, learn_std=None)
    parameters = model.policy._get_constructor_parameters() | plain
    policy = type(model.policy)(**parameters).cpu()
    policy.load_state_dict(model.policy.state_dict())
    return policy


def _example(policy: DiffusionActorCriticPolicy, n: int) -> tuple[tuple[th.Tensor, ...], th.Tensor]:
    """Random observations, shape (n, ...) each, and noise."""
    space = policy.observation_space
    samples = [space.sample() for _ in range(n)]
    keys = list(space.spaces) if isinstance(space, spaces.Dict) else None
    parts = [np.stack(samples)] if keys is None else [np.stack([sample[key] for sample in samples]) for key in keys]
    tensors = (th.as_tensor(part) for part in parts)
    return tuple(part.float() if part.dtype == th.double else part for part in tensors), policy.draw_noise(n)


def _difference(planner: Planner, session: Any) -> float:
    space: Any = planner.policy.action_space
    names = [value.name for value in session.get_inputs()]
    largest = 0.0
    for n in BATCH_SIZES:
        observations, noise = _example(planner.policy, n)
        with th.no_grad():
            expected = planner(observations, noise).numpy()
        feed = dict(zip(names, (part.numpy() for part in (*observations, noise)), strict=True))
        (actions,) = session.run(None, feed)
        if actions.shape != expected.shape:
            raise ValueError(f"The graph's actions have the shape {actions.shape}, PyTorch's {expected.shape}.")
        largest = max(largest, float((np.abs(actions - expected) / (space.high - space.low)).max()))
    return largest


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m sb3_dppo.export", description=__doc__.split("\n\n")[0])
    parser.add_argument("agent", help="what was saved by save (.zip) or by save_pretrained (a folder)")
    parser.add_argument("-o", "--output", default="policy.onnx", help="file to write")
    parser.add_argument("--vec-normalize", help="vecnormalize.pkl of the same training, where observations were normalised so")
    args = parser.parse_args()
    try:
        vec_normalize = None
        if args.vec_normalize is not None:
            with open(args.vec_normalize, "rb") as file:
                vec_normalize = pickle.load(file)
        model = DPPO.from_pretrained(args.agent) if Path(args.agent).is_dir() else DPPO.load(args.agent, device="cpu")
        difference = export_onnx(model, args.output, vec_normalize)
    except (ValueError, ImportError, OSError) as error:
        parser.error(str(error))
    print(f"Saved {args.output}: its actions differ from PyTorch's by {difference:.1g} of the action space's width")


if __name__ == "__main__":
    main()
