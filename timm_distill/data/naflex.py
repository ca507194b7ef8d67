"""Loaders of patch sequences (NaFlex): images at their own aspect ratio, batches of varying length and size."""
from argparse import Namespace
from typing import Any, Dict, Tuple

from timm.data import create_naflex_loader
from torch.utils.data import Dataset, IterableDataset

from ..errors import UsageError
from .mixup import create_naflex_mixup

PatchSize = Tuple[int, int]


def create_naflex_train_loader(
        args: Namespace,
        dataset: Dataset,
        num_classes: int,
        patch_size: PatchSize,
        rank: int,
        world_size: int,
        **kwargs: Any,
) -> Any:
    """Training loader; a batch holds as many sequences as the longest of `--naflex-train-seq-lens` allows.

    Args:
        args: Training arguments.
        dataset: Training dataset.
        num_classes: Outputs of the student.
        patch_size: The student's own (height, width).
        rank: Of this process.
        world_size: Number of processes.
        **kwargs: What all training loaders take.
    """
    if isinstance(dataset, IterableDataset):
        raise UsageError(f'--naflex-loader cannot read the streamed --dataset {args.dataset}, timm\'s does not either')
    patches: Dict[str, Any] = {'patch_size': patch_size}
    if args.naflex_patch_sizes:
        patches = {
            'patch_size_choices': args.naflex_patch_sizes,
            'patch_size_choice_probs': args.naflex_patch_size_probs,
        }
    return create_naflex_loader(
        dataset,
        train_seq_lens=tuple(args.naflex_train_seq_lens),
        mixup_fn=create_naflex_mixup(args, num_classes),
        rank=rank,
        world_size=world_size,
        patchify_channels_last=not args.naflex_patchify_channels_first,
        **patches,
        **kwargs,
    )


def create_naflex_eval_loader(args: Namespace, dataset: Dataset, patch_size: PatchSize, **kwargs: Any) -> Any:
    """Validation loader, with sequences up to `--naflex-max-seq-len`."""
    return create_naflex_loader(
        dataset,
        patch_size=patch_size,
        max_seq_len=args.naflex_max_seq_len,
        patchify_channels_last=not getattr(args, 'naflex_patchify_channels_first', False),
        **kwargs,
    )
