"""Statistics that targets are standardised by: a pass of the teacher over some of the training images."""
import logging
from typing import Any, Iterator, Tuple

import numpy as np
import torch
from timm.task import evaluation_sample_limit

from ..data import create_pass_loader
from ..data.views import load_views
from ..engine.train_log import progress_bar
from ..teacher.standardize import NUM_IMAGES
from ..utils.random import unchanged_randomness
from .state import Run

_logger = logging.getLogger(__name__)

Batches = Iterator[Tuple[torch.Tensor, Any]]


def measure_targets(run: Run) -> None:
    """Measure what targets are standardised by, unless a checkpoint has brought it.

    The images are as in validation, evenly spaced over the training set; of a stream they are the first. Cached targets
    are those of the views of the first epoch, so that a run that fills a cache and one that reads it are the same. The
    run's random states stay as they were.
    """
    if not run.task.needs_target_statistics:
        return
    args = run.args
    if args.rank == 0:
        _logger.info(f'The statistics of the targets are measured on up to {NUM_IMAGES} training images.')
    with unchanged_randomness():
        if run.task.targets is not None:
            batches, count = _first_views(run), NUM_IMAGES
        else:
            loader = create_pass_loader(
                args, run.data_config, run.loaders.train.dataset, run.device, num_images=NUM_IMAGES,
                model_dtype=run.precision.model_dtype, distributed=args.distributed, persistent=False)
            limit = evaluation_sample_limit(loader)  # what a distributed sampler adds to make ranks even comes last
            batches, count = _images(run, loader), NUM_IMAGES if limit is None else limit
        run.task.standardize_targets(batches, count, run.precision.autocast, args.distributed)


def _images(run: Run, loader: Any) -> Batches:
    """Yield the batches of a loader, of an endless stream this process' part of the images."""
    seen = 0
    with progress_bar(loader, 'Target statistics', run.progress if run.args.rank == 0 else False) as bar:
        for images, target in bar:
            yield run.compute.prepare_batch(images, target)
            seen += len(images)
            if seen >= NUM_IMAGES // run.args.world_size and evaluation_sample_limit(loader) is None:
                return


def _first_views(run: Run) -> Batches:
    """Yield this process' part of the first views of images that are evenly spaced over the training set."""
    args, grid = run.args, run.loaders.grid
    assert grid is not None
    chosen = np.linspace(0, grid.num_samples, min(NUM_IMAGES, grid.num_samples), endpoint=False).astype(np.int64)
    keys = chosen * grid.num_views * grid.num_sizes * grid.num_splits  # number and size 0, the first split
    for images, target in load_views(
            run.loaders.train, keys[args.rank::args.world_size], args.batch_size, args.workers):
        yield run.compute.prepare_batch(images, target)
