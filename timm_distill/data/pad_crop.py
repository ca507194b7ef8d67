"""Random crop of the zero-padded image, the pre-processing of the CIFAR papers (`--train-crop-mode pad`)."""
from typing import Any, List, Sequence, Tuple

from timm.data import create_transform
from timm.data.scheduled_sampler import ScheduledTransformDataset
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch.utils.data import Dataset
from torchvision import transforms

_PARTS = 8  # 4 of 32 pixels


def pad_size(size: Sequence[int]) -> Tuple[int, int]:
    """Return the zeros (above and below, left and right) around an image of (height, width): an eighth of each.

    At 32 x 32 these are the papers' 4 pixels. They have no other size; in proportion, the crop shifts the image by the
    same part of it at each.
    """
    return size[0] // _PARTS, size[1] // _PARTS


def create_pad_crop(size: Sequence[int], **eval_kwargs: Any) -> transforms.Compose:
    """Transform of a PIL image: as validation sees it, zeros around it, a random crop of the input size.

    The zeros are black, or in the other modes of PIL what becomes 0 before the normalisation. An image of the input
    size keeps its pixels where `crop_pct` is 1.

    Args:
        size: (height, width) of the crop.
        **eval_kwargs: How validation resizes: `interpolation`, `crop_pct`, `crop_mode`, `crop_border_pixels` and
            `mean`, the colour of its borders.
    """
    height, width = size
    *resize, _to_tensor = create_transform((height, width), use_prefetcher=True, **eval_kwargs).transforms
    rows, columns = pad_size(size)
    return transforms.Compose([*resize, transforms.RandomCrop((height, width), padding=[columns, rows])])


def use_pad_crop(dataset: Dataset, **eval_kwargs: Any) -> None:
    """Replace the random resized crop of the transforms that timm's loader gave a training set; they stay else.

    Args:
        dataset: Dataset of a loader, with one transform, with one of each image size, or split into views.
        **eval_kwargs: As for `create_pad_crop`.

    Raises:
        RuntimeError: If a transform does not begin with that crop.
    """
    for steps in _transform_steps(dataset):
        crops = [i for i, step in enumerate(steps) if isinstance(step, RandomResizedCropAndInterpolation)]
        if crops != [0]:
            raise RuntimeError(f'timm\'s training transform does not begin with its one random resized crop: {steps}')
        steps[0] = create_pad_crop(steps[0].size, **eval_kwargs)


def _transform_steps(dataset: Any) -> List[List[Any]]:
    scheduled = isinstance(dataset, ScheduledTransformDataset)
    return [transform.transforms for transform in (dataset.transforms if scheduled else [dataset.transform])]
