"""Envs of other projects, as Gymnasium's and Stable-Baselines3's. They are imported when an env is made."""

from sb3_dppo.envs.envpool import EnvPoolVecEnv, use_envpool
from sb3_dppo.envs.metaworld import MetaWorldEnv, register_metaworld_envs
from sb3_dppo.envs.robosuite import RobosuiteEnv, register_robosuite_envs

__all__ = [
    "EnvPoolVecEnv",
    "MetaWorldEnv",
    "RobosuiteEnv",
    "register_metaworld_envs",
    "register_robosuite_envs",
    "use_envpool",
]
