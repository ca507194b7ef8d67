"""Reading images of class folders and tar files, so that a file that cannot be read is not replaced unnoticed."""
import struct
import zlib
from typing import Any, Tuple

from PIL import Image, UnidentifiedImageError
from timm.data import ImageDataset

from ..errors import UsageError

# All that PIL is known to raise on damaged or foreign files.
_DECODE_ERRORS = (
    OSError, EOFError, SyntaxError, ValueError, IndexError, struct.error, zlib.error, Image.DecompressionBombError)


class StrictImageDataset(ImageDataset):
    """An `ImageDataset` that stops at an unreadable file, where timm goes on with the next image in its place.

    Args:
        dataset: Dataset to take over; its reader and settings are shared.
    """

    def __init__(self, dataset: ImageDataset):
        super().__init__(
            root=None,
            reader=dataset.reader,
            load_bytes=dataset.load_bytes,
            input_img_mode=dataset.input_img_mode,
            transform=dataset.transform,
            target_transform=dataset.target_transform,
            additional_features=dataset.additional_features,
        )

    def __getitem__(self, index: int) -> Tuple[Any, ...]:
        img, target, features = self._read(index)
        if self.transform is not None:
            img = self.transform(img)
        if target is None:
            target = -1
        elif self.target_transform is not None:
            target = self.target_transform(target)
        return (img, target) if self.additional_features is None else (img, target, *features)

    def _read(self, index: int) -> Tuple[Any, Any, list]:
        try:
            file, target, *features = self.reader[index]
            if self.load_bytes:
                return file.read(), target, features
            img: Image.Image = Image.open(file)
            if self.input_img_mode:
                img = img.convert(self.input_img_mode)
            img.load()  # pixels are decoded here, so that a truncated file fails here
            return img, target, features
        except _DECODE_ERRORS as error:
            is_foreign = isinstance(error, UnidentifiedImageError)
            reason = 'not an image of a known format' if is_foreign else ' '.join(str(error).split())
            raise UsageError(
                f'cannot read image {self.filename(index, absolute=True)}: {reason}; repair or remove it') from error


def user_message(error: UsageError) -> str:
    """One line to print for an error, also for one from a loader's worker process.

    Torch raises a worker's exception again in the main process, with the worker's whole traceback as its text.
    """
    return str(error).strip().split(f'{UsageError.__name__}: ')[-1]
