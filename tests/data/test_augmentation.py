"""One image's augmentation: windows, flips, EXIF, albumentations' sizes, refusals and draws."""

import io
import random
from typing import Any

import albumentations
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from pipeline.config.augment import TransformConfig
from pipeline.config.schema import Config
from pipeline.data.augmentation import (
    AlbumentationsTransforms,
    Augmentation,
    decode_window,
    image_augmentation,
    random_window,
    sized_arguments,
)
from pipeline.errors import ConfigError

SIDE = 48
CROP: dict[str, Any] = {"RandomResizedCrop": {"scale": [0.08, 1.0]}}
FLIP: dict[str, Any] = {"HorizontalFlip": {"p": 0.5}}


def config(backend: str, transforms: list[Any], resolution: int = SIDE, resize: str = "crop") -> Config:
    return Config.model_validate(
        {
            "model": {"variant": "b0", "weights": None, "resolution": resolution},
            "data": {"source": "digits", "resize": resize},
            "augment": {"backend": backend, "transforms": transforms},
        }
    )


def encode(original: np.ndarray, kind: str = "PNG", orientation: int = 1) -> bytes:
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(original).save(
        file, kind, exif=exif, **({"quality": 95, "subsampling": 0} if kind == "JPEG" else {})
    )
    return file.getvalue()


def smooth(height: int, width: int, seed: int = 0) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def seeded(number: int) -> tf.Tensor:
    return tf.constant([5, number], tf.int64)


def build_augmentation(settings: Config) -> Augmentation:
    return image_augmentation(settings.augment, settings.variant.resolution, settings.data.resize)


def run(settings: Config, file: bytes, seed: int = 0, orientation: int = 1) -> np.ndarray:
    width, height = Image.open(io.BytesIO(file)).size
    augment = build_augmentation(settings)
    return augment(
        tf.constant(file), tf.constant(height), tf.constant(width), tf.constant(orientation), seeded(seed)
    ).numpy()


@tf.function
def windows(count: tf.Tensor, height: int, width: int, scale: tf.Tensor, ratio: tuple[float, float]) -> tf.Tensor:
    def one(number: tf.Tensor) -> tf.Tensor:
        return random_window(
            tf.stack([height, width]), scale, ratio, tf.random.stateless_uniform((4, 10), tf.stack([9, number]))
        )

    return tf.map_fn(one, tf.range(count), fn_output_signature=tf.int32)


# --- the random window
# ---------------------------------------------------------------------------------------------------------------


def test_windows_have_uniform_areas_log_uniform_aspects_and_uniform_places() -> None:
    found = (
        windows(tf.constant(4000), tf.constant(1000), tf.constant(1000), (0.08, 0.5), (3 / 4, 4 / 3))
        .numpy()
        .astype(float)
    )
    top, left, height, width = found.T
    share, aspect = height * width / 1e6, np.log(width / height) / np.log(4 / 3)
    assert (share.min(), share.max()) == (pytest.approx(0.08, abs=0.002), pytest.approx(0.5, abs=0.002))
    assert (share.mean(), share.std()) == (pytest.approx(0.29, abs=0.006), pytest.approx(0.42 / 12**0.5, rel=0.04))
    assert (aspect.min(), aspect.max()) == (pytest.approx(-1, abs=0.02), pytest.approx(1, abs=0.02))
    assert (aspect.mean(), aspect.std()) == (pytest.approx(0, abs=0.03), pytest.approx(1 / 3**0.5, rel=0.04))
    for place, length in ((top, height), (left, width)):
        position = place / (1000 - length)
        np.testing.assert_allclose(np.histogram(position, 10, (0, 1))[0] / 4000, 0.1, atol=0.02)
    assert (
        abs(np.corrcoef([top / (1000 - height), left / (1000 - width), share, aspect])[np.triu_indices(4, 1)]).max()
        < 0.06
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(0, 2**31 - 1))
def test_every_window_lies_inside_the_image(height: int, width: int, seed: int) -> None:
    draws = tf.random.stateless_uniform((4, 10), (seed, 1))
    top, left, inner_height, inner_width = random_window(
        tf.constant([height, width]), (0.08, 1.0), (3 / 4, 4 / 3), draws
    ).numpy()
    assert top >= 0
    assert left >= 0
    assert inner_height >= 1
    assert inner_width >= 1
    assert top + inner_height <= height
    assert left + inner_width <= width


