"""DPPO, Diffusion Policy Policy Optimization, for Stable-Baselines3."""

from _sb3_dppo_autoload import activate
from sb3_dppo._version import __version__
from sb3_dppo.bc import BC
from sb3_dppo.demonstrations import Demonstrations, load_demonstrations
from sb3_dppo.dppo import DPPO
from sb3_dppo.policies import DiffusionMlpPolicy, DiffusionUnetPolicy
from sb3_dppo.reference import import_reference_checkpoint

__all__ = [
    "BC",
    "DPPO",
    "Demonstrations",
    "DiffusionMlpPolicy",
    "DiffusionUnetPolicy",
    "__version__",
    "import_reference_checkpoint",
    "load_demonstrations",
]

activate()
