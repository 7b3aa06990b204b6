"""Image operations of the read path (resize, crop) and of uploads (JPEG orientation), contract http.md 6.9 and 8.7.

Pure functions from bytes to bytes. What cannot be decoded, or is larger than the bounds here, is handed back untouched:
a picture never fails a request. Imported with the first picture there is work on (Pillow is slow to import). Must not
import server or storage.
"""

from __future__ import annotations

import io
import math
import threading

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from pyvolume.ops.image_query import Operation

MAX_PIXELS = 100_000_000  # of an input or an output picture: 400 MB as RGBA, about the largest a camera makes
MAX_AT_ONCE = 2  # pictures in work at a time; more would only add memory, the work is CPU bound

_FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF")
_JPEG_QUALITY = 75
_ORIENTATION = int(ExifTags.Base.Orientation)
_TOP_LEFT = 1  # EXIF orientation of an upright picture
_EXACT_DITHER_PIXELS = 16_384  # 128 x 128, about 0.1 s of interpreted code
_QUANTISATION, _FRAME, _HUFFMAN, _START_OF_SCAN = 0xDB, 0xC0, 0xC4, 0xDA  # JPEG markers
_NO_PIXELS = bytes((8, 3, 0x00, 0x03, 0x02, 0))  # GIF image data: code size 8, clear and end

_slots = threading.BoundedSemaphore(MAX_AT_ONCE)

# Pillow's own limit only warns below twice its value; ours is checked before a pixel is decoded.
Image.MAX_IMAGE_PIXELS = None


def apply(data: bytes | memoryview, ext: str, todo: Operation) -> bytes | memoryview:
    """Crops, then resizes the result; gives `data` itself back where there is nothing to do or nothing can be done."""
    ext = ext.lower()
    with _slots:
        if todo.crop:
            data = _cropped(data, ext, todo)
        if todo.resize:
            data = _resized(data, ext, todo)
    return data


def _open(data: bytes | memoryview) -> Image.Image | None:
    """The first frame as RGBA, or None if it is no picture we know or too large a one."""
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as picture:
            if picture.width * picture.height > MAX_PIXELS or not picture.width or not picture.height:
                return None
            return _as_rgba(picture)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError, MemoryError, IndexError, KeyError):
        return None


def _as_rgba(picture: Image.Image) -> Image.Image:
    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
        # 16 bits a channel: the high byte, where Pillow would clip
        picture = picture.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    return picture.convert("RGBA")


def _cropped(data: bytes | memoryview, ext: str, todo: Operation) -> bytes | memoryview:
    picture = _open(data)
    if picture is None or todo.x2 > picture.width or todo.y2 > picture.height:
        return data
    return _encode(picture.crop((todo.x1, todo.y1, todo.x2, todo.y2)), ext, resized=False)


def _resized(data: bytes | memoryview, ext: str, todo: Operation) -> bytes | memoryview:
    picture = _open(data)
    if picture is None:
        return data
    width, height = todo.width, todo.height
    if not ((width != 0 and picture.width > width) or (height != 0 and picture.height > height)):
        return data
    if width * height > MAX_PIXELS or max(width, height) > MAX_PIXELS:
        return data
    result: Image.Image | None
    if todo.mode == "fit":
        result = _fit(picture, width, height)
    elif todo.mode == "fill" or (width == height and picture.width != picture.height):
        result = _fill(picture, width, height)
    else:
        result = _scale(picture, width, height)
    if result is None:
        return _empty(ext)
    return _encode(result, ext, resized=True)


def _scale(picture: Image.Image, width: int, height: int) -> Image.Image | None:
    """Exactly width x height; a side of 0 keeps the ratio (rounded half up, at least 1). None: no picture at all."""
    if width < 0 or height < 0 or (width == 0 and height == 0):
        return None
    if width == 0:
        width = max(1, math.floor(height * picture.width / picture.height + 0.5))
    if height == 0:
        height = max(1, math.floor(width * picture.height / picture.width + 0.5))
    if width * height > MAX_PIXELS:
        return None
    if (width, height) == picture.size:
        return picture
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def _fit(picture: Image.Image, width: int, height: int) -> Image.Image | None:
    """The largest size inside the box, the other side cut off to whole pixels."""
    if width <= 0 or height <= 0:
        return None
    if picture.width <= width and picture.height <= height:
        return picture
    ratio = picture.width / picture.height
    if ratio > width / height:
        return _scale(picture, width, int(width / ratio))
    return _scale(picture, int(height * ratio), height)


