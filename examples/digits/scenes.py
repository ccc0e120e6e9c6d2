"""Scenes of handwritten digits.

Draws 64x64 pictures of 1-4 digits from scikit-learn's 8x8 handwriting with numpy, fast enough to train on the fly.
The test split holds the last 360 digits of the data set, unshuffled: neighbouring samples share a writer, so a shuffle
would leak handwriting. What one can ask about a scene is in questions.py; writing files is left to make_data.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

Float = npt.NDArray[np.float32]
Int = npt.NDArray[np.int64]
Double = npt.NDArray[np.float64]
Bool = npt.NDArray[np.bool_]
Pixels = npt.NDArray[np.uint8]
Rng = np.random.Generator
Box = tuple[int, int, int, int]
"""x0, y0, x1, y1 in pixels; right and bottom are exclusive."""

SPLITS = ("train", "calib", "test")
NUM_TEST_DIGITS = 360
NUM_DIGITS_SHARES = (0.20, 0.25, 0.25, 0.30)
"""Share of the scenes that hold 1, 2, 3 and 4 digits."""
BACKGROUND = 10
"""Patch class of a patch that no digit covers."""
MIN_SEPARATION_PX = 4
"""Two digits whose centres are closer than this in x (at 64 px) have no left and right."""

_LUMINANCE = np.array([0.299, 0.587, 0.114], dtype=np.float32)
_SOURCE_PX = 8
_UPSCALE = 3
_MARGIN = 2  # empty source pixels around a digit, so that sampling outside it finds no ink
_INK_ALPHA = 0.3  # what counts as ink for a tight box
_CANDIDATES = 24  # positions tried for a digit before its scene starts over
_PLACEMENT_ROUNDS = 10


@dataclass(frozen=True)
class Digits:
    """Handwritten digits: images [n, 8, 8] float32 in 0..1 (1 is ink), labels [n] int64 in 0..9."""

    images: Float
    labels: Int


@dataclass(frozen=True)
class Scene:
    """What is in one scene: digits and their tight ink boxes, left to right by box centre."""

    digits: tuple[int, ...]
    boxes: tuple[Box, ...]
    size_px: int


@dataclass(frozen=True)
class SceneBatch:
    """Rendered scenes; the slots of a scene run left to right and unused ones come last.

    pixels [batch, size, size, 3] uint8; digits [batch, slots] int64, -1 where unused;
    boxes [batch, slots, 4] int64 x0, y0, x1, y1 in pixels, 0 where unused; counts [batch] int64.
    """

    pixels: Pixels
    digits: Int
    boxes: Int
    counts: Int

    def scene(self, index: int) -> Scene:
        """The truth about one scene."""
        count = self.counts[index]
        boxes = tuple((x0, y0, x1, y1) for x0, y0, x1, y1 in self.boxes[index, :count].tolist())
        return Scene(tuple(self.digits[index, :count].tolist()), boxes, self.pixels.shape[1])


@dataclass(frozen=True)
class PatchTargets:
    """Dense supervision: classes [batch, patches] int64 (0..9, or BACKGROUND), row by row from the top left;
    boxes [batch, patches, 4] int64, the covering digit's box in pixels, 0 on background."""

    classes: Int
    boxes: Int


def load_digits(split: str, path: Path | None = None) -> Digits:
    """The digits of one split: "test" is the last 360 of the data set, "train" and "calib" are the 1437 before.

    `path` is a file by write_digits, for machines without scikit-learn. Raises ValueError on an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f'digit scenes: unknown split "{split}", expected one of {", ".join(SPLITS)}')
    images, labels = _load_all(path)
    part = slice(-NUM_TEST_DIGITS, None) if split == "test" else slice(None, -NUM_TEST_DIGITS)
    return Digits(images[part].astype(np.float32) / np.float32(16), labels[part].astype(np.int64))


def write_digits(path: Path) -> None:
    """Write scikit-learn's whole data set, in its own order, as an .npz file that load_digits reads."""
    images, labels = _load_all(None)
    np.savez_compressed(path, images=images.astype(np.uint8), labels=labels.astype(np.uint8))


