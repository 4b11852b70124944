"""Envs of other projects, as Gymnasium's and Stable-Baselines3's. They are imported when an env is made."""

from sb3_dppo.envs.envpool import EnvPoolVecEnv, use_envpool
from sb3_dppo.envs.metaworld import SparseManipulationEnv, register_manipulation_envs

__all__ = ["EnvPoolVecEnv", "SparseManipulationEnv", "register_manipulation_envs", "use_envpool"]
