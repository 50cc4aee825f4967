"""Near-duplicate pictures found and kept together, and the splits that the data do not bring along.

Two pictures are near-duplicates when two independent signatures agree: their perceptual hashes (the pattern of coarse
light and dark) and small colour thumbnails of them. Pictures too small or too flat for a perceptual hash are compared
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

SMALLEST_SIDE = 32  # pixels; below, a perceptual hash says too little
FLATTEST = 4.0  # standard deviation of the thumbnail, in grey levels of 255; below, the hash is noise
# Measured on 1,360 photos of flowers: of the 72 pairs up to a distance of 14 and from a correlation of 0.94, all show
# one photograph (66 at distance 0; the farthest are crops); the next are at 20. 69 lie within the bounds below.
HASH_DISTANCE = 4  # of 64 bits
THUMBNAIL_CORRELATION = 0.96
PIECES = np.array_split(
    np.arange(64, dtype=np.uint64), HASH_DISTANCE + 2
)  # two hashes within the distance agree in two of them at least
MASKS = [np.bitwise_or.reduce(np.uint64(1) << np.concatenate(two)) for two in combinations(PIECES, 2)]
NEIGHBOURS = (
    100  # compared with each picture under one mask, at most; of a million hashes like those of photos, 18 agreed
)
THUMBNAIL = 8  # pixels a side
MAX_EDGES = 4_000_000  # held at once


@dataclass(frozen=True)
class Signature:
    """What near-duplicates are found by."""

    phash: int
    """Perceptual hash, 64 bits."""
    thumbnail: np.ndarray
    """uint8 (8, 8, 3)."""
    pixels: int
    """64 bits of a digest of the picture's size and pixels; of those shrunk to 32x32 where `perceptual` holds."""
    perceptual: bool
    """Whether the picture is large and varied enough for the first two."""


def signature(picture: np.ndarray, orientation: int) -> Signature:
    """The signature of a decoded picture.

    Args:
        picture: uint8 (H, W, 3), RGB as stored.
        orientation: How to turn it for the eye, EXIF 1 to 8.
    """
    image = Image.fromarray(picture)
    if min(image.size) < SMALLEST_SIDE:
        return Signature(0, np.zeros((THUMBNAIL, THUMBNAIL, 3), np.uint8), _digest(picture, picture), False)
    # Bilinear and not box sampling, which takes whole pixels: one photo at half its size then moves 0.2 of its bits and
    # not 1.4.
    image = image.resize((32, 32), Image.Resampling.BILINEAR, reducing_gap=3.0)
    if orientation in TURNS:
        image = image.transpose(TURNS[orientation])
    small = np.asarray(image)
    thumbnail = np.asarray(image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX))
    varied = bool((thumbnail - thumbnail.mean((0, 1))).std() >= FLATTEST)
    return Signature(
        int(str(imagehash.phash(image)), 16), thumbnail, _digest(picture, small if varied else picture), varied
    )


def _digest(picture: np.ndarray, pixels: np.ndarray) -> int:
    return int.from_bytes(hashlib.blake2b(pixels.tobytes(), digest_size=8, key=repr(picture.shape).encode()).digest())


TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def near_duplicates(phash: np.ndarray, thumbnail: np.ndarray, pixels: np.ndarray, perceptual: np.ndarray) -> np.ndarray:
    """Group of pictures that are near-duplicates of each other, directly or through others.

    Time and memory grow with the number of pictures, not of pairs: only pictures whose hashes agree under a mask are
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
        for step in range(1, NEIGHBOURS + 1):
            left = left[left + step < len(order)]
            left = left[value[left] == value[left + step]]
            if not len(left):
                break
            a, b = order[left], order[left + step]
            differing = phash[a] ^ phash[b]
            close = (np.bitwise_count(differing) <= HASH_DISTANCE) & (
                (differing != 0) | (mask == MASKS[0])
            )  # equal ones meet under each
            a, b = a[close], b[close]
            edges.append(np.stack([a, b])[:, _alike(thumbnail, a, b)])
            held += edges[-1].shape[1]
            if held > MAX_EDGES:
                group = _components(edges, n)
                edges, held = [np.stack([np.arange(n), np.unique(group, return_index=True)[1][group]])], 0
    return _components(edges, n)


def _alike(thumbnail: np.ndarray, a: np.ndarray, b: np.ndarray, chunk: int = 1024) -> np.ndarray:
    """bool (pairs,): whether the thumbnails, each colour channel's mean taken away, correlate."""
    chunks = [slice(i, i + chunk) for i in range(0, len(a), chunk)]  # small enough for a processor's cache
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
    """The split of every sample.

    Splits that the data bring are kept. All three are made where the data bring none or only train; where they bring
    train and test, val is taken out of train. Making splits goes class by class. Groups are whole; they are put in an
    order drawn from the seed and the pictures' contents, and cut at the shares. So each split's part is within one
    group of exact, a few files more or less move few others, and names play no part. A class of three groups or more is
    in every split that is made; of two, in train and test (or val, where only that is made); of one, in train.

    Args:
        label: int (N,).
        group: int64 (N,). A group with several labels goes with the least of them.
        content: Digest of each sample's file.
        given: train, val or test for all samples, or None for all.
        shares: Of the splits to be made.
        seed: Of the order.

    Returns:
        str (N,): train, val or test.
    """
    brought = {split for split in given if split is not None}
    names: tuple[str, ...]
    parts: tuple[float, ...]
    if brought <= {"train"}:
        names, parts = ("train", "test", "val"), (shares.train, shares.test, shares.val)
        rows = np.arange(len(label))
    elif brought == {"train", "test"}:
        names, parts = ("train", "val"), (shares.train, shares.val)
        rows = np.flatnonzero([split == "train" for split in given])
    else:
        return np.array(given, dtype=str)

    split = np.array([name or "train" for name in given], dtype="U5")
    lots = (int.from_bytes(hashlib.sha256(f"{seed}:{text}".encode()).digest()[:8]) for text in content)
    lot = np.fromiter(lots, np.uint64, len(label))[rows]
    order = np.lexsort((label[rows], group[rows]))
    rows, lot = rows[order], lot[order]
    _, start, size = np.unique(group[rows], return_index=True, return_counts=True)
    group_label = label[rows][start]
    group_lot = np.minimum.reduceat(lot, start)
    group_split = np.empty(len(start), dtype="U5")
    for one in np.unique(group_label):
        members = np.flatnonzero(group_label == one)
        members = members[np.argsort(group_lot[members], kind="stable")]
        group_split[members] = np.repeat(names, np.diff([0, *_cuts(size[members], parts), len(members)]))
    split[rows] = np.repeat(group_split, size)
    return split


def _cuts(sizes: np.ndarray, parts: tuple[float, ...]) -> list[int]:
    """Where to cut a row of groups so that the parts get their shares.

    And none is empty as long as there are groups.
    """
    middles = np.cumsum(sizes) - sizes / 2
    ends = np.cumsum(parts)[:-1] / sum(parts) * sizes.sum()
    cuts = [int(cut) for cut in np.searchsorted(middles, ends)]
    for i in range(len(cuts)):
        low = min(cuts[i - 1] + 1 if i else 1, len(sizes))
        cuts[i] = int(np.clip(cuts[i], low, max(low, len(sizes) - (len(cuts) - i))))
    return cuts
