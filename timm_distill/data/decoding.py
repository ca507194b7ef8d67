"""Decoding of image files into 8 bits per channel, with the grey formats of more bits scaled.

PIL converts grey of 16 and 32 bits by cutting off all values above 255, which leaves a white image, and float grey from
0 to 1 into a black one. All other modes (palettes, alpha, CMYK) are converted by PIL as in timm.
"""
import logging
import multiprocessing
import os
import stat
from typing import Any, Optional, Tuple

import numpy as np
from PIL import Image, UnidentifiedImageError

_logger = logging.getLogger(__name__)

_DEEP_MODES = ('I', 'F')  # and I;16 in all byte orders
_TIFF_BITS, _TIFF_PHOTOMETRIC, _TIFF_SAMPLE_FORMAT = 258, 262, 339
_TOPS = (1., 255., 65535.)  # what white may be where only the values can tell
_OVERSHOOT, _UNDERSHOOT = 1.5, 0.1  # of resampled float images, in parts of the range


class ImageDecoder:
    """Decodes images into a mode of 8 bits per channel; says once per value range that it scales.

    Args:
        mode: PIL mode to convert to; None or '' leaves images as they are.
    """

    def __init__(self, mode: Optional[str]):
        self.mode = mode
        # shared with loader processes: which of _TOPS were guessed from values, and whether a known depth was scaled
        self._seen: Any = multiprocessing.Array('b', len(_TOPS) + 1)

    def __call__(self, image: Any, name: Optional[str] = None) -> Image.Image:
        """Decode a file, a path or an opened image; raises whatever PIL does.

        Args:
            image: The image.
            name: What to call it where its values are scaled.
        """
        if not isinstance(image, Image.Image):
            image = Image.open(image)
        if self.mode and is_deep(image.mode) and not is_deep(self.mode):
            image = self._scale(image, name)
        if self.mode:
            image = image.convert(self.mode)
        image.load()  # pixels are decoded here, so that a truncated file fails here
        return image

    def _scale(self, image: Image.Image, name: Optional[str]) -> Image.Image:
        values = np.asarray(image)
        top, is_known = find_white(image, values)
        self._say(image.mode, top, is_known, name)
        if values.dtype.kind != 'f':
            values = values.astype(np.int64)
        if is_white_zero(image):
            values = top - values
        return Image.fromarray(np.rint(values * (255. / top)).clip(0, 255).astype(np.uint8))

    def _say(self, mode: str, top: float, is_known: bool, name: Optional[str]) -> None:
        kind = len(_TOPS) if is_known else _TOPS.index(top)
        with self._seen.get_lock():
            if self._seen[kind]:
                return
            self._seen[kind] = 1
            is_mixed = not is_known and sum(self._seen[:len(_TOPS)]) > 1
        text = f'Grey images of more than 8 bits (mode {mode}) are scaled: {top:g} becomes 255'
        where = f', first in {name}' if name else ''
        if is_mixed:
            _logger.warning(
                f'{text}{where}. Others had another range: if that is an image too dark to tell, convert '
                'them all to 8 or 16 bits.')
        else:
            _logger.info(f'{text}{where}.')


def is_deep(mode: str) -> bool:
    """Whether a PIL mode is grey of more than 8 bits."""
    return mode in _DEEP_MODES or mode.startswith('I;16')


def find_white(image: Image.Image, values: np.ndarray) -> Tuple[float, bool]:
    """Return the value that is white, and whether the file says so; else the values tell.

    Raises:
        ValueError: If the values have no known range.
    """
    low, high = float(values.min()), float(values.max())
    bits = _known_bits(image)
    if bits:
        top = float(2 ** bits - 1)
        if low < 0 or high > top:
            raise ValueError(f'its grey values lie between {low:g} and {high:g}, outside of its {bits} bits')
        return top, True
    if not np.isfinite([low, high]).all():
        raise ValueError('its grey values are not all finite')
    top = next((t for t in _TOPS[values.dtype.kind != 'f':] if high <= _OVERSHOOT * t), 0.)
    lowest = -_UNDERSHOOT * top if values.dtype.kind == 'f' and top <= 255 else 0
    if not top or low < lowest:
        raise ValueError(
            f'its grey values lie between {low:g} and {high:g}, a range of unknown meaning: convert it to '
            '8 or 16 bits')
    return top, False


def _known_bits(image: Image.Image) -> int:
    """Return the bits of a grey value, 0 where the file does not tell."""
    tags = getattr(image, 'tag_v2', None)
    if image.mode == 'F':
        return 0
    if tags is not None:
        bits, kinds = tags.get(_TIFF_BITS, (0,)), tags.get(_TIFF_SAMPLE_FORMAT, (1,))
        return bits[0] - (kinds[0] == 2) if 8 < bits[0] <= 16 else 0  # the second kind has a sign
    return 16 if image.mode != 'I' or image.format in ('PNG', 'PPM') else 0


def is_white_zero(image: Image.Image) -> bool:
    """Whether 0 is white, which TIFF allows and PIL heeds at 8 bits alone."""
    tags = getattr(image, 'tag_v2', None)
    return tags is not None and tags.get(_TIFF_PHOTOMETRIC, 1) == 0


def check_regular_file(path: str) -> None:
    """Refuse what opening could wait on for ever.

    Raises:
        OSError: If it is a FIFO, a device or a socket.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        kind = 'FIFO' if stat.S_ISFIFO(mode) else 'folder' if stat.S_ISDIR(mode) else 'device or socket'
        raise OSError(f'it is no regular file but a {kind}')


def describe_image_error(error: Exception) -> str:
    """Return in words what PIL, or a reader, has against a file."""
    if isinstance(error, UnidentifiedImageError):
        return 'not an image of a known format'
    words = ' '.join(str(error).split())
    return words if isinstance(error, (OSError, ValueError)) and words else f'{type(error).__name__} {words}'.strip()