def test_a_panorama_that_no_window_fits_gives_its_center() -> None:
    draws = tf.random.stateless_uniform((4, 10), (1, 1))
    window = random_window(tf.constant([100, 2000]), (0.9, 1.0), (3 / 4, 4 / 3), draws)
    np.testing.assert_array_equal(window, [0, (2000 - 133) // 2, 100, 133])


# --- native -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_decoded_window_is_that_of_the_upright_image(kind: str, orientation: int) -> None:
    file = encode(smooth(90, 120), kind, orientation)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(file)))).astype(int)
    found = decode_window(
        tf.constant(file), tf.constant([7, 12, 60, 31]), tf.constant(upright.shape[:2]), tf.constant(orientation), 64
    )
    np.testing.assert_array_equal(found, upright[7:67, 12:43])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("backend", ["native", "albumentations"])
def test_both_backends_turn_images_upright(backend: str, orientation: int) -> None:
    file = encode(smooth(90, 120), "JPEG", orientation)
    upright = encode(np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(file)))))
    same = config(backend, [CROP, FLIP])
    difference = run(same, file, 3, orientation).astype(int) - run(same, upright, 3)
    assert np.abs(difference).max() <= 1


def test_large_windows_of_a_jpeg_decode_smaller_and_look_the_same() -> None:
    original = smooth(700, 900)
    for top, height in ((0, 200), (13, 450), (3, 650)):
        window, upright = tf.constant([top, 21, height, height + 30]), tf.constant([700, 900])
        fine = decode_window(tf.constant(encode(original)), window, upright, tf.constant(1), 64)
        coarse = decode_window(tf.constant(encode(original, "JPEG")), window, upright, tf.constant(1), 64)
        ratio = {200: 2, 450: 4, 650: 8}[height]
        assert coarse.shape == (height // ratio, (height + 30) // ratio, 3)
        means = [tf.image.resize(image, (16, 16), antialias=True) for image in (fine, coarse)]
        assert np.abs(means[0] - means[1]).mean() < 4


def detailed(side: int) -> np.ndarray:
    """Detail in every size, the finer the fainter, as photographs have it."""
    rng, original = np.random.default_rng(0), np.full((side, side, 3), 128.0)
    for grain in (2, 4, 8, 16, 32, 64):
        noise = Image.fromarray(rng.integers(0, 256, (side // grain, side // grain, 3), np.uint8)).resize(
            (side, side), Image.Resampling.BICUBIC
        )
        original += (np.asarray(noise) - 128.0) * grain / 64
    return original.clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("ratio", [2, 4, 8])
def test_a_window_that_is_decoded_smaller_is_the_mean_of_its_blocks_of_pixels(ratio: int) -> None:
    file = io.BytesIO()
    Image.fromarray(detailed(768)).save(file, "JPEG", quality=90)  # with half the colors' resolution, as cameras do
    arguments = tf.constant(file.getvalue()), tf.constant([64, 128, 512, 576]), tf.constant([768, 768]), tf.constant(1)
    small = decode_window(*arguments, 512 // ratio).numpy()
    blocks = decode_window(*arguments, 512).numpy().reshape(512 // ratio, ratio, 576 // ratio, ratio, 3).mean((1, 3))
    assert blocks.std() > 20
    assert np.abs(small - blocks).mean() < 1


def test_a_crop_of_the_whole_image_is_the_image() -> None:
    original = smooth(SIDE, SIDE)
    everything = {"RandomResizedCrop": {"scale": [1.0, 1.0], "ratio": [1.0, 1.0]}}
    np.testing.assert_array_equal(run(config("native", [everything]), encode(original)), original)


def test_without_transforms_training_sees_what_evaluation_sees() -> None:
    from pipeline.data.preprocessing import preprocess

    file = encode(smooth(90, 120), "JPEG")
    for resize in ("crop", "squash", "letterbox"):
        expected = preprocess(tf.constant(file), tf.constant(1), resolution=SIDE, resize=resize)
        for backend in ("native", "albumentations"):
            np.testing.assert_array_equal(run(config(backend, [], resize=resize), file), expected)


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_flips_come_as_often_as_p_says(p: float) -> None:
    original = smooth(SIDE, SIDE)
    augment = tf.function(build_augmentation(config("native", [{"HorizontalFlip": {"p": p}}], resize="squash")))
    arguments = tf.constant(encode(original)), tf.constant(SIDE), tf.constant(SIDE), tf.constant(1)
    results = [augment(*arguments, seeded(number)).numpy() for number in range(400)]
    flipped = [np.array_equal(image, original[:, ::-1]) for image in results]
    assert all(np.array_equal(image, original) != was for image, was in zip(results, flipped, strict=True))
    assert np.mean(flipped) == pytest.approx(p, abs=0.07 if 0 < p < 1 else 0)


def test_the_flip_does_not_follow_the_crop() -> None:
    marker = np.zeros((64, 64, 3), np.uint8)
    marker[:, :, 0] = np.arange(64) * 4
    marker[:, :, 1] = np.arange(64)[:, None] * 4
    augment = tf.function(build_augmentation(config("native", [CROP, FLIP])))
    arguments = tf.constant(encode(marker)), tf.constant(64), tf.constant(64), tf.constant(1)
    images = np.stack([augment(*arguments, seeded(number)).numpy() for number in range(400)]).astype(float)
    flipped = images[:, :, 0, 0].mean(1) > images[:, :, -1, 0].mean(1)
    facts = np.stack(
        [flipped, images[..., 0].mean((1, 2)), images[..., 1].mean((1, 2)), np.ptp(images[..., 0], axis=(1, 2))]
    )
    assert np.abs(np.corrcoef(facts)[0, 1:]).max() < 0.17


def test_a_transform_given_twice_is_refused_by_the_native_backend() -> None:
    with pytest.raises(ConfigError, match="once"):
        build_augmentation(config("native", [FLIP, FLIP]))


# --- albumentations
# ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("transform", "expected"),
    [
        ("RandomResizedCrop", {"size": (200, 200)}),
        ({"RandomResizedCrop": {"size": [0.5, 1.0], "scale": [0.5, 1.0]}}, {"size": (100, 200), "scale": (0.5, 1.0)}),
        ({"RandomCrop": {"height": 0.8, "width": 150}}, {"height": 160, "width": 150}),
        ("PadIfNeeded", {"min_height": 200, "min_width": 200}),
        (
            {"PadIfNeeded": {"min_height": None, "pad_height_divisor": 32}},
            {"min_height": None, "pad_height_divisor": 32, "min_width": 200},
        ),
        ("SmallestMaxSize", {"max_size": 200}),
        ({"SmallestMaxSize": {"max_size": 1.14}}, {"max_size": 228}),
        ({"CropAndPad": {"px": [-0.1, 0.05]}}, {"px": (-20, 10)}),
        ({"RandomSizedCrop": {"min_max_height": [0.5, 1.0]}}, {"min_max_height": (100, 200), "size": (200, 200)}),
        ({"CoarseDropout": {"hole_height_range": [0.1, 0.2]}}, {"hole_height_range": (0.1, 0.2)}),
        ({"Resize": {"height": 0.001}}, {"height": 1, "width": 200}),
    ],
)
def test_sizes_are_fractions_of_the_resolution(transform: Any, expected: dict[str, Any]) -> None:
    assert sized_arguments(TransformConfig.model_validate(transform), 200) == expected


@pytest.mark.parametrize(
    "transforms",
    [
        [CROP, FLIP],
        [FLIP, "ShiftScaleRotate"],
        [{"SmallestMaxSize": {"max_size": 1.2}}, "RandomCrop"],
        ["LongestMaxSize", "PadIfNeeded"],
        ["Resize", {"GaussNoise": {"p": 1.0}}],
        [{"RandomSizedCrop": {"min_max_height": [0.5, 1.0]}}],
        [{"CoarseDropout": {"p": 1.0}}, {"ColorJitter": {"p": 1.0}}],
    ],
    ids=str,
)
def test_rows_of_transforms_end_in_the_resolution(transforms: list[Any]) -> None:
    image = run(config("albumentations", transforms), encode(smooth(90, 130), "JPEG"))
    assert (image.shape, image.dtype) == ((SIDE, SIDE, 3), np.uint8)


@pytest.mark.parametrize(
    ("transforms", "message"),
    [
        (["Normalize"], "Normalize is refused: normalization is inside the model"),
        (["ToFloat"], "ToFloat is refused"),
        ([{"RandomResizedCrop": {"scale": [0.5, 2.0]}}], "RandomResizedCrop does not accept.*scale"),
        ([{"HorizontalFlip": {"p": 3}}], "HorizontalFlip does not accept"),
        (["SmallestMaxSize"], "SmallestMaxSize turn a uint8 image of 97 x 151 x 3 into uint8 of 48 x 75 x 3"),
        ([{"RandomResizedCrop": {"size": [0.5, 0.5]}}], "RandomResizedCrop turn .* into uint8 of 24 x 24 x 3"),
        ([{"RandomScale": {"p": 1.0}}], "RandomScale turn"),
    ],
)
def test_what_cannot_work_is_refused_when_the_stream_is_built(transforms: list[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"augment.transforms: {message}"):
        build_augmentation(config("albumentations", transforms))


def usable() -> list[str]:
    """Every transform of albumentations that works with no arguments, in this program."""
    names = []
    for name, kind in sorted(vars(albumentations).items()):
        if isinstance(kind, type) and issubclass(kind, albumentations.BasicTransform) and hasattr(kind, "InitSchema"):
            try:
                args = {"p": 1.0} if "p" in kind.InitSchema.model_fields else {}
                AlbumentationsTransforms((TransformConfig(name=name, args=args),), SIDE).validate_on_dummy_images(False)
            except (ConfigError, NotImplementedError):
                continue
            names.append(name)
    return names


@pytest.mark.filterwarnings("ignore")
def test_every_transform_is_a_function_of_its_seed() -> None:
    names = usable()
    assert len(names) > 60
    original, other = smooth(SIDE, SIDE), smooth(SIDE, SIDE, 1)
    for name in names:
        apply = AlbumentationsTransforms((TransformConfig(name=name, args={"p": 1.0}),), SIDE)
        before = apply(original, 11)
        apply(other, 12)
        np.random.seed(0)  # a transform that used the global generators would show here
        random.seed(0)
        again = AlbumentationsTransforms((TransformConfig(name=name, args={"p": 1.0}),), SIDE)
        again(other, 13)
        np.testing.assert_array_equal(apply(original, 11), before, name)
        np.testing.assert_array_equal(again(original, 11), before, name)


def test_transforms_are_built_once_for_a_thread_not_for_a_image(monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    real = AlbumentationsTransforms._build
    monkeypatch.setattr(AlbumentationsTransforms, "_build", lambda self: built.append(1) or real(self))
    apply = AlbumentationsTransforms([TransformConfig(name="HorizontalFlip", args={})], 8)
    images = tf.data.Dataset.from_tensors(tf.zeros((8, 8, 3), tf.uint8)).repeat(300).enumerate()
    options = tf.data.Options()
    options.threading.private_threadpool_size = 2
    flipped = images.map(lambda i, x: tf.numpy_function(apply, (x, i), tf.uint8), num_parallel_calls=2).with_options(
        options
    )
    assert sum(1 for _ in flipped) == 300
    assert 1 <= len(built) <= 3


def test_transforms_of_one_p_do_not_coincide() -> None:
    apply = AlbumentationsTransforms(
        tuple(TransformConfig(name=name, args={"p": 0.5}) for name in ("HorizontalFlip", "VerticalFlip")), SIDE
    )
    original = smooth(SIDE, SIDE)
    outcomes = {apply(original, seed).tobytes() for seed in range(40)}
    assert len(outcomes) == 4


@pytest.mark.parametrize("backend", ["native", "albumentations"])
def test_pixels_do_not_depend_on_the_number_of_threads(backend: str) -> None:
    rows = (
        [CROP, FLIP]
        if backend == "native"
        else [CROP, FLIP, {"GaussNoise": {"p": 1.0}}, {"ElasticTransform": {"p": 0.5}}]
    )
    augment = build_augmentation(config(backend, rows))
    files = [encode(smooth(60 + 7 * n, 110, n), "JPEG") for n in range(4)]
    sizes = [Image.open(io.BytesIO(file)).size for file in files]

    def load(number: tf.Tensor) -> tf.Tensor:
        which = number % 4
        width, height = tf.unstack(tf.gather(sizes, which))
        return augment(
            tf.gather(files, which), height, width, tf.constant(1), tf.stack([tf.constant(1, tf.int64), number])
        )

    runs = [np.stack(list(tf.data.Dataset.range(48).map(load, n).as_numpy_iterator())) for n in (1, 2, 4)]
    np.testing.assert_array_equal(runs[0], runs[1])
    np.testing.assert_array_equal(runs[0], runs[2])
    assert len({image.tobytes() for image in runs[0]}) == 48
