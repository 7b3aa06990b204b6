"""Sizes, formats and no-ops of image operations (contract http.md 6.9, 8.7); pixels are the encoders' business."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from pyvolume.ops import image_query, images


def picture(kind: str, size: tuple[int, int] = (60, 40), mode: str = "RGB", **options: object) -> bytes:
    made = Image.new(mode, size)
    made.putdata(
        [
            ((x * 4) % 256, (y * 5) % 256, (x + y) % 256, 255)[: len(mode)]
            for y in range(size[1])
            for x in range(size[0])
        ]
    )
    out = io.BytesIO()
    made.save(out, kind, **options)
    return out.getvalue()


def shape(data: bytes | memoryview) -> tuple[str | None, tuple[int, int]]:
    with Image.open(io.BytesIO(data)) as opened:
        return opened.format, opened.size


def op(ext: str, **query: str) -> image_query.Operation:
    return image_query.operation(ext, query)


@pytest.mark.parametrize(
    ("query", "size"),
    [
        ({"width": "30", "height": "20"}, (30, 20)),
        ({"width": "30"}, (30, 20)),
        ({"height": "10"}, (15, 10)),
        ({"width": "100", "height": "20"}, (100, 20)),
        ({"width": "7"}, (7, 5)),
        ({"width": "1"}, (1, 1)),
        ({"width": "20", "height": "20"}, (20, 20)),
        ({"width": "30", "height": "30", "mode": "fit"}, (30, 20)),
        ({"width": "7", "height": "9", "mode": "fit"}, (7, 4)),
        ({"width": "30", "height": "10", "mode": "fill"}, (30, 10)),
        ({"width": "10", "height": "30", "mode": "fill"}, (10, 30)),
        ({"width": "30", "height": "30", "mode": "FIT"}, (30, 30)),
    ],
)
@pytest.mark.parametrize(("ext", "kind"), [(".png", "PNG"), (".jpg", "JPEG"), (".jpeg", "JPEG"), (".gif", "GIF")])
def test_sizes(ext: str, kind: str, query: dict[str, str], size: tuple[int, int]) -> None:
    assert shape(images.apply(picture("PNG"), ext, op(ext, **query))) == (kind, size)


def test_fill_of_a_large_picture_is_cut_before_it_is_scaled() -> None:
    assert shape(images.apply(picture("PNG", (300, 200)), ".png", op(".png", width="50", height="50"))) == (
        "PNG",
        (50, 50),
    )


@pytest.mark.parametrize(
    "query", [{"width": "60", "height": "40"}, {"width": "100"}, {"height": "41"}, {"width": "0"}, {"width": "x"}, {}]
)
def test_a_picture_inside_the_box_is_left_alone(query: dict[str, str]) -> None:
    data = picture("PNG")
    todo = op(".png", **query)
    assert not todo or images.apply(data, ".png", todo) is data


def test_webp_is_answered_as_png() -> None:
    assert shape(images.apply(picture("WEBP"), ".webp", op(".webp", width="10"))) == ("PNG", (10, 7))


def test_the_extension_decides_the_format_not_the_content() -> None:
    assert shape(images.apply(picture("PNG"), ".JPG", op(".jpg", width="30"))) == ("JPEG", (30, 20))


@pytest.mark.parametrize(
    "query", [{"width": "30", "mode": "fit"}, {"width": "30", "mode": "fill"}, {"width": "-1", "height": "5"}]
)
def test_a_missing_or_negative_side_leaves_no_pixels(query: dict[str, str]) -> None:
    assert images.apply(picture("PNG"), ".png", op(".png", **query)) == b""
    jpeg = bytes(images.apply(picture("JPEG"), ".jpg", op(".jpg", **query)))
    assert (jpeg[:4], jpeg[-2:], len(jpeg)) == (b"\xff\xd8\xff\xdb", b"\xff\xd9", 591)
    gif = bytes(images.apply(picture("GIF"), ".gif", op(".gif", **query)))
    assert (gif[:10], len(gif)) == (b"GIF89a\0\0\0\0", 798)


@pytest.mark.parametrize(
    ("corners", "size"),
    [(("0", "0", "10", "5"), (10, 5)), (("50", "30", "60", "40"), (10, 10)), (("0", "0", "60", "40"), (60, 40))],
)
def test_crop(corners: tuple[str, str, str, str], size: tuple[int, int]) -> None:
    query = dict(zip(("crop_x1", "crop_y1", "crop_x2", "crop_y2"), corners, strict=True))
    assert shape(images.apply(picture("PNG"), ".png", op(".png", **query))) == ("PNG", size)


@pytest.mark.parametrize(
    "corners",
    [
        ("0", "0", "61", "5"),
        ("0", "0", "10", "41"),
        ("-1", "0", "10", "5"),
        ("10", "0", "10", "5"),
        ("5", "5", "1", "9"),
    ],
)
def test_crop_outside_or_empty_changes_nothing(corners: tuple[str, str, str, str]) -> None:
    data = picture("PNG")
    query = dict(zip(("crop_x1", "crop_y1", "crop_x2", "crop_y2"), corners, strict=True))
    todo = op(".png", **query)
    assert not todo or images.apply(data, ".png", todo) is data


def test_crop_comes_before_resize() -> None:
    todo = op(".png", crop_x1="0", crop_y1="0", crop_x2="20", crop_y2="10", width="10")
    assert shape(images.apply(picture("PNG"), ".png", todo)) == ("PNG", (10, 5))


def test_extensions() -> None:
    assert not op(".bin", width="5")
    assert not op(".PNG", width="5"), "compared as given"
    assert op(".webp", width="5").resize
    assert not op(".webp", crop_x2="5", crop_y2="5").crop


@pytest.mark.parametrize("data", [b"", b"\x89PNG\r\n\x1a\nbroken", b"plain text", picture("PNG")[:100]])
def test_what_cannot_be_decoded_comes_back(data: bytes) -> None:
    todo = op(".png", width="5", crop_x2="3", crop_y2="3")
    assert images.apply(data, ".png", todo) is data


def test_too_many_pixels_are_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 1000)
    data = picture("PNG")
    assert images.apply(data, ".png", op(".png", width="5")) is data
    small = picture("PNG", (20, 20))
    assert images.apply(small, ".png", op(".png", width="2000", height="10")) is small


@pytest.mark.parametrize(
    ("text", "value"),
    [("5", 5), ("+5", 5), ("-5", -5), ("", 0), ("5x", 0), (" 5", 0), ("9" * 19, 0), ("9" * 40, 0), ("0" * 30 + "7", 7)],
)
def test_numbers_as_gos_atoi(text: str, value: int) -> None:
    assert op(".png", width=text, height="1").width == value


def test_deep_greyscale_keeps_its_high_byte() -> None:
    deep = Image.new("I;16", (20, 10))
    deep.putdata([65535] * 200)
    out = io.BytesIO()
    deep.save(out, "PNG")
    with Image.open(io.BytesIO(images.apply(out.getvalue(), ".png", op(".png", width="4")))) as made:
        assert made.convert("RGB").getpixel((1, 1)) == (255, 255, 255)


def jpeg_with_orientation(value: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = value
    return picture("JPEG", (32, 16), exif=exif.tobytes())


@pytest.mark.parametrize(
    ("value", "size"), [(2, (32, 16)), (3, (32, 16)), (6, (16, 32)), (8, (16, 32)), (9, (32, 16)), (0, (32, 16))]
)
def test_orientation_is_applied_and_exif_lost(value: int, size: tuple[int, int]) -> None:
    turned = bytes(images.upright(jpeg_with_orientation(value)))
    assert shape(turned) == ("JPEG", size)
    with Image.open(io.BytesIO(turned)) as opened:
        assert not dict(opened.getexif())


@pytest.mark.parametrize("data", [jpeg_with_orientation(1), picture("JPEG"), picture("PNG"), b"\xff\xd8broken", b""])
def test_upright_pictures_stay_as_they_are(data: bytes) -> None:
    assert images.upright(data) is data


def test_small_gif_is_dithered_with_the_plan9_palette() -> None:
    data = bytes(images.apply(picture("PNG"), ".gif", op(".gif", width="12")))
    assert data[10] & 0x87 == 0x87, "a table of 256 colours"
    assert data[13:16] == bytes((0, 0, 0))
    with Image.open(io.BytesIO(data)) as made:
        near = made.convert("RGB").resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
    with Image.open(io.BytesIO(picture("PNG"))) as source:
        wanted = source.convert("RGB").resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
    assert all(abs(a - b) < 12 for a, b in zip(near, wanted, strict=True))
