"""Features of a timm model: which there are, in which layout, and how a forward gives them.

Everything is found by structure and measured on a forward; no architecture is known by name.
"""
from .spec import Features, FeatureSpec, PairSpec, Stage

__all__ = ['FeatureSpec', 'Features', 'PairSpec', 'Stage']