def _load_all(path: Path | None) -> tuple[npt.NDArray[np.generic], npt.NDArray[np.generic]]:
    """Images [1797, 8, 8] in 0..16 and labels [1797], in the order of the data set."""
    if path is not None:
        with np.load(path) as stored:
            return stored["images"], stored["labels"]
    from sklearn import datasets  # a training machine may lack it

    bunch = datasets.load_digits()
    return bunch.images, bunch.target


Place = Callable[[Int, Bool, int, Rng], Int]
"""Finds corners for boxes: sizes [batch, slots, 2], used [batch, slots], image side, rng -> corners like sizes."""


class DigitScenes:
    """Draws scenes from the handwriting of one split.

    Every split has the same layouts, contrasts and clutter. Only "train" also varies the handwriting itself (pixel
    noise, rotation, shear, scale, elastic), drawn for each digit. Lengths scale with `size_px` (at least 32).
    """

    def __init__(self, split: str, size_px: int = 64, digits_path: Path | None = None) -> None:
        digits = load_digits(split, digits_path)
        self.size_px = size_px
        self._labels = digits.labels
        self._images = np.pad(digits.images, ((0, 0), (_MARGIN, _MARGIN), (_MARGIN, _MARGIN)))
        self._centres, self._half_extents = _ink_extents(digits.images)
        self._varies_handwriting = split == "train"

    def draw(self, count: int, rng: Rng) -> SceneBatch:
        """`count` scenes of 1-4 digits, none overlapping, that questions can be asked about."""
        counts = rng.choice(np.arange(1, 5), size=count, p=NUM_DIGITS_SHARES)
        used = np.arange(4) < counts[:, None]
        cells_px = rng.uniform(14, 30, used.sum()) * self.size_px / 64
        return self._draw(used, cells_px, self.size_px // 2, _place_freely, rng)

    def draw_dense(self, count: int, rng: Rng) -> SceneBatch:
        """`count` scenes of about 8 digits on a jittered 3x3 grid: much supervision per picture, for patch_targets."""
        used = np.arange(9) < rng.binomial(9, 8 / 9, count).clip(1)[:, None]
        cells_px = rng.uniform(14, 22, used.sum()) * self.size_px / 64
        return self._draw(used, cells_px, self.size_px // 3, _place_on_grid, rng)

    def _draw(
        self,
        used: Bool,
        cells_px: Double,
        window_px: int,
        place: Place,
        rng: Rng,
    ) -> SceneBatch:
        """Write the digits, place their ink, paint; used [batch, slots], cells_px [n] for the n used slots."""
        chosen: Int = rng.integers(len(self._labels), size=len(cells_px))
        alphas = self._write(chosen, cells_px, window_px, rng)
        inks = _ink_boxes(alphas)
        sizes = np.zeros((*used.shape, 2), dtype=np.int64)
        sizes[used] = inks[:, 2:] - inks[:, :2]
        corners = place(sizes, used, self.size_px, rng)
        ink = _Ink(alphas, inks, corners[used], np.nonzero(used)[0])
        pixels = _paint(ink, len(used), self.size_px, rng)
        digits = np.full(used.shape, -1, dtype=np.int64)
        digits[used] = self._labels[chosen]
        return _left_to_right(pixels, digits, np.concatenate([corners, corners + sizes], axis=2))

    def _write(self, chosen: Int, cells_px: Double, window_px: int, rng: Rng) -> Float:
        """Ink of the chosen digits [n, window, window] float32 in 0..1, each in the middle of a window of its own."""
        images = self._images[chosen]
        forward = _scene_transform(cells_px / _SOURCE_PX, rng)
        bend: Float | None = None
        if self._varies_handwriting:
            images = images + np.float32(0.06) * rng.standard_normal(images.shape, dtype=np.float32)
            forward = forward @ _hand_transform(len(chosen), rng)
            bend = rng.normal(0, 0.25, (2, len(chosen), 4, 4)).clip(-0.5, 0.5).astype(np.float32)
        extents_px = 2 * (np.abs(forward) @ self._half_extents[chosen, :, None]).max(axis=(1, 2))
        forward = forward * np.minimum(1, (window_px - 2) / extents_px)[:, None, None]
        ink = _sample(_upscaled(images), self._centres[chosen], np.linalg.inv(forward), bend, window_px)
        stretched: Float = np.clip((ink - 0.1) / 0.8, 0, 1)  # scans are grey: let strokes reach the full contrast
        return stretched


def patch_targets(batch: SceneBatch, patch_px: int = 8) -> PatchTargets:
    """For each patch the digit whose box covers most of it, if that is at least a quarter of the patch."""
    starts = np.arange(0, batch.pixels.shape[1], patch_px)
    low, high = batch.boxes[..., :2, None], batch.boxes[..., 2:, None]
    shared = (np.minimum(high, starts + patch_px) - np.maximum(low, starts)).clip(0)  # [batch, slots, 2, grid]
    areas = shared[:, :, 1, :, None] * shared[:, :, 0, None, :]  # [batch, slots, grid rows, grid columns]
    areas = areas.reshape(*areas.shape[:2], -1)
    best = areas.argmax(axis=1)  # [batch, patches]
    covered = areas.max(axis=1) >= patch_px**2 / 4
    classes = np.where(covered, np.take_along_axis(batch.digits, best, axis=1), BACKGROUND)
    boxes = np.take_along_axis(batch.boxes, best[..., None], axis=1) * covered[..., None]
    return PatchTargets(classes, boxes)


def _ink_extents(images: Float) -> tuple[Float, Float]:
    """Middle of each digit's ink, from the middle of its image, and half its width and height; both [n, 2] (x, y)."""
    boxes = _ink_boxes(images)
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2 - _SOURCE_PX / 2
    return centres.astype(np.float32), ((boxes[:, 2:] - boxes[:, :2]) / 2).astype(np.float32)


def _ink_boxes(alphas: Float) -> Int:
    """Tight boxes [n, 4] (x0, y0, x1, y1, exclusive right and bottom) of the ink in alphas [n, side, side]."""
    ink: Bool = np.asarray(alphas >= _INK_ALPHA)
    edges = []
    for axis in (1, 2):  # columns of ink, then rows
        filled: Bool = np.any(ink, axis=axis)
        edges.append((filled.argmax(axis=1), filled.shape[1] - filled[:, ::-1].argmax(axis=1)))
    (x0, x1), (y0, y1) = edges
    return np.stack([x0, y0, x1, y1], axis=1)


def _scene_transform(scale: Double, rng: Rng) -> Double:
    """Scale and up to 8 degrees of rotation, from source pixels to image pixels; scale [n] -> [n, 2, 2]."""
    return scale[:, None, None] * _rotations(rng.uniform(-8, 8, len(scale)))


def _hand_transform(count: int, rng: Rng) -> Double:
    """Another hand's slant and proportions: 9 degrees of rotation, shear 0.2, 15 % of scale; [n, 2, 2]."""
    slant = np.zeros((count, 2, 2))
    slant[:, 0, 0], slant[:, 1, 1] = rng.uniform(0.85, 1.15, (2, count))
    slant[:, 0, 1] = rng.uniform(-0.2, 0.2, count)
    return _rotations(rng.uniform(-9, 9, count)) @ slant


def _rotations(degrees: Double) -> Double:
    cosine, sine = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.stack([cosine, -sine, sine, cosine], axis=1).reshape(-1, 2, 2)


def _upscaled(images: Float) -> Float:
    """Images [n, side, side] enlarged `_UPSCALE` times by cubic interpolation, so that strokes have smooth edges."""
    side = images.shape[1]
    target = (np.arange(side * _UPSCALE) + 0.5) / _UPSCALE - 0.5
    away = np.abs(target[:, None] - np.arange(side))
    near = 1.5 * away**3 - 2.5 * away**2 + 1
    far = -0.5 * away**3 + 2.5 * away**2 - 4 * away + 2
    cubic = np.where(away < 1, near, np.where(away < 2, far, 0))  # Catmull-Rom [target, side]
    weights: Float = cubic.astype(np.float32)
    enlarged: Float = np.matmul(np.matmul(weights, images), weights.T)
    return enlarged


def _sample(sources: Float, centres: Float, inverse: Double, bend: Float | None, window_px: int) -> Float:
    """Bilinear samples [n, window, window] of enlarged digits, seen through an affine map and an elastic field.

    centres [n, 2] and the bend [2, n, 4, 4] (x, y shifts of a coarse grid) are in source pixels;
    inverse [n, 2, 2] leads from window pixels to source pixels.
    """
    across = (np.arange(window_px, dtype=np.float32) + 0.5 - window_px / 2).astype(np.float32)
    matrix = inverse.astype(np.float32)[..., None, None]
    positions: list[Float] = []
    for axis in (0, 1):
        at: Float = matrix[:, axis, 0] * across + matrix[:, axis, 1] * across[:, None] + centres[:, axis, None, None]
        if bend is not None:
            blend = _linear_blend(window_px, bend.shape[-1])
            at += blend @ bend[axis] @ blend.T
        at = (at + np.float32(_SOURCE_PX / 2 + _MARGIN)) * np.float32(_UPSCALE) - np.float32(0.5)
        positions.append(np.clip(at, 0, sources.shape[1] - 1.001))
    return _bilinear(sources, *positions)


def _linear_blend(target: int, source: int) -> Float:
    """Weights [target, source] that stretch a row of `source` values to `target` values, ends on ends."""
    at = np.linspace(0, source - 1, target)
    weights: Float = np.clip(1 - np.abs(at[:, None] - np.arange(source)), 0, 1).astype(np.float32)
    return weights


def _bilinear(sources: Float, x: Float, y: Float) -> Float:
    """Values of sources [n, side, side] at x, y [n, window, window], which lie in 0 .. side - 1.001."""
    side = sources.shape[1]
    column, row = x.astype(np.int32), y.astype(np.int32)
    right, down = x - column, y - row
    corner = row * side + column + (np.arange(len(sources), dtype=np.int32) * side**2)[:, None, None]
    flat = sources.ravel()
    upper = flat[corner] * (1 - right) + flat[corner + 1] * right
    lower = flat[corner + side] * (1 - right) + flat[corner + side + 1] * right
    mixed: Float = upper + (lower - upper) * down
    return mixed


def _place_freely(sizes: Int, used: Bool, size_px: int, rng: Rng) -> Int:
    """Top left corners [batch, slots, 2] (x, y) of boxes that keep a pixel apart, with centres clear in x.

    sizes [batch, slots, 2] are the boxes' widths and heights, at most half the side. A scene too crowded for chance
    to find a place falls back to one digit in each quarter, where left and right may be unclear.
    """
    corners = np.zeros_like(sizes)
    todo = np.arange(len(sizes))
    for _ in range(_PLACEMENT_ROUNDS):
        corners[todo], placed = _try_places(sizes[todo], used[todo], size_px, rng)
        todo = todo[~placed]
        if not len(todo):
            return corners
    corners[todo] = _place_on_grid(sizes[todo], used[todo], size_px, rng)
    return corners


def _try_places(sizes: Int, used: Bool, size_px: int, rng: Rng) -> tuple[Int, Bool]:
    """One attempt for each scene: corners [batch, slots, 2], and whether every used slot found a place [batch]."""
    batch, slots, _ = sizes.shape
    corners = np.zeros_like(sizes)
    placed = np.ones(batch, dtype=np.bool_)
    for slot in range(slots):
        room = (size_px - sizes[:, slot] + 1)[:, None]
        tries = (rng.random((batch, _CANDIDATES, 2)) * room).astype(np.int64)
        free = np.ones((batch, _CANDIDATES), dtype=np.bool_)
        for other in range(slot):
            clash = _clashes(tries, sizes[:, slot, None], corners[:, other, None], sizes[:, other, None], size_px)
            free &= ~clash | ~used[:, other, None]
        corners[:, slot] = tries[np.arange(batch), free.argmax(axis=1)]
        placed &= free.any(axis=1) | ~used[:, slot]
    return corners * used[..., None], placed


def _clashes(corners: Int, sizes: Int, other_corners: Int, other_sizes: Int, size_px: int) -> Bool:
    """Whether boxes touch, or their centres are too close in x to tell left from right; all arguments [..., 2]."""
    apart = (corners >= other_corners + other_sizes + 1) | (other_corners >= corners + sizes + 1)
    double_gap = 2 * (corners - other_corners) + sizes - other_sizes
    unclear: Bool = np.abs(double_gap[..., 0]) < 2 * MIN_SEPARATION_PX * size_px / 64
    return unclear | ~apart.any(axis=-1)


def _place_on_grid(sizes: Int, used: Bool, size_px: int, rng: Rng) -> Int:
    """Corners [batch, slots, 2] in the cells of the smallest square grid, each slot in a random cell and place."""
    batch, slots, _ = sizes.shape
    side = int(np.ceil(np.sqrt(slots)))
    cell_px = size_px // side
    cells = rng.permuted(np.tile(np.arange(side**2), (batch, 1)), axis=1)[:, :slots]
    origins = np.stack([cells % side, cells // side], axis=2) * cell_px
    jitter = (rng.random(sizes.shape) * (cell_px - sizes + 1)).astype(np.int64)
    corners: Int = (origins + jitter) * used[..., None]
    return corners


def _left_to_right(pixels: Pixels, digits: Int, boxes: Int) -> SceneBatch:
    """Sort the slots of each scene by box centre; unused slots go last."""
    used = digits >= 0
    middles = np.where(used, boxes[..., 0] + boxes[..., 2], np.iinfo(np.int64).max)
    order = middles.argsort(axis=1, kind="stable")
    boxes = np.take_along_axis(boxes, order[..., None], axis=1)
    return SceneBatch(pixels, np.take_along_axis(digits, order, axis=1), boxes, used.sum(axis=1))


@dataclass(frozen=True)
class _Looks:
    """Background and contrast of each scene; luminances in 0..1.

    base, contrast, noise [batch]; slope [batch, 2], the background's change from the middle to the right and bottom
    edge; ink_side [batch], +1 for light ink and -1 for dark.
    """

    base: Float
    slope: Float
    contrast: Float
    ink_side: Float
    noise: Float

    @staticmethod
    def draw(count: int, rng: Rng) -> "_Looks":
        """Ink that is 0.3 to 0.9 lighter or darker than the background wherever it stands on it."""
        contrast = rng.uniform(0.3, 0.9, count)
        swing = rng.random(count) * np.minimum(0.15, (1 - contrast) / 2)
        ink_side = rng.choice([-1.0, 1.0], count)
        base = np.where(ink_side > 0, 0, contrast) + swing + rng.random(count) * (1 - contrast - 2 * swing)
        angle = rng.uniform(0, 2 * np.pi, count)
        direction = np.stack([np.cos(angle), np.sin(angle)], axis=1)
        slope = direction * (swing / np.abs(direction).sum(axis=1))[:, None]
        fields = (base, slope, contrast, ink_side, rng.uniform(0, 0.05, count))
        return _Looks(*(field.astype(np.float32) for field in fields))


@dataclass(frozen=True)
class _Ink:
    """Written digits and their places: alphas [n, window, window] with their ink boxes [n, 4], and where the top left
    of the ink goes, corners [n, 2] (x, y) in scene number scenes [n]."""

    alphas: Float
    boxes: Int
    corners: Int
    scenes: Int


def _paint(ink: _Ink, count: int, size_px: int, rng: Rng) -> Pixels:
    """Pixels [count, size, size, 3]: background, strokes of clutter, then the digits, and noise over all."""
    looks = _Looks.draw(count, rng)
    images = _backgrounds(looks, size_px, rng)
    _add_clutter(images, looks, rng)
    middles = (ink.corners + (ink.boxes[:, 2:] - ink.boxes[:, :2]) / 2) / (size_px / 2) - 1
    levels = looks.base[ink.scenes] + (looks.slope[ink.scenes] * middles).sum(axis=1)
    levels = np.clip(levels + looks.ink_side[ink.scenes] * looks.contrast[ink.scenes], 0, 1).astype(np.float32)
    colours = levels[:, None] + _tints(np.minimum(levels, 1 - levels), rng)
    windows = (ink.corners - ink.boxes[:, :2]).tolist()
    for alpha, colour, scene, (x, y) in zip(ink.alphas, colours, ink.scenes, windows, strict=True):
        _blend(images[scene], alpha, colour, x, y)
    grain = rng.standard_normal((count, size_px, size_px), dtype=np.float32) * looks.noise[:, None, None]
    images += grain[..., None]
    images *= 255
    images += 0.5
    np.clip(images, 0, 255, out=images)
    return images.astype(np.uint8)


def _backgrounds(looks: _Looks, size_px: int, rng: Rng) -> Float:
    """Tinted gradients [batch, size, size, 3] float32 in 0..1."""
    across = np.linspace(-1, 1, size_px, dtype=np.float32)
    slopes = looks.slope[:, :, None] * across  # [batch, 2, size]
    levels = looks.base[:, None, None] + slopes[:, 0, None, :] + slopes[:, 1, :, None]
    room = np.minimum(looks.base, 1 - looks.base) - np.abs(looks.slope).sum(axis=1)
    images: Float = levels[..., None] + _tints(room, rng)[:, None, None, :]
    return images


def _tints(room: Float, rng: Rng) -> Float:
    """Random colour offsets [n, 3] of zero luminance that move no channel by more than room [n]."""
    tints = rng.uniform(-0.35, 0.35, (len(room), 3)).astype(np.float32)
    tints -= (tints @ _LUMINANCE)[:, None]
    largest = np.abs(tints).max(axis=1)
    tints *= (np.minimum(largest, room.clip(0)) / largest)[:, None]
    return tints


def _add_clutter(images: Float, looks: _Looks, rng: Rng) -> None:
    """Draw up to three thin straight strokes into each image, in place; fainter than the ink will be."""
    size_px = images.shape[1]
    scenes = np.repeat(np.arange(len(images)), rng.integers(0, 4, len(images)))
    alphas = _strokes(len(scenes), size_px, rng)
    strength = rng.uniform(0.25, 0.6, len(scenes)) * looks.ink_side[scenes] * looks.contrast[scenes]
    levels = (looks.base[scenes] + strength).astype(np.float32)
    colours = levels[:, None] + _tints(np.minimum(levels, 1 - levels), rng)
    for alpha, colour, scene in zip(alphas, colours, scenes, strict=True):
        _blend(images[scene], alpha, colour, 0, 0)


def _strokes(count: int, size_px: int, rng: Rng) -> Float:
    """Alpha [n, size, size] of line segments 1 to 2 px wide and 15 to 50 % of the side long."""
    start = rng.uniform(0, size_px, (2, count, 1, 1)).astype(np.float32)
    angle = rng.uniform(0, 2 * np.pi, (count, 1, 1)).astype(np.float32)
    length = rng.uniform(0.15, 0.5, (count, 1, 1)).astype(np.float32) * size_px
    half_width = rng.uniform(0.5, 1, (count, 1, 1)).astype(np.float32) * size_px / 64
    centres = np.arange(size_px, dtype=np.float32) + np.float32(0.5)
    x, y = centres - start[0], centres[:, None] - start[1]
    cosine, sine = np.cos(angle), np.sin(angle)
    along = x * cosine + y * sine
    beyond = along - np.clip(along, 0, length)
    aside = y * cosine - x * sine
    alphas: Float = np.clip(half_width + np.float32(0.5) - np.hypot(beyond, aside), 0, 1)
    return alphas


def _blend(image: Float, alpha: Float, colour: Float, x: int, y: int) -> None:
    """Lay colour [3] over image [size, size, 3] in place, where alpha [side, side], put at x, y, says; cut at edges."""
    height, width = image.shape[:2]
    top, left = max(0, -y), max(0, -x)
    alpha = alpha[top : height - y, left : width - x, None]
    region = image[y + top : y + top + alpha.shape[0], x + left : x + left + alpha.shape[1]]
    region += alpha * (colour - region)
