"""Labels of a run: whether there are any, and what follows for student, losses and validation where there are none."""
import argparse
import logging

from ..args.per_teacher import teachers_of
from ..data import find_missing_labels
from ..methods import Recipe
from ..methods._composition import check_labels, methods_of
from ..utils.settings import settle

_logger = logging.getLogger(__name__)


def settle_labels(args: argparse.Namespace, recipe: Recipe, look: bool = True) -> None:
    """Find out whether the training images have labels that are learnt; note in the flags what follows if not.

    Args:
        args: Flags; changed are `no_labels`, `num_classes` and `task_loss_weight`.
        recipe: The methods as the flags say.
        look: Look at the data where no flag says it.

    Raises:
        UsageError: If a method needs labels, or a classifier that the student does not have.
    """
    reason = '--no-labels' if args.no_labels else '--num-classes 0' if args.num_classes == 0 else ''
    if not reason and look:
        reason = find_missing_labels(args)
    if not reason:
        return
    methods = methods_of(recipe.kd).values()
    with_classifier = args.num_classes != 0 and any(method.reads_student_classes() for method in methods)
    names = [name for name in teachers_of(args.teacher) if name]
    check_labels(recipe, reason, with_classifier or bool(args.num_classes), names)
    settle(args, no_labels=True, task_loss_weight=0.)
    if args.num_classes is None and not with_classifier:
        settle(args, num_classes=0)
    if getattr(args, 'rank', 0) == 0:
        head = 'has no classifier (--num-classes 0)' if args.num_classes == 0 else 'keeps its classifier'
        _logger.info(
            f'Training without labels ({reason}): --kd {recipe.kd} alone says what is learnt, the student {head}.')
