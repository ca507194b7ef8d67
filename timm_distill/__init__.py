"""timm_distill: distil any timm model into any other and get a plain timm checkpoint."""
from .adapters import create_adapter, list_adapters
from .errors import MergeError, UsageError
from .factory import DataSpec, create_distill_task
from .methods import Recipe, create_method, list_methods
from .models import CifarNet
from .pair import PairReport, check_pair
from .task import DistillTask, merge_student
from .teacher.class_map import ClassMatch
from .teacher.class_means import compute_class_means
from .teacher.teacher import Teacher, create_teacher
from .utils.version import __version__

__all__ = [
    'CifarNet',
    'ClassMatch',
    'DataSpec',
    'DistillTask',
    'MergeError',
    'PairReport',
    'Recipe',
    'Teacher',
    'UsageError',
    '__version__',
    'check_pair',
    'compute_class_means',
    'create_adapter',
    'create_distill_task',
    'create_method',
    'create_teacher',
    'list_adapters',
    'list_methods',
    'merge_student',
]
