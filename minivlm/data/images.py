"""Opens an image, whatever it comes as, as 8-bit RGB: the model sees what a person would see.

Every image that reaches the model goes through `open_image`. Pillow decodes; what it cannot decode whole is refused.
"""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

ImageSource = str | Path | bytes | bytearray | memoryview | Image.Image  # the one type of an image
MAX_PIXELS = 64_000_000  # 192 MB once decoded; no camera phone's standard mode goes beyond it
MAX_ASPECT = 100  # the short side is scaled to the encoder's size: one of an extreme shape would explode
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")

# What Pillow's plug-ins raise on files that are damaged or hostile. UnidentifiedImageError is an OSError.
_BOMB = (Image.DecompressionBombError, Image.DecompressionBombWarning)
_BROKEN = (OSError, ValueError, SyntaxError, EOFError, TypeError, LookupError, OverflowError, struct.error, zlib.error)
_BROKEN += _BOMB


class ImageError(ValueError):
    """An image cannot be used. The message names the file, says what is wrong and what to do about it."""


def open_image(source: ImageSource) -> Image.Image:
    """Open one image as 8-bit RGB, upright, on white where it is transparent.

    RGBA and palette images are laid on white; greyscale, CMYK and palette become RGB; 16-bit samples are scaled
    (not clipped) to 8 bits; the camera's EXIF orientation is applied; of an animation the first frame is taken.
    Colour profiles are not applied.

    Args:
        source: a path, the bytes of a file, or an image that Pillow already holds (left as it is; a copy is made).

    Returns:
        An image in mode "RGB", fully read, of any size from 1 x 1 up to `MAX_PIXELS`.

    Raises:
        ImageError: no such file, empty, not an image, too large or far too narrow (known before any pixel is
            decoded); cut off or damaged, so that its decoder does not find all pixels; or with numbers whose range is
            unknown.
    """
    if isinstance(source, Image.Image):
        _refuse_size(source, "the image")
        return _decode(source, "the image")
    if isinstance(source, bytes | bytearray | memoryview):
        return _open_file(io.BytesIO(source), "the image's bytes", len(source))
    if not isinstance(source, str | Path):
        raise ImageError(
            f"an image was given as {type(source).__name__}: give a path, the bytes of a file, or a Pillow image "
            "(for an array: PIL.Image.fromarray)"
        )
    name, path = str(source), Path(source)
    if name.startswith(("http://", "https://", "data:")):
        raise ImageError(f"{name[:80]}: addresses are not fetched; save the image as a file and give its path")
    if not path.exists():
        raise ImageError(f"{name}: there is no such file; check the name and the folder it should lie in")
    if not path.is_file():
        raise ImageError(f"{name}: this is not a file; give the path of one image")
    try:
        with path.open("rb") as file:
            return _open_file(file, name, path.stat().st_size)
    except PermissionError as error:
        raise ImageError(f"{name}: it may not be read by you; change its permissions") from error


def _open_file(file: io.BufferedIOBase, name: str, size: int) -> Image.Image:
    """Read the header with Pillow, then the pixels."""
    if size == 0:
        raise ImageError(f"{name}: the file is empty (0 bytes); copy or download it again")
    try:
        image = Image.open(file, formats=FORMATS)  # reads the header only
    except _BOMB as error:
        raise ImageError(
            f"{name}: its header promises too many pixels to decode; make it smaller, {MAX_PIXELS:,} pixels at most"
        ) from error
    except _BROKEN as error:
        raise ImageError(
            f"{name}: this is not an image, or the file is cut off or damaged; formats read: {', '.join(FORMATS)}"
        ) from error
    with image:
        _refuse_size(image, name)
        return _decode(image, name)


def _refuse_size(image: Image.Image, name: str) -> None:
    """Refuse what is too large or too narrow, by its header."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(
            f"{name}: {width:,} x {height:,} pixels are too many to decode; make it smaller, {MAX_PIXELS:,} at most"
        )
    if min(width, height) < 1 or max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError(
            f"{name}: {width:,} x {height:,} pixels is too narrow to be looked at; crop it, "
            f"its long side may be {MAX_ASPECT} times the short one at most"
        )


def _decode(image: Image.Image, name: str) -> Image.Image:
    """Read the pixels and convert them."""
    try:
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image), name)
    except ImageError:
        raise
    except _BROKEN as error:
        raise ImageError(
            f"{name}: the pixels cannot be read, the file is cut off or damaged ({error}); copy or download it again"
        ) from error


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Any of Pillow's modes to 8-bit RGB."""
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bits(image, name)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _to_8_bits(image: Image.Image, name: str) -> Image.Image:
    """Scale 16-bit greyscale (0 to 65,535), or floats from 0 to 1, to 0 to 255; anything else has no known white."""
    values = np.asarray(image)  # (H, W)
    white = 1.0 if image.mode == "F" else 65535.0
    if not (values.min() >= 0 and values.max() <= white):  # written so that NaN is refused too
        raise ImageError(
            f"{name}: its values run from {values.min()} to {values.max()}, so what is white is unknown; "
            "save it with 8 or 16 bits a channel"
        )
    grey = Image.fromarray(np.rint(values * (255.0 / white)).astype(np.uint8))
    if (clear := image.info.get("transparency")) is not None:  # a PNG's one see-through shade of grey
        grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return grey
