"""Near-duplicate detection, and splits for data that do not bring their own.

Two images are near-duplicates when two independent signatures agree: their perceptual hashes (the pattern of coarse
light and dark) and small color thumbnails of them. Images too small or too flat for a perceptual hash are compared
by their pixels.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import imagehash
import numpy as np
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from pipeline.config.data import SplitsConfig

MIN_SIDE = 32  # pixels; below, a perceptual hash says too little
MIN_CONTRAST = 4.0  # standard deviation of the thumbnail, in gray levels of 255; below, the hash is noise
# Measured on 1,360 photos of flowers: of the 72 pairs up to a distance of 14 and from a correlation of 0.94, all show
# one photograph (66 at distance 0; the farthest are crops); the next are at 20. 69 lie within the bounds below.
HASH_DISTANCE = 4  # of 64 bits
THUMBNAIL_CORRELATION = 0.96
# Two hashes within the distance agree in two of these pieces at least.
HASH_PIECES = np.array_split(np.arange(64, dtype=np.uint64), HASH_DISTANCE + 2)
MASKS = [np.bitwise_or.reduce(np.uint64(1) << np.concatenate(two)) for two in combinations(HASH_PIECES, 2)]
# Compared with each image under one mask, at most; of a million hashes like those of photos, 18 agreed.
MAX_NEIGHBORS = 100
THUMBNAIL = 8  # pixels a side
MAX_EDGES = 4_000_000  # held at once
CHUNK_PAIRS = 1024  # whose thumbnails are compared at once; small enough for a processor's cache


@dataclass(frozen=True)
class Signature:
    """The signature by which near-duplicates are found."""

    phash: int
    """Perceptual hash, 64 bits."""
    thumbnail: np.ndarray
    """uint8 (8, 8, 3)."""
    pixels: int
    """64 bits of a digest of the image's size and pixels; of those shrunk to 32x32 where `perceptual` holds."""
    perceptual: bool
    """Whether the image is large and varied enough for the first two."""


def signature(image: np.ndarray, orientation: int) -> Signature:
    """Return the signature of a decoded image.

    Args:
        image: uint8 (H, W, 3), RGB as stored.
        orientation: EXIF orientation, 1 to 8.
    """
    resized = Image.fromarray(image)
    if min(resized.size) < MIN_SIDE:
        return Signature(0, np.zeros((THUMBNAIL, THUMBNAIL, 3), np.uint8), _digest(image, image), False)
    # Bilinear and not box sampling, which takes whole pixels: one photo at half its size then moves 0.2 of its bits and
    # not 1.4.
    resized = resized.resize((32, 32), Image.Resampling.BILINEAR, reducing_gap=3.0)
    if orientation in EXIF_TRANSPOSES:
        resized = resized.transpose(EXIF_TRANSPOSES[orientation])
    small = np.asarray(resized)
    thumbnail = np.asarray(resized.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX))
    varied = bool((thumbnail - thumbnail.mean((0, 1))).std() >= MIN_CONTRAST)
    return Signature(
        int(str(imagehash.phash(resized)), 16), thumbnail, _digest(image, small if varied else image), varied
    )


def _digest(image: np.ndarray, pixels: np.ndarray) -> int:
    return int.from_bytes(hashlib.blake2b(pixels.tobytes(), digest_size=8, key=repr(image.shape).encode()).digest())


EXIF_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def near_duplicates(phash: np.ndarray, thumbnail: np.ndarray, pixels: np.ndarray, perceptual: np.ndarray) -> np.ndarray:
    """Group images that are near-duplicates of each other, directly or through others.

    Time and memory grow with the number of images, not of pairs: only images whose hashes agree under a mask are
    compared, in rounds of the next, next but one, ... in the order of the hashes.

    Args:
        phash: uint64 (N,).
        thumbnail: uint8 (N, 8, 8, 3).
        pixels: uint64 (N,).
        perceptual: bool (N,).

    Returns:
        int64 (N,), the same number for the members of a group, from 0, in the order of the first members.
    """
    n, phash = len(pixels), np.ascontiguousarray(phash)  # it may be a column of records
    _, first, same = np.unique(pixels, return_index=True, return_inverse=True)
    edges, held = [np.stack([np.arange(n), first[same]])], 0
    candidates = first[perceptual[first]]
    for mask in MASKS:
        value = phash[candidates] & mask
        order = candidates[np.lexsort((phash[candidates], value))]
        value = np.sort(value)
        left = np.arange(len(order))
        for step in range(1, MAX_NEIGHBORS + 1):
            left = left[left + step < len(order)]
            left = left[value[left] == value[left + step]]
            if not len(left):
                break
            a, b = order[left], order[left + step]
            differing = phash[a] ^ phash[b]
            first_meeting = (differing != 0) | (mask == MASKS[0])  # equal hashes meet under each mask
            close = (np.bitwise_count(differing) <= HASH_DISTANCE) & first_meeting
            a, b = a[close], b[close]
            edges.append(np.stack([a, b])[:, _alike(thumbnail, a, b)])
            held += edges[-1].shape[1]
            if held > MAX_EDGES:
                group = _components(edges, n)
                edges, held = [np.stack([np.arange(n), np.unique(group, return_index=True)[1][group]])], 0
    return _components(edges, n)


