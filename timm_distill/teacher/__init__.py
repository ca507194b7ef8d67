"""Frozen teacher: its weights, what is read of it, and the head that methods may run."""
from .class_map import ClassMatch
from .class_means import compute_class_means
from .teacher import Teacher, create_teacher

__all__ = ['ClassMatch', 'Teacher', 'compute_class_means', 'create_teacher']
