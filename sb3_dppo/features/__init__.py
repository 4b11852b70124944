"""Observations of envs, and what makes features of them."""

from sb3_dppo.features.extractors import EXTRACTORS, VitExtractor

__all__ = ["EXTRACTORS", "VitExtractor"]