def _fill(picture: Image.Image, width: int, height: int) -> Image.Image | None:
    """Covers the box and cuts the middle out: pictures from 100 x 100 on are cut first, smaller ones scaled first."""
    if width <= 0 or height <= 0:
        return None
    if picture.size == (width, height):
        return picture
    wider = picture.width / picture.height >= width / height
    if picture.width >= 100 and picture.height >= 100:
        if wider:
            cut = _middle(picture, int(max(1.0, picture.height * width / height) + 0.5), picture.height)
        else:
            cut = _middle(picture, picture.width, int(max(1.0, picture.width * height / width) + 0.5))
        return _scale(cut, width, height)
    scaled = _scale(picture, 0, height) if wider else _scale(picture, width, 0)
    return None if scaled is None else _middle(scaled, width, height)


def _middle(picture: Image.Image, width: int, height: int) -> Image.Image:
    width, height = min(width, picture.width), min(height, picture.height)
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))


def _empty(ext: str) -> bytes:
    """A picture without pixels, as upstream's encoders write it: headers alone, for a PNG nothing at all."""
    if ext in (".jpg", ".jpeg"):
        whole = _jpeg(Image.new("RGB", (1, 1)))
        frame, scan = whole.index(b"\xff\xc0"), whole.index(b"\xff\xda")
        return whole[: frame + 5] + bytes(4) + whole[frame + 9 : scan + 14] + b"\xff\xd9"
    if ext == ".gif":
        return _gif_frame(0, 0, _NO_PIXELS)
    return b""


def _encode(picture: Image.Image, ext: str, *, resized: bool) -> bytes:
    """Encodes by extension; a resized `.webp` becomes a PNG, as upstream has no encoder for it."""
    out = io.BytesIO()
    if ext in (".jpg", ".jpeg"):
        return _jpeg(picture)
    if ext == ".gif":
        return _gif(picture)
    if ext == ".png" or resized:
        if picture.getchannel("A").getextrema() == (255, 255):
            picture = picture.convert("RGB")
        picture.save(out, "PNG")
    return out.getvalue()


def _opaque(picture: Image.Image) -> Image.Image:
    """Over black, which is what an encoder without alpha makes of premultiplied pixels."""
    if picture.mode == "RGB":
        return picture
    ground = Image.new("RGBA", picture.size, (0, 0, 0, 255))
    ground.alpha_composite(picture)
    return ground.convert("RGB")


