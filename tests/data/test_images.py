"""Images: all modes become RGB, and files that are no images are refused."""

import io
import multiprocessing
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from minivlm.data.images import MAX_PIXELS, ImageError, open_image

WHITE = (255, 255, 255)


def as_bytes(image: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_by_hand(width: int, height: int, depth: int, colour: int, rows: list[bytes], extra: bytes = b"") -> bytes:
    """A PNG from the specification, so that Pillow's writer is not its own judge."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    body = png_chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + header + extra + body + png_chunk(b"IEND", b"")


@pytest.fixture
def photo() -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def test_rgb_comes_back_unchanged_from_every_kind_of_source(photo, tmp_path):
    """The name may be Chinese, and its suffix wrong."""
    path = tmp_path / "照片 1.jpg"
    path.write_bytes(as_bytes(photo, "PNG"))
    for source in (path, str(path), path.read_bytes(), bytearray(path.read_bytes()), photo):
        opened = open_image(source)
        assert opened.mode == "RGB"
        assert opened.tobytes() == photo.tobytes()
    assert open_image(photo) is not photo


def row(mode: str, *pixels) -> Image.Image:
    image = Image.new(mode, (len(pixels), 1))
    image.putdata(pixels)
    return image


def flat(mode: str, colour) -> Image.Image:
    return Image.new(mode, (2, 2), colour)


SEE_THROUGH = png_chunk(b"tRNS", struct.pack(">H", 300))
PALETTE = png_chunk(b"PLTE", bytes([10, 20, 30, 200, 100, 50])) + png_chunk(b"tRNS", bytes([255, 0]))
MODES = {  # a file in a mode of its own, and its first row in RGB; what can be seen through lies on white
    "RGBA": (
        as_bytes(row("RGBA", (255, 0, 0, 255), (0, 0, 0, 0), (0, 0, 0, 128)), "PNG"),
        [(255, 0, 0), WHITE, (127, 127, 127)],
    ),
    "grey with alpha": (as_bytes(row("LA", (40, 255), (0, 0)), "PNG"), [(40, 40, 40), WHITE]),
    "a palette with an alpha for every entry": (png_by_hand(2, 1, 8, 3, [b"\0\1"], PALETTE), [(10, 20, 30), WHITE]),
    "grey": (as_bytes(flat("L", 77), "JPEG", quality=100), [(77, 77, 77)] * 2),
    "black and white": (as_bytes(flat("1", 1), "PNG"), [WHITE] * 2),
    "16 bits, grey with a see-through shade": (
        png_by_hand(2, 1, 16, 0, [struct.pack(">2H", 300, 25700)], SEE_THROUGH),
        [WHITE, (100, 100, 100)],
    ),
    "16 bits, colour": (
        png_by_hand(2, 1, 16, 2, [struct.pack(">6H", 65535, 0, 32896, 257, 25700, 51400)]),
        [(255, 0, 128), (1, 100, 200)],
    ),
    "ink, JPEG": (as_bytes(flat("CMYK", (0, 255, 255, 0)), "JPEG"), [(255, 0, 0)] * 2),
    "ink, TIFF": (as_bytes(flat("CMYK", (0, 255, 255, 0)), "TIFF"), [(255, 0, 0)] * 2),
    "Lab": (as_bytes(flat("LAB", (255, 128, 128)), "TIFF"), [WHITE] * 2),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_rgb(mode):
    data, expected = MODES[mode]
    converted = open_image(data)  # by Pillow's tables of ink and of Lab, and at half of an alpha, a little is rounded
    within = 3 if mode.startswith(("ink", "Lab")) else mode == "RGBA"
    np.testing.assert_allclose(np.asarray(converted)[0].astype(int), expected, atol=within)


@pytest.mark.parametrize("form", ["PNG", "GIF"])
def test_palette_with_and_without_transparency(form):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([0, 1])
    plain = open_image(as_bytes(image, form))
    assert [plain.getpixel((x, 0)) for x in range(2)] == [(10, 20, 30), (200, 100, 50)]
    clear = open_image(as_bytes(image, form, transparency=1))
    assert [clear.getpixel((x, 0)) for x in range(2)] == [(10, 20, 30), WHITE]


def test_16_bit_grey_is_scaled_not_clipped():
    values = [0, 128, 257, 32768, 40000, 65535]
    expected = [round(value / 257) for value in values]  # 65,535 / 255 = 257
    png = png_by_hand(len(values), 1, 16, 0, [struct.pack(">6H", *values)])
    tiff = as_bytes(Image.fromarray(np.array([values], dtype=np.uint16)), "TIFF")
    pgm = b"P5 6 1 65535\n" + struct.pack(">6H", *values)
    for data in (png, tiff, pgm):
        opened = open_image(data)
        assert [opened.getpixel((x, 0)) for x in range(6)] == [(v, v, v) for v in expected]


def test_floats_from_0_to_1_are_scaled_and_others_refused():
    good = Image.fromarray(np.array([[0.0, 0.5, 1.0]], dtype=np.float32))
    assert [open_image(good).getpixel((x, 0))[0] for x in range(3)] == [0, 128, 255]
    for values in ([-1.0, 0.5], [0.0, 300.0], [0.0, np.nan]):
        with pytest.raises(ImageError, match=r"what is white is unknown.*8 or 16 bits"):
            open_image(Image.fromarray(np.array([values], dtype=np.float32)))
    with pytest.raises(ImageError, match="what is white is unknown"):
        open_image(Image.fromarray(np.array([[0, 70_000]], dtype=np.int32)))


def corner_red() -> Image.Image:
    """Red in the upper left of a wide image, as a person sees it."""
    image = Image.new("RGB", (48, 32), "white")
    image.paste((255, 0, 0), (0, 0, 16, 16))
    return image


# how a camera's sensor holds the upright image for each EXIF orientation (the inverse of what a viewer applies)
STORED = {
    1: lambda p: p,
    2: lambda p: p.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    3: lambda p: p.transpose(Image.Transpose.ROTATE_180),
    4: lambda p: p.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
    5: lambda p: p.transpose(Image.Transpose.TRANSPOSE),
    6: lambda p: p.transpose(Image.Transpose.ROTATE_90),
    7: lambda p: p.transpose(Image.Transpose.TRANSVERSE),
    8: lambda p: p.transpose(Image.Transpose.ROTATE_270),
}


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation_is_applied(orientation, form):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = as_bytes(STORED[orientation](corner_red()), form, exif=exif)
    opened = open_image(data)
    assert opened.size == (48, 32)
    assert opened.getpixel((4, 4)) == pytest.approx((255, 0, 0), abs=12)
    assert opened.getpixel((44, 28)) == pytest.approx(WHITE, abs=12)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_damaged_exif_block_does_not_matter():
    whole = as_bytes(corner_red(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f" + b"\xaa" * 40)
    assert open_image(whole).size == (48, 32)


def test_16_bit_image_with_orientation():
    values = np.zeros((2, 3), dtype=np.uint16)
    values[0, 0] = 65535
    exif = Image.Exif()
    exif[0x0112] = 6  # stored rotated left: the viewer turns it right
    opened = open_image(as_bytes(Image.fromarray(values), "PNG", exif=exif))
    assert opened.size == (2, 3)
    assert opened.getpixel((1, 0)) == WHITE


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP"])
def test_animation_gives_its_first_frame(form):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    data = as_bytes(frames[0], form, save_all=True, append_images=frames[1:], duration=50)
    assert open_image(data).getpixel((4, 4)) == pytest.approx((255, 0, 0), abs=4)


# ---- refused


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (Path("nowhere.png"), r"nowhere\.png: there is no such file"),
        (Path("/"), "not a file"),
        ("https://example.org/cat.jpg", "save the image as a file"),
        (np.zeros((4, 4, 3), dtype=np.uint8), r"ndarray.*fromarray"),
        (Image.new("RGB", (1, 2000)), r"1 x 2,000 pixels is too narrow"),
    ],
)
def test_other_sources(source, message):
    with pytest.raises(ImageError, match=message):
        open_image(source)


POSTSCRIPT = as_bytes(Image.new("RGB", (4, 4)), "EPS")  # would be run by another program
NO_IMAGES = [b"hello, world", b"%PDF-1.7 ...", b"BMW, a car; RIFF, a word", b"\0" * 40, POSTSCRIPT]


@pytest.mark.parametrize("data", [b"", *NO_IMAGES])
def test_not_an_image(data, tmp_path):
    path = tmp_path / "notes.png"
    path.write_bytes(data)
    message = r"this is not an image.*formats read: .*PNG" if data else "the file is empty"
    with pytest.raises(ImageError, match=rf"notes\.png: {message}"):
        open_image(path)


def test_unreadable_file(photo, tmp_path, monkeypatch):
    path = tmp_path / "locked.png"
    photo.save(path)

    def locked(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", locked)
    with pytest.raises(ImageError, match=r"locked\.png.*permissions"):
        open_image(path)


@pytest.fixture
def forbid_decoding(monkeypatch):
    """From its call on, whoever decodes a pixel fails."""
    whole = as_bytes(Image.new("RGB", (4, 4)), "PNG")

    def decoder(*_):
        raise AssertionError("the pixels were decoded")

    def forbid():
        monkeypatch.setattr(ImageFile.ImageFile, "load", decoder)
        monkeypatch.setattr(Image.Image, "load", decoder)
        with pytest.raises(AssertionError, match="decoded"):
            open_image(whole)

    return forbid


def with_thumbnail(image: Image.Image) -> bytes:
    """A JPEG with a whole JPEG in its EXIF block, as cameras write it."""
    thumbnail = as_bytes(image.resize((16, 12)), "JPEG")
    data = as_bytes(image, "JPEG", exif=b"Exif\0\0" + b"MM\0*\0\0\0\x08" + bytes(6) + thumbnail)
    assert data.count(b"\xff\xd9") == 2
    return data


def with_restarts(image: Image.Image) -> bytes:
    data = as_bytes(image, "JPEG", restart_marker_rows=1)
    assert b"\xff\xd0" in data and b"\xff\xd1" in data
    return data


def animated(image: Image.Image, form: str) -> bytes:
    return as_bytes(image, form, save_all=True, append_images=[image.rotate(90), image.rotate(180)], duration=50)


KINDS = {
    "PNG": lambda p: as_bytes(p, "PNG"),
    "PNG, animated": lambda p: animated(p, "PNG"),
    "JPEG": lambda p: as_bytes(p, "JPEG"),
    "JPEG, progressive": lambda p: as_bytes(p, "JPEG", progressive=True),
    "JPEG, restarts": with_restarts,
    "JPEG, thumbnail": with_thumbnail,
    "JPEG, several images": lambda p: as_bytes(p, "MPO", save_all=True, append_images=[p]),
    "GIF": lambda p: as_bytes(p, "GIF"),
    "GIF, animated": lambda p: animated(p, "GIF"),
    "WebP": lambda p: as_bytes(p, "WEBP"),
    "WebP, animated": lambda p: animated(p, "WEBP"),
    "BMP": lambda p: as_bytes(p, "BMP"),
    "TIFF": lambda p: as_bytes(p, "TIFF"),
    "PPM": lambda p: as_bytes(p, "PPM"),
}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_off_file_is_refused_or_has_all_its_pixels(photo, kind, tmp_path):
    """From the header on, and byte by byte at the end; only checksums, ends and further frames may be missing."""
    whole, path = KINDS[kind](photo), tmp_path / "cut.bin"
    pixels, size = open_image(whole).tobytes(), len(whole)
    refusals = set()
    for cut in (1, 8, 30, *range(size // 10, size, size // 10), *range(size - 30, size)):
        path.write_bytes(whole[:cut])
        for source in (path, whole[:cut]):
            try:
                assert open_image(source).tobytes() == pixels
            except ImageError as error:
                assert "cut off or damaged" in str(error)
                refusals.add(cut)
    assert refusals >= {1, 8, 30, size // 10, size // 10 * 2}


@pytest.mark.parametrize("after", [b"", b"\0", b"\xff\xd8", b"what a phone hides behind its images" * 9])
@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_file_is_opened_whatever_follows_its_end(photo, kind, after):
    opened = open_image(KINDS[kind](photo) + after)
    assert opened.size == photo.size and len(opened.getcolors(9999)) > 200  # decoded, not blank


def test_what_decoders_forgive_in_a_whole_file_is_forgiven(photo):
    """Fill bytes before a JPEG's marks, a zero between a GIF's blocks, a BMP that does not say its size."""
    jpeg, gif, bmp = (as_bytes(photo, form) for form in ("JPEG", "GIF", "BMP"))
    assert open_image(jpeg[:-2] + b"\xff\xff\xff\xd9").size == (80, 60)
    assert open_image(gif[:-1] + b"\0\0;").size == (80, 60)
    assert open_image(bmp[:2] + bytes(4) + bmp[6:]).size == (80, 60)


def test_a_large_file_that_is_no_image_is_not_read_through(tmp_path):
    pytest.importorskip("resource", reason="measures memory as Unix does")
    path = tmp_path / "film.mp4"
    with path.open("wb") as file:
        file.truncate(300_000_000)  # takes no room on the disk, but would in memory
    assert "film.mp4: this is not an image" in refused_in_little_memory(path)


def test_damaged_pixels(photo):
    data = bytearray(as_bytes(photo, "PNG"))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(ImageError, match="damaged"):
        open_image(bytes(data))


@pytest.mark.parametrize("side", [int(MAX_PIXELS**0.5) + 1, 10_000, 20_000])
def test_too_many_pixels_are_refused_from_the_header(forbid_decoding, side):
    """Of a file of 100 bytes, also where Pillow itself warns or refuses."""
    forbid_decoding()
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(b"\0"))
    message = "8,001 x 8,001 pixels are too many" if side < 10_000 else "make it smaller, 64,000,000 pixels at most"
    with warnings.catch_warnings(), pytest.raises(ImageError, match=message):
        warnings.simplefilter("error")
        open_image(data)


def test_a_genuine_20_000_square_costs_no_memory(tmp_path):
    """A real one-bit file of 50 MB unpacked, opened under a limit that decoding it to RGB would break."""
    pytest.importorskip("resource", reason="measures memory as Unix does")
    path = tmp_path / "huge.png"
    rows = zlib.compressobj()
    body = b"".join(rows.compress(b"\0" * 2_501) for _ in range(20_000)) + rows.flush()
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 20_000, 20_000, 1, 0, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", body) + png_chunk(b"IEND", b""))
    assert "huge.png" in refused_in_little_memory(path)


def refusal(path: Path) -> tuple[str, int]:
    """The message for a file, and by how many kilobytes memory grew."""
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ImageError) as refused:
        open_image(path)
    return str(refused.value), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before


def refused_in_little_memory(path: Path) -> str:
    """The message for a file, from a new process: memory that this one has used before would hide growth."""
    with multiprocessing.Pool(1) as pool:
        message, grown = pool.apply(refusal, (path,))
    assert grown < 30_000
    return message
