"""DPPO, Diffusion Policy Policy Optimization, for Stable-Baselines3."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from _sb3_dppo_autoload import activate
from sb3_dppo._version import __version__
from sb3_dppo.dppo import DPPO
from sb3_dppo.envs.metaworld import register_metaworld_envs
from sb3_dppo.envs.robosuite import register_robosuite_envs
from sb3_dppo.evaluation import choose_deterministic_noise
from sb3_dppo.importers.lerobot import import_lerobot_policy
from sb3_dppo.importers.reference import import_reference_checkpoint
from sb3_dppo.policies import (
    DiffusionCnnPolicy,
    DiffusionMlpPolicy,
    DiffusionMultiInputPolicy,
    DiffusionTransformerPolicy,
    DiffusionUnetPolicy,
)

if TYPE_CHECKING:
    from sb3_dppo.bc import BC
    from sb3_dppo.demonstrations import Demonstrations, collect_demonstrations, load_demonstrations

# Modules that are also programs: `python -m` warns about those that their package has imported.
_LAZY = {
    "BC": "sb3_dppo.bc",
    "Demonstrations": "sb3_dppo.demonstrations",
    "collect_demonstrations": "sb3_dppo.demonstrations",
    "load_demonstrations": "sb3_dppo.demonstrations",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


__all__ = [
    "BC",
    "DPPO",
    "Demonstrations",
    "DiffusionCnnPolicy",
    "DiffusionMlpPolicy",
    "DiffusionMultiInputPolicy",
    "DiffusionTransformerPolicy",
    "DiffusionUnetPolicy",
    "__version__",
    "choose_deterministic_noise",
    "collect_demonstrations",
    "import_lerobot_policy",
    "import_reference_checkpoint",
    "load_demonstrations",
]

activate()
register_metaworld_envs()
register_robosuite_envs()