def _alike(thumbnail: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return bool (pairs,): whether the thumbnails correlate after each color channel's mean is subtracted."""
    chunks = [slice(i, i + CHUNK_PAIRS) for i in range(0, len(a), CHUNK_PAIRS)]
    return np.concatenate(
        [np.zeros(0, bool), *(_correlation(thumbnail[a[c]], thumbnail[b[c]]) >= THUMBNAIL_CORRELATION for c in chunks)]
    )


def _correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    planes = (np.moveaxis(t, -1, 1).reshape(len(t), 3, -1).astype(np.float32) for t in (a, b))
    x, y = ((t - t.mean(2, keepdims=True)).reshape(len(t), -1) for t in planes)
    return np.einsum("np,np->n", x, y) / np.sqrt(np.einsum("np,np->n", x, x) * np.einsum("np,np->n", y, y))


def _components(edges: list[np.ndarray], n: int) -> np.ndarray:
    a, b = np.concatenate(edges, axis=1)
    _, group = connected_components(coo_array((np.ones(len(a), bool), (a, b)), shape=(n, n)), directed=False)
    _, first, number = np.unique(group, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[number].astype(np.int64)


def assign_splits(
    label: np.ndarray,
    group: np.ndarray,
    content: Iterable[str],
    given: Sequence[str | None],
    shares: SplitsConfig,
    *,
    seed: int,
) -> np.ndarray:
    """Assign every image to a split.

    Splits that the data bring are used unchanged. All three are made where the data bring none or only train; where
    they bring train and test, val is taken out of train. Splits are made class by class. Groups are not divided; they
    are put in an order drawn from the seed and the images' contents, and cut at the shares. Each split's size differs
    from its fraction by at most one group; adding files moves few others; names play no part. A class of three groups
    or more is in every split that is made; of two, in train and test (or val, where only that is made); of one, in
    train.

    Args:
        label: int (N,).
        group: int64 (N,). A group with several labels counts as the smallest of them.
        content: Digest of each image's file.
        given: train, val or test for all images, or None for all.
        shares: Shares of the splits to be made.
        seed: Seed of the order.

    Returns:
        str (N,): train, val or test.
    """
    given_splits = {split for split in given if split is not None}
    names: tuple[str, ...]
    parts: tuple[float, ...]
    if given_splits <= {"train"}:
        names, parts = ("train", "test", "val"), (shares.train, shares.test, shares.val)
        rows = np.arange(len(label))
    elif given_splits == {"train", "test"}:
        names, parts = ("train", "val"), (shares.train, shares.val)
        rows = np.flatnonzero([split == "train" for split in given])
    else:
        return np.array(given, dtype=str)

    split = np.array([name or "train" for name in given], dtype="U5")
    draws = (int.from_bytes(hashlib.sha256(f"{seed}:{text}".encode()).digest()[:8]) for text in content)
    draw = np.fromiter(draws, np.uint64, len(label))[rows]
    order = np.lexsort((label[rows], group[rows]))
    rows, draw = rows[order], draw[order]
    _, start, size = np.unique(group[rows], return_index=True, return_counts=True)
    group_label = label[rows][start]
    group_draw = np.minimum.reduceat(draw, start)
    group_split = np.empty(len(start), dtype="U5")
    for class_label in np.unique(group_label):
        members = np.flatnonzero(group_label == class_label)
        members = members[np.argsort(group_draw[members], kind="stable")]
        group_split[members] = np.repeat(names, np.diff([0, *_cuts(size[members], parts), len(members)]))
    split[rows] = np.repeat(group_split, size)
    return split


def _cuts(sizes: np.ndarray, parts: tuple[float, ...]) -> list[int]:
    """Return where to cut a sequence of groups so that the parts get their shares.

    No part is empty as long as there are enough groups.
    """
    middles = np.cumsum(sizes) - sizes / 2
    ends = np.cumsum(parts)[:-1] / sum(parts) * sizes.sum()
    cuts = [int(cut) for cut in np.searchsorted(middles, ends)]
    for i in range(len(cuts)):
        low = min(cuts[i - 1] + 1 if i else 1, len(sizes))
        cuts[i] = int(np.clip(cuts[i], low, max(low, len(sizes) - (len(cuts) - i))))
    return cuts
