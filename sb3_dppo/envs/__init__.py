"""
Envs of other projects, as Gymnasium's and Stable-Baselines3's, which are imported when an env is made, and envs that a frozen
policy is a part of.
"""

from sb3_dppo.envs.brax import BraxVecEnv
from sb3_dppo.envs.envpool import EnvPoolVecEnv, use_envpool
from sb3_dppo.envs.maniskill import ManiSkillVecEnv
from sb3_dppo.envs.metaworld import MetaWorldEnv, register_metaworld_envs
from sb3_dppo.envs.robosuite import RobosuiteEnv, register_robosuite_envs
from sb3_dppo.envs.steering import NoiseSpaceVecEnv, ResidualVecEnv
from sb3_dppo.envs.torch_vec_env import BatchedStep, TorchVecEnv

__all__ = [
    "BatchedStep",
    "BraxVecEnv",
    "EnvPoolVecEnv",
    "ManiSkillVecEnv",
    "MetaWorldEnv",
    "NoiseSpaceVecEnv",
    "ResidualVecEnv",
    "RobosuiteEnv",
    "TorchVecEnv",
    "register_metaworld_envs",
    "register_robosuite_envs",
    "use_envpool",
]
