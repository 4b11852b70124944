"""Demonstrations: episodes of observations and actions, and the formats that they are read from."""

from sb3_dppo.demonstrations.collecting import collect_demonstrations
from sb3_dppo.demonstrations.demonstrations import Demonstrations
from sb3_dppo.demonstrations.loading import load_demonstrations

__all__ = ["Demonstrations", "collect_demonstrations", "load_demonstrations"]
