"""A generated image domain: patterns, colours and shapes composed into 48 classes.

Two styles show the same classes. `general` is what the two small CLIP models were trained on: a
nearly upright object on a plain background. `domain` is what the student is adapted to: the same
things under water, that is with every hue turned towards the next one, in dim greenish light,
through murk, on blotchy ground, crossed by stray lines and grainy. What red looks like there is
what a few labelled images of base classes can tell, and novel classes share it. Every image is a
pure function of (label, style, seed): no data set is shipped.
"""

import colorsys
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

Array = np.ndarray
Style = Literal["general", "domain"]

STYLES = ("general", "domain")
PATTERNS = ("", "striped", "dotted", "checked")
HUES = {"red": 0, "yellow": 50, "green": 120, "blue": 215, "purple": 272, "pink": 322}  # degrees
SHAPES = ("circle", "triangle", "star", "ring", "cross", "moon")
TURN = 22  # degrees by which water turns a hue, of the 38 to 95 between two of them
WATER = np.array([0.65, 0.95, 0.9], dtype=np.float32)  # the share of red, green, blue it lets pass
MURK = np.array([0.4, 0.75, 0.8], dtype=np.float32)  # the colour of what floats in it


def _compositions() -> list[tuple[str, str, str]]:
    """The (pattern, colour, shape) of every label.

    Each half holds every pattern in every colour once, and so every colour, pattern and shape; the
    shapes are dealt out so that no two classes of a half agree in two of the three words, and no
    composition of one half occurs in the other.
    """
    return [
        (pattern, colour, SHAPES[(c + p + half * len(SHAPES) // 2) % len(SHAPES)])
        for half in (0, 1)
        for c, colour in enumerate(HUES)
        for p, pattern in enumerate(PATTERNS)
    ]


COMPOSITIONS = _compositions()
CLASSES: tuple[str, ...] = tuple(" ".join(filter(None, parts)) for parts in COMPOSITIONS)
"""Class names in label order; the first half is base, the rest novel."""


def _polygon(corners: int, size: float = 1.0, inner: float = 1.0) -> Array:
    """Corners [n, 2] of a regular polygon; a star if every second corner lies at `inner`."""
    angle = np.arange(corners) * (2 * np.pi / corners) - np.pi / 2
    radius = np.where(np.arange(corners) % 2, inner, 1.0) * size
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _cross(half: float = 0.34) -> Array:
    """Corners [12, 2] of a cross whose bars are 2 `half` thick."""
    corner = np.array([[half, -1], [half, -half], [1, -half]])
    quarter = np.array([[0, 1], [-1, 0]])  # a quarter turn clockwise, y being down
    return np.concatenate([corner @ np.linalg.matrix_power(quarter, k) for k in range(4)])


def _moon() -> Array:
    """Corners [50, 2] of a crescent open to the right."""
    rim, bite = np.linspace(-0.75, 0.75, 30) * np.pi, np.linspace(0.65, -0.65, 20) * np.pi
    outer = np.stack([-np.cos(rim), np.sin(rim)], axis=1)
    inner = np.stack([0.28 - 0.72 * np.cos(bite), 0.78 * np.sin(bite)], axis=1)
    return np.concatenate([outer, inner])


OUTLINES = {  # in the unit circle, y down; a second outline is a hole
    "circle": (_polygon(40, 0.92),),
    "triangle": (_polygon(3, 1.1),),
    "star": (_polygon(10, 1.08, inner=0.42),),
    "ring": (_polygon(40), _polygon(40, 0.55)),
    "cross": (_cross(),),
    "moon": (_moon(),),
}


def _rgb(hue: float, saturation: float, value: float) -> Array:
    """An RGB colour [3] in 0..1; the hue is in degrees."""
    return np.array(colorsys.hsv_to_rgb(hue / 360 % 1, saturation, value), dtype=np.float32)


def _to_image(canvas: Array) -> Image.Image:
    """An image from RGB [height, width, 3] in 0..1."""
    return Image.fromarray((255 * canvas.clip(0, 1)).astype(np.uint8))


def _blotches(rng: np.random.Generator, size: tuple[int, int], cells: int) -> Array:
    """Smooth colour noise [height, width, 3] in -0.5..0.5, about `cells` blotches a side."""
    coarse = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
    return np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), dtype=np.float32) / 255 - 0.5


def _stray_lines(rng: np.random.Generator, canvas: Array, count: int, widest: int) -> Array:
    """`canvas` [height, width, 3] crossed by `count` straight lines of random colours."""
    image = _to_image(canvas)
    draw = ImageDraw.Draw(image)
    for ends in rng.uniform(-0.1, 1.1, (count, 2, 2)) * image.size:
        colour = _rgb(rng.uniform(0, 360), rng.uniform(0, 0.8), rng.uniform(0.2, 0.9))
        ink = tuple(int(255 * channel) for channel in colour)
        draw.line(ends.ravel().tolist(), fill=ink, width=int(rng.integers(1, widest + 1)))
    return np.asarray(image, dtype=np.float32) / 255


def _ground(rng: np.random.Generator, style: Style, size: tuple[int, int]) -> Array:
    """The background, RGB [height, width, 3] in 0..1."""
    tint = _rgb(rng.uniform(0, 360), rng.uniform(0, 0.15), rng.uniform(0.15, 1.0))
    plain = np.broadcast_to(tint, (size[1], size[0], 3))
    if style == "general":
        return plain
    fine = _blotches(rng, size, 24).mean(axis=2, keepdims=True)
    blotchy = plain + 0.2 * _blotches(rng, size, 4) + 0.15 * fine
    return _stray_lines(rng, blotchy, count=int(rng.integers(1, 5)), widest=3)


def _sink(rng: np.random.Generator, canvas: Array) -> Array:
    """`canvas` [height, width, 3] as it looks under water."""
    height, width, _ = canvas.shape
    shade = 1 + 0.5 * _blotches(rng, (width, height), 2).mean(axis=2, keepdims=True)
    depth = rng.uniform(0.15, 0.35)
    seen = (1 - depth) * canvas * shade * WATER + depth * rng.uniform(0.4, 0.8) * MURK
    grain = 0.03 * rng.standard_normal(canvas.shape, dtype=np.float32)
    return _stray_lines(rng, seen + grain, count=int(rng.integers(0, 2)), widest=1)


def _paint(pattern: str, along: Array, across: Array, colour: Array, other: Array) -> Array:
    """The object's surface, [height, width, 3] or, if plain, [3].

    `along`, `across` [height, width]: coordinates on the object, in its radii.
    """
    if pattern == "striped":
        first = np.sin(along * 11) > 0
    elif pattern == "dotted":
        first = np.sin(along * 10) * np.sin(across * 10) < 0.35
    elif pattern == "checked":
        first = np.sin(along * 9) * np.sin(across * 9) > 0
    else:
        return colour
    return np.where(first[..., None], colour, other)


def render(label: int, style: Style, seed: int) -> Image.Image:
    """The image of class `label`, 72 to 128 pixels a side; the same for the same arguments."""
    rng = np.random.default_rng((label, STYLES.index(style), seed))
    pattern, name, shape = COMPOSITIONS[label]
    under_water = style == "domain"
    width, height = size = int(rng.integers(72, 129)), int(rng.integers(72, 129))
    short = min(size)

    turn = rng.uniform(-0.3, 0.3) if under_water else rng.uniform(-0.15, 0.15)
    radius = short * (rng.uniform(0.32, 0.42) if under_water else rng.uniform(0.36, 0.46))
    centre = np.array(size) / 2 + rng.uniform(-1, 1, 2) * 0.05 * short
    cos, sin = np.cos(turn), np.sin(turn)
    mask = Image.new("1", size)
    for inside, outline in zip((1, 0), OUTLINES[shape], strict=False):
        corners = outline @ np.array([[cos, sin], [-sin, cos]]) * radius + centre
        ImageDraw.Draw(mask).polygon(corners.ravel().tolist(), fill=inside)

    x = (np.arange(width, dtype=np.float32) - centre[0]) / radius
    y = (np.arange(height, dtype=np.float32)[:, None] - centre[1]) / radius
    lean = turn + rng.uniform(-np.pi, np.pi)
    cos, sin = np.float32(np.cos(lean)), np.float32(np.sin(lean))
    hue = HUES[name] + rng.uniform(-6, 6) + (TURN if under_water else 0)
    colour = _rgb(hue, rng.uniform(0.8, 1), rng.uniform(0.75, 1))
    other = _rgb(hue, rng.uniform(0, 0.15), rng.choice([0.12, 1.0]))
    surface = _paint(pattern, x * cos + y * sin, y * cos - x * sin, colour, other)

    canvas = np.where(np.asarray(mask)[..., None], surface, _ground(rng, style, size))
    return _to_image(_sink(rng, canvas) if under_water else canvas)


def write_images(
    folder: Path | str, style: Style, per_class: int, seed: int, labelled: bool
) -> None:
    """Write `per_class` JPEGs of every class.

    Labelled: `folder/<class name>/NNN.jpg`. Otherwise `folder/NNNNN.jpg`, in an order that tells
    nothing about the classes. Different seeds give different images (`per_class` < 100,000).
    """
    wanted = [(label, i) for label in range(len(CLASSES)) for i in range(per_class)]
    places = np.random.default_rng(seed).permutation(len(wanted))
    for (label, i), place in zip(wanted, places, strict=True):
        name = f"{CLASSES[label]}/{i:03}.jpg" if labelled else f"{place:05}.jpg"
        path = Path(folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        render(label, style, 100_000 * seed + i).save(path, quality=90)
