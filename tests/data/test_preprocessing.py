"""Decoding, EXIF orientation and the evaluation square."""

import io

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageOps

from pipeline.data.preprocessing import PADDING_GRAY, decode, preprocess, resize_bilinear, resize_to_square


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    smooth = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    return np.asarray(Image.fromarray(smooth).resize((70, 45), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "GIF", "WEBP"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_every_format_decodes_to_pillow_s_pixels(image: np.ndarray, kind: str, mode: str) -> None:
    file = encode(Image.fromarray(image).convert(mode), kind, **({"lossless": True} if kind == "WEBP" else {}))
    expected = np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))
    np.testing.assert_array_equal(decode(tf.constant(file), tf.constant(1)), expected)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_transparency_is_dropped(image: np.ndarray, kind: str) -> None:
    alpha = np.arange(45 * 70, dtype=np.uint8).reshape(45, 70, 1) | 1
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    file = encode(Image.fromarray(np.concatenate([image, alpha], 2)), kind, **options)
    np.testing.assert_array_equal(decode(tf.constant(file), tf.constant(1)), image)


def test_cmyk_and_16_bits_and_animations_decode(image: np.ndarray) -> None:
    cmyk = encode(Image.fromarray(image).convert("CMYK"), "JPEG", quality=95)
    assert np.abs(decode(tf.constant(cmyk), tf.constant(1)).numpy().astype(int) - image).mean() < 4
    deep = encode(Image.fromarray(image[..., 0].astype(np.uint16) * 257))
    np.testing.assert_array_equal(decode(tf.constant(deep), tf.constant(1)), np.repeat(image[..., :1], 3, 2))
    frames = [Image.fromarray(p).convert("P") for p in (image, 255 - image)]
    moving = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(decode(tf.constant(moving), tf.constant(1)), np.asarray(frames[0].convert("RGB")))


def test_what_is_no_image_raises() -> None:
    for broken in (b"", b"no image", encode(Image.new("RGB", (64, 64)), "JPEG")[:200]):
        with pytest.raises(tf.errors.InvalidArgumentError):
            decode(tf.constant(broken), tf.constant(1))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_orientation_equals_pillow_s_exif_transpose(image: np.ndarray, kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = encode(Image.fromarray(image), kind, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(file))))
    np.testing.assert_array_equal(decode(tf.constant(file), tf.constant(orientation, tf.uint8)), expected)


def marked(height: int, width: int) -> np.ndarray:
    """An image whose red is the row and whose green is the column, each from 0 to 250."""
    rows, columns = np.linspace(0, 250, height), np.linspace(0, 250, width)
    return (
        np.stack([*np.meshgrid(rows, columns, indexing="ij"), np.zeros((height, width))], -1).round().astype(np.uint8)
    )


@pytest.mark.parametrize(("height", "width"), [(300, 500), (500, 300), (256, 256), (257, 300), (259, 300)])
def test_crop_takes_the_center_of_side_r_over_r_plus_32(height: int, width: int) -> None:
    square = resize_to_square(marked(height, width), 96, "crop").numpy().astype(float)
    side = round(min(height, width) * 96 / 128)
    for axis, length in enumerate((height, width)):
        start = (length - side + 1) // 2
        step = 250 / (length - 1)
        line = square[:, :, axis].mean(1 - axis)
        assert line[1] == pytest.approx((start + (1 + 0.5) * side / 96 - 0.5) * step, abs=1)
        assert line[-2] == pytest.approx((start + (95 - 0.5) * side / 96 - 0.5) * step, abs=1)


@pytest.mark.parametrize(("height", "width"), [(150, 200), (333, 250), (60, 90), (1200, 900)])
def test_crop_resamples_as_pillow_does(height: int, width: int) -> None:
    coarse = np.random.default_rng(1).integers(
        64, 192, (height // 3, width // 3, 3), np.uint8
    )  # Pillow clips between its two passes
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    side = int(min(height, width) * 96 / 128 + 0.5)
    left, top = (width - side + 1) // 2, (height - side + 1) // 2
    expected = image.crop((left, top, left + side, top + side)).resize((96, 96), Image.Resampling.BICUBIC)
    apart = resize_to_square(np.asarray(image), 96, "crop").numpy().astype(int) - np.asarray(expected)
    assert np.abs(apart).max() <= 1
    assert np.abs(apart).mean() < 0.3


def test_squash_keeps_every_corner() -> None:
    square = resize_to_square(marked(90, 40), 64, "squash").numpy()
    np.testing.assert_allclose(
        square[[0, 0, -1, -1], [0, -1, 0, -1], :2], [[0, 0], [0, 250], [250, 0], [250, 250]], atol=3
    )


@pytest.mark.parametrize(("height", "width"), [(40, 80), (80, 40)])
def test_letterbox_keeps_the_aspect_and_pads_with_gray(height: int, width: int) -> None:
    square = resize_to_square(np.full((height, width, 3), 250, np.uint8), 64, "letterbox").numpy()
    square = square if height < width else square.transpose(1, 0, 2)
    assert (square[:16] == PADDING_GRAY).all()
    assert (square[48:] == PADDING_GRAY).all()
    assert (square[16:48] == 250).all()


def test_slivers_survive_every_resize() -> None:
    for resize in ("crop", "squash", "letterbox"):
        for shape in ((1, 400, 3), (400, 1, 3), (1, 1, 3)):
            assert resize_to_square(np.full(shape, 7, np.uint8), 32, resize).shape == (32, 32, 3)


def test_shrinking_does_not_alias() -> None:
    stripes = np.zeros((300, 300, 3), np.uint8)
    stripes[:, ::2] = 255
    assert np.ptp(tf.image.resize(stripes, (64, 64), "bicubic").numpy()) > 200  # what it would be without the filter
    for shrunk in (
        resize_bilinear(stripes, 64),
        resize_to_square(stripes, 64, "squash"),
        resize_to_square(stripes, 64, "crop"),
    ):
        assert np.ptp(shrunk.numpy()[:, 8:-8].astype(int)) < 32


def test_overshoot_is_clipped_not_wrapped() -> None:
    edge = np.zeros((40, 40, 3), np.uint8)
    edge[:, 20:] = 255
    square = resize_to_square(edge, 64, "squash").numpy()[:, :, 0].astype(int)
    assert (np.diff(square, axis=1) >= -3).all()


def test_preprocess_is_decode_then_fit_and_runs_in_a_graph(image: np.ndarray) -> None:
    file = encode(Image.fromarray(image))
    mapped = tf.data.Dataset.from_tensors((file, 6)).map(
        lambda f, o: preprocess(f, o, resolution=48, resize="letterbox")
    )
    assert mapped.element_spec == tf.TensorSpec((48, 48, 3), tf.uint8)
    np.testing.assert_array_equal(next(iter(mapped)), resize_to_square(np.rot90(image, -1), 48, "letterbox"))