def _plan9_palette() -> bytes:
    """256 colours of the Plan 9 colour map (16 blocks of 4 x 4, a block per red level and shade): upstream's GIFs."""
    colours = [b""] * 256
    for block in range(16):
        red, shade = divmod(block, 4)
        for green in range(4):
            for blue in range(4):
                place = (shade - red + 4 * green + blue) & 15
                strongest = max(red, green, blue)
                if strongest:
                    scale = 17 * (4 * strongest + shade)
                    colour = bytes(part * scale // strongest for part in (red, green, blue))
                else:
                    colour = bytes((17 * shade,)) * 3
                colours[16 * block + place] = colour
    return b"".join(colours)


_PALETTE = _plan9_palette()
_PLAN9 = Image.new("P", (1, 1))
_PLAN9.putpalette(_PALETTE)


def _paletted(picture: Image.Image) -> Image.Image:
    """Plan 9 colours with Floyd-Steinberg dither. Pillow's own is used where the loop in Python would take too long."""
    picture = _opaque(picture)
    if picture.width * picture.height > _EXACT_DITHER_PIXELS:
        return picture.quantize(palette=_PLAN9, dither=Image.Dither.FLOYDSTEINBERG)
    result = Image.frombytes("P", picture.size, _dither(picture))
    result.putpalette(_PALETTE)
    return result


def _dither(picture: Image.Image) -> bytes:
    """Palette places of an RGB picture, the error carried in 1/16 of a 16-bit channel as upstream's library does it."""
    palette = [
        (red * 257, green * 257, blue * 257)
        for red, green, blue in zip(_PALETTE[0::3], _PALETTE[1::3], _PALETTE[2::3], strict=True)
    ]
    nearest: dict[tuple[int, int, int], int] = {}
    pixels = picture.tobytes()
    width = picture.width
    below = [[0, 0, 0] for _ in range(width + 2)]
    out = bytearray()
    for row in range(picture.height):
        here, below = below, [[0, 0, 0] for _ in range(width + 2)]
        at = row * width * 3
        for column in range(width):
            carried = here[column + 1]
            red, green, blue = (
                min(max(pixels[at + channel] * 257 + _sixteenth(carried[channel]), 0), 0xFFFF) for channel in range(3)
            )
            at += 3
            colour = (red, green, blue)
            place = nearest.get(colour)
            if place is None:
                place = nearest[colour] = _closest(palette, red, green, blue)
            out.append(place)
            for channel, (is_, taken) in enumerate(zip(colour, palette[place], strict=True)):
                error = is_ - taken
                below[column][channel] += error * 3
                below[column + 1][channel] += error * 5
                below[column + 2][channel] += error
                here[column + 2][channel] += error * 7
    return bytes(out)


def _sixteenth(value: int) -> int:
    """Division by 16 that rounds towards zero."""
    return value // 16 if value >= 0 else -(-value // 16)


def _closest(palette: list[tuple[int, int, int]], red: int, green: int, blue: int) -> int:
    best, place = 1 << 62, 0
    for index, (r, g, b) in enumerate(palette):
        distance = ((red - r) ** 2 >> 2) + ((green - g) ** 2 >> 2) + ((blue - b) ** 2 >> 2)
        if distance < best:
            best, place = distance, index
            if not distance:
                break
    return place


def _gif(picture: Image.Image) -> bytes:
    """A GIF that says 89a, as upstream's encoder does whatever is in it."""
    out = io.BytesIO()
    _paletted(picture).save(out, "GIF", optimize=False)
    return b"GIF89a" + out.getvalue()[6:]


def _gif_frame(width: int, height: int, data: bytes) -> bytes:
    """A one-frame GIF of ready coded data (minimum code size, sub-blocks, terminator) with the Plan 9 palette."""
    size = width.to_bytes(2, "little") + height.to_bytes(2, "little")
    return b"GIF89a" + size + b"\x87\0\0" + _PALETTE + b"\x2c\0\0\0\0" + size + b"\0" + data + b";"


def _jpeg(picture: Image.Image) -> bytes:
    """Quality 75 in upstream's layout: one table segment of each kind and no application data."""
    out = io.BytesIO()
    _opaque(picture).save(out, "JPEG", quality=_JPEG_QUALITY)
    whole = out.getvalue()
    segments: dict[int, list[bytes]] = {}
    at = 2
    while whole[at + 1] != _START_OF_SCAN:
        length = int.from_bytes(whole[at + 2 : at + 4], "big")
        segments.setdefault(whole[at + 1], []).append(whole[at + 4 : at + 2 + length])
        at += 2 + length
    head = b"\xff\xd8"
    for marker in (_QUANTISATION, _FRAME, _HUFFMAN):
        body = b"".join(segments[marker])
        head += bytes((0xFF, marker)) + (len(body) + 2).to_bytes(2, "big") + body
    return head + whole[at:]


def upright(data: bytes | memoryview) -> bytes | memoryview:
    """Turns a JPEG by its EXIF orientation and writes it anew without EXIF; anything else comes back as it is.

    Upstream re-encodes for every orientation but 1, values outside 1..8 included (those are not turned).
    """
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "MPO", "TIFF")) as picture:
            orientation = picture.getexif().get(_ORIENTATION)
            if not isinstance(orientation, int) or orientation == _TOP_LEFT:
                return data
            if picture.width * picture.height > MAX_PIXELS:
                return data
            with _slots:
                turned = ImageOps.exif_transpose(picture) if 2 <= orientation <= 8 else picture
                return _jpeg(_as_rgba(turned))
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError, MemoryError, IndexError, KeyError):
        return data
