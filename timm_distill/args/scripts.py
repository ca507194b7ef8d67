"""The command lines of the two scripts, put together from the groups of flags."""
import argparse

from .augmentation import add_augmentation_args, add_mixup_args, add_regularization_args
from .cache import add_cache_args
from .dataset import (
    add_dataset_args,
    add_loader_args,
    add_naflex_args,
    add_resolution_args,
    add_target_args,
    add_train_naflex_args,
    add_train_split_args,
)
from .distillation import add_distillation_args, add_timm_distillation_args
from .model import (
    add_device_args,
    add_distributed_args,
    add_model_args,
    add_train_device_args,
    add_train_model_args,
)
from .optimization import add_batch_norm_args, add_ema_args, add_optimizer_args, add_schedule_args
from .output import add_output_args, add_wandb_args
from .parser import ArgumentParser
from .validation import add_validate_args


def create_parser(description: str) -> ArgumentParser:
    parser = ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        '-c', '--config', metavar='FILE', default=argparse.SUPPRESS,
        help='YAML file with values for any of these flags; the command line wins over it')
    return parser


def create_train_parser() -> ArgumentParser:
    """Parser of `train_distill.py`."""
    parser = create_parser('Train a timm model, alone or distilled from a frozen teacher')
    add_distillation_args(parser)
    add_cache_args(parser)
    add_dataset_args(parser)
    add_target_args(parser)
    add_train_split_args(parser)
    add_model_args(parser)
    add_train_model_args(parser)
    add_device_args(parser)
    add_train_device_args(parser)
    add_distributed_args(parser)
    add_optimizer_args(parser)
    add_schedule_args(parser)
    add_augmentation_args(parser)
    add_mixup_args(parser)
    add_regularization_args(parser)
    add_batch_norm_args(parser)
    add_ema_args(parser)
    add_loader_args(parser)
    add_resolution_args(parser)
    add_train_naflex_args(parser)
    add_output_args(parser)
    add_wandb_args(parser)
    add_timm_distillation_args(parser)
    return parser


def create_validate_parser() -> ArgumentParser:
    """Parser of `validate.py`, for one checkpoint."""
    parser = create_parser('Evaluate one timm model or checkpoint on a labelled image set')
    add_dataset_args(parser)
    add_target_args(parser)
    add_model_args(
        parser, model_flags=('--model', '-m'), model_default='dpn92', batch_size=256, aot_autograd=True)
    add_device_args(parser)
    add_loader_args(parser)
    add_naflex_args(parser)
    add_validate_args(parser)
    return parser
