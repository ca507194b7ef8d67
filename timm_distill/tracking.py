"""Metrics of each epoch to Weights & Biases, whose package is optional."""
import argparse
import logging
from typing import Any, Dict, Optional

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


def start_wandb(args: argparse.Namespace, name: str) -> Optional[WandbLog]:
    """Return the run that `--log-wandb` asks for; None where it does not, or where the package is missing."""
    if not args.log_wandb:
        return None
    try:
        return WandbLog(args, name)
    except ImportError:
        _logger.warning('--log-wandb: the package wandb is not installed (pip install wandb), nothing is logged there.')
        return None
