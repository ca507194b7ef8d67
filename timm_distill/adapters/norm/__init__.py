"""NORM's feature transform (Liu et al., ICLR 2023): expansion to N segments, contraction, and the N-to-one loss.

`transform` is the adapter; the other files are its moment form and the products that this takes.
"""
from .transform import NToOneTransform

__all__ = ['NToOneTransform']
