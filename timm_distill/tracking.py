"""Metrics of each epoch to Weights & Biases and to TensorBoard, whose packages are optional."""
import argparse
import importlib.util
import logging
from typing import Any, Dict, List, Optional, Union

from .errors import UsageError

_logger = logging.getLogger(__name__)


class WandbLog:
    """A run of Weights & Biases.

    Args:
        args: Training arguments, kept as the run's configuration.
        name: Name of the run.
    """

    def __init__(self, args: argparse.Namespace, name: str):
        import wandb
        try:
            self.run = wandb.init(
                project=args.wandb_project,
                name=name,
                config=vars(args),
                tags=args.wandb_tags,
                resume='must' if args.wandb_resume_id else None,
                id=args.wandb_resume_id or None,
            )
        except wandb.errors.Error as e:
            raise UsageError(f'--log-wandb: the run cannot be started: {" ".join(str(e).split())}') from e

    def log(
            self,
            epoch: int,
            train_metrics: Dict[str, float],
            eval_metrics: Optional[Dict[str, float]],
            lr: float,
    ) -> None:
        """Log one epoch under the names of `summary.csv`."""
        row: Dict[str, Any] = {'epoch': epoch}
        row.update({f'train_{name}': value for name, value in train_metrics.items()})
        row.update({f'eval_{name}': value for name, value in (eval_metrics or {}).items()})
        self.run.log({**row, 'lr': lr})

    def finish(self) -> None:
        """End the run."""
        self.run.finish()


class TensorBoardLog:
    """Scalars of a run for TensorBoard.

    Args:
        folder: Where the event files go.
        start_epoch: First epoch of this run; what an interrupted one wrote from there on is hidden.

    Raises:
        UsageError: If the package is not installed.
    """

    def __init__(self, folder: str, start_epoch: int = 0):
        if importlib.util.find_spec('tensorboard') is None:
            raise UsageError("--log-tensorboard needs the package tensorboard: pip install "
                             "'timm_distill[tensorboard]', or leave the flag out.")
        from torch.utils.tensorboard import SummaryWriter
        self.writer = SummaryWriter(folder, purge_step=start_epoch or None)

    def log(
            self,
            epoch: int,
            train_metrics: Dict[str, float],
            eval_metrics: Optional[Dict[str, float]],
            lr: float,
    ) -> None:
        """Write one epoch, training and validation each under a heading, and flush: a killed run loses none."""
        for heading, metrics in (('train', train_metrics), ('eval', eval_metrics or {})):
            for name, value in metrics.items():
                self.writer.add_scalar(f'{heading}/{name}', value, epoch)
        self.writer.add_scalar('lr', lr, epoch)
        self.writer.flush()

    def finish(self) -> None:
        """Close the files."""
        self.writer.close()


def start_trackers(
        args: argparse.Namespace,
        name: str,
        folder: str,
        start_epoch: int = 0,
) -> List[Union[WandbLog, TensorBoardLog]]:
    """Return what `--log-wandb` and `--log-tensorboard` ask for.

    Args:
        args: Training arguments.
        name: Name of the run.
        folder: Folder of the run.
        start_epoch: First epoch of the run.

    Raises:
        UsageError: If a tracker cannot be started.
    """
    trackers: List[Union[WandbLog, TensorBoardLog]] = []
    wandb = start_wandb(args, name)
    if wandb is not None:
        trackers.append(wandb)
    if args.log_tensorboard:
        trackers.append(TensorBoardLog(folder, start_epoch))
    return trackers


def start_wandb(args: argparse.Namespace, name: str) -> Optional[WandbLog]:
    """Return the run that `--log-wandb` asks for; None where it does not, or where the package is missing."""
    if not args.log_wandb:
        return None
    try:
        return WandbLog(args, name)
    except ImportError:
        _logger.warning('--log-wandb: the package wandb is not installed (pip install wandb), nothing is logged there.')
        return None
