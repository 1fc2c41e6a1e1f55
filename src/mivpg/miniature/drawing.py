"""Draws small scenes: solid shapes, cast rays, one light at the camera, a soft shadow on a white floor.

    picture, shares = draw([Block(center=(0, 0, 0.5), half=(0.5, 0.5, 0.5), color=(200, 40, 40))], Camera(azimuth=30))

Two kinds of shape are enough for furniture and small goods. Each shape, and each painted face of one, belongs to a
named part, and beside the picture `draw` says how much of it each part covers, and `draw_with_parts` where: what can be
seen is measured, not assumed. Lengths are in one unit; z points up, the floor is z = 0, and a product looks along -y.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from PIL import Image

Color = tuple[float, float, float]
"""Red, green and blue, 0 to 255."""
Vector = tuple[float, float, float]

Pattern = Literal["plain", "striped", "dotted", "checked", "banded"]
Material = Literal["fabric", "leather", "wooden", "metal", "plastic"]

FIELD_OF_VIEW = math.radians(28)
MARGIN = 1.12
"""How much farther away the camera stands than it has to."""
OVERSAMPLING = 2
"""Rays along each side of a pixel."""

SHINE: dict[str, tuple[float, float]] = {
    "fabric": (0.0, 1.0),
    "leather": (0.5, 14.0),
    "wooden": (0.08, 8.0),
    "metal": (0.9, 24.0),
    "plastic": (0.45, 40.0),
}
"""Strength and sharpness of the highlight."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Paint:
    """A face of a block, or all of a shape, in another colour."""

    part: str
    """What is seen where this face is seen."""
    color: Color
    face: tuple[int, int] | None = None
    """Axis (0, 1, 2) and sign of the face; None = everywhere."""
    pattern: Pattern = "plain"
    """`color` fills the figures of the pattern; between them the shape's own colour shows. Plain is `color` alone."""
    size: float = 0.2
    """Of the pattern, in the unit of lengths."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """What both kinds of shape have."""

    center: Vector
    half: Vector
    """Half the extent along each of the shape's own axes."""
    color: Color
    material: Material = "plastic"
    part: str = "body"
    paints: tuple[Paint, ...] = ()
    turn: Vector = (0.0, 0.0, 0.0)
    """Degrees about x, then y, then z."""

    def rotation(self) -> np.ndarray:
        """The shape's axes, as columns."""
        matrix = np.eye(3)
        for axis, degrees in enumerate(self.turn):
            c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
            i, j = [(1, 2), (2, 0), (0, 1)][axis]
            step = np.eye(3)
            step[i, i], step[i, j], step[j, i], step[j, j] = c, -s, s, c
            matrix = step @ matrix
        return matrix

    def corners(self) -> np.ndarray:
        """Of its bounding box, (8, 3)."""
        signs = np.array([(x, y, z) for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)])
        return (signs * np.array(self.half)) @ self.rotation().T + np.array(self.center)

    def hit(self, origin: np.ndarray, rays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where rays first meet the shape, in coordinates in which it spans -1 to 1.

        Args:
            origin: (3,).
            rays: (3, n).

        Returns:
            Lengths along the rays (n,), infinite where they miss, and the outward direction there (3, n), not of
            length one.
        """
        raise NotImplementedError


def _slab(origin: np.ndarray, rays: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which rays (m,) enter the box from -1 to 1, and where along them they enter (m,) and leave it (m,)."""
    inverse = 1.0 / np.where(rays == 0, np.float32(1e-9), rays)
    middle, reach = -origin[:, None] * inverse, np.abs(inverse)
    enter, leave = (middle - reach).max(axis=0), (middle + reach).min(axis=0)
    met = np.flatnonzero((enter < leave) & (enter > 0))
    return met, enter[met], leave[met]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block(Shape):
    """From a sharp box to a ball: |x|^p + |y|^q + |z|^r <= 1."""

    roundness: tuple[int, int, int] | None = None
    """Even exponents p, q, r: 2 is a ball's, 4 a pillow's, 8 a cushion's; None = a sharp box."""

    def hit(self, origin: np.ndarray, rays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """By the box, then by Newton's steps: the sum is convex along a ray, so they never pass the first root."""
        met, enter, leave = _slab(origin, rays)
        lengths, outward = np.full(rays.shape[1], np.inf, np.float32), np.zeros_like(rays)
        t, directions, beyond = enter, rays[:, met], leave + np.float32(1e-3)
        if self.roundness is None:
            axis = np.abs(origin[:, None] + t * directions).argmax(axis=0)  # of the face that they enter through
            lengths[met], outward[axis, met] = t, -np.sign(rays[axis, met])
            return lengths, outward
        for _ in range(6):
            points = origin[:, None] + t * directions
            value, slopes = self._sum_and_slopes(points)
            t = np.minimum(t - value / np.minimum((slopes * directions).sum(axis=0), -1e-6), beyond)
        points = origin[:, None] + t * directions
        value, slopes = self._sum_and_slopes(points)
        # A ray that misses has been sent beyond the box, or stands where the sum is least.
        lengths[met] = np.where((np.abs(value) < 0.02) & (t <= leave), t, np.inf)
        outward[:, met] = slopes
        return lengths, outward

    def _sum_and_slopes(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """|x|^p + |y|^q + |z|^r - 1 at points (3, n), and its derivatives (3, n)."""
        assert self.roundness is not None
        total = np.full(points.shape[1], -1.0, np.float32)
        slopes = np.empty_like(points)
        for axis, power in enumerate(self.roundness):
            square = points[axis] * points[axis]
            raised = square  # to power - 2, by squaring; numpy's ** takes ten times as long
            reached = 2
            less = np.ones_like(square)
            while reached < power:
                less = less * raised
                raised = raised * raised
                reached *= 2
            slopes[axis] = power * less * points[axis]
            total += less * square
        return total, slopes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Frustum(Shape):
    """A cylinder, a cone or what lies between, along z; `half` is for its wider end."""

    top: float = 1.0
    """Radius above, as a share of `half`."""
    bottom: float = 1.0
    """Radius below."""
    is_open: bool = False
    """Without its two flat ends, like a lampshade."""

    def hit(self, origin: np.ndarray, rays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """By the quadratic equation of the side, and the planes of the ends."""
        middle, slope = (self.top + self.bottom) / 2, (self.top - self.bottom) / 2
        (x, y, z), (dx, dy, dz) = origin, rays
        radius, widening = middle + slope * z, slope * dz
        a = dx * dx + dy * dy - widening * widening
        b = x * dx + y * dy - radius * widening
        c = x * x + y * y - radius * radius
        a = np.where(np.abs(a) < 1e-9, 1e-9, a)
        lengths = np.full(rays.shape[1], np.inf, np.float32)
        outward = np.zeros_like(rays)
        met = np.flatnonzero(b * b >= a * c)
        a, b = a[met], b[met]
        root = np.sqrt(b * b - a * c)
        for t in ((-b - root) / a, (-b + root) / a):
            height = z + t * dz[met]
            good = (t > 0) & (np.abs(height) <= 1) & (middle + slope * height >= 0) & (t < lengths[met])
            some = met[good]
            lengths[some] = t[good]
            points = origin[:, None] + t[good] * rays[:, some]
            outward[:, some] = np.stack([points[0], points[1], -slope * (middle + slope * points[2])])
        if not self.is_open:
            for end, size in ((1.0, self.top), (-1.0, self.bottom)):
                t = (end - z) / np.where(np.abs(dz) < 1e-9, 1e-9, dz)
                good = (t > 0) & (t < lengths) & ((x + t * dx) ** 2 + (y + t * dy) ** 2 <= size * size)
                lengths[good] = t[good]
                outward[:, good] = np.array([[0.0], [0.0], [end]])
        return lengths, outward


@dataclasses.dataclass(frozen=True, kw_only=True)
class Camera:
    """Looks at the middle of the scene from a distance at which all of it is seen."""

    azimuth: float = 0.0
    """Degrees; 0 looks at the front, 90 at its left side, 180 at the back."""
    elevation: float = 15.0
    """Degrees above the floor; negative looks from below, through the floor."""


def _figures(pattern: Pattern, u: np.ndarray, v: np.ndarray, size: float) -> np.ndarray:
    """Where the figures of a pattern are, at places (u, v) of a face around its middle."""
    if pattern == "striped":
        return np.mod(u / size, 1.0) < 0.5
    if pattern == "banded":
        return np.mod(v / size, 1.0) < 0.5
    if pattern == "checked":
        return (np.floor(u / size) + np.floor(v / size)) % 2 == 0
    if pattern == "dotted":
        return (np.mod(u / size, 1.0) - 0.5) ** 2 + (np.mod(v / size, 1.0) - 0.5) ** 2 < 0.11
    return np.ones_like(u, bool)


def _albedo(
    shape: Shape, local: np.ndarray, outward: np.ndarray, number: Callable[[str], int]
) -> tuple[np.ndarray, np.ndarray]:
    """Colour (3, n) and part number (n,) at places (3, n) of a shape, in its unit coordinates."""
    color = np.repeat(np.array(shape.color, np.float32)[:, None], local.shape[1], axis=1)
    part = np.full(local.shape[1], number(shape.part), np.uint8)
    places = local * np.array(shape.half, np.float32)[:, None]
    for paint in shape.paints:
        if paint.face is None:
            where = np.ones(len(part), bool)
            u, v = np.arctan2(places[1], places[0]) * max(shape.half[:2]), places[2]  # around
        else:
            axis, sign = paint.face
            where = (np.abs(outward).argmax(axis=0) == axis) & (np.sign(outward[axis]) == sign)
            u, v = (places[i] for i in range(3) if i != axis)
        part[where] = number(paint.part)
        color[:, where & _figures(paint.pattern, u, v, paint.size)] = np.array(paint.color)[:, None]
    return color * _texture(shape, places), part


def _texture(shape: Shape, places: np.ndarray) -> np.ndarray:
    """How light a material is at places (3, n) of a shape: grain, weave, seams, or the bands of polished metal."""
    x, y, z = places
    if shape.material == "wooden":  # grain along the longest side
        along = int(np.argmax(shape.half))
        across = places[(along + 1) % 3] + 0.6 * places[(along + 2) % 3]
        return 1 + 0.14 * np.sin(46 * across + 3 * np.sin(4 * places[along]))
    if shape.material == "fabric":
        return 1 + 0.14 * np.sin(60 * x) * np.sin(60 * (z + y))
    if shape.material == "leather":  # seams across, a hand apart
        seams = [np.abs(np.mod(place + 0.14, 0.28) - 0.14) < 0.014 for place in (y, z)]
        return 1 + (1.5 if sum(shape.color) < 200 else -0.45) * (seams[0] | seams[1])  # lighter ones in black leather
    if shape.material == "metal":
        return 1 + 0.3 * np.sin(13 * z + 5 * x)
    return np.ones_like(x)


def draw(
    shapes: Sequence[Shape], camera: Camera, *, size: int = 192, background: float = 255.0
) -> tuple[Image.Image, dict[str, float]]:
    """A picture, as `draw_with_parts` draws it, and the share of it that each part covers."""
    picture, parts = draw_with_parts(shapes, camera, size=size, background=background)
    return picture, {part: float(where.mean()) for part, where in parts.items()}


def draw_with_parts(
    shapes: Sequence[Shape], camera: Camera, *, size: int = 192, background: float = 255.0
) -> tuple[Image.Image, dict[str, np.ndarray]]:
    """A picture, and where in it each part is seen.

    Args:
        shapes: The scene.
        camera: From where.
        size: In pixels.
        background: How light the wall behind is, 0 to 255.

    Returns:
        `size` x `size` pixels, and by part whether each ray, `OVERSAMPLING` along each side of a pixel, meets it:
        (2 size, 2 size).
    """
    corners = np.concatenate([shape.corners() for shape in shapes])
    low, high = corners.min(axis=0).astype(np.float32), corners.max(axis=0).astype(np.float32)
    eye, axes = _stand(corners, camera)
    side = size * OVERSAMPLING
    rays = _rays(axes, side)
    right, up, ahead = axes
    light = math.copysign(0.45, camera.elevation) * up - 0.35 * right - 0.82 * ahead
    light = (light / np.linalg.norm(light)).astype(np.float32)
    from_below = camera.elevation < 0  # through the floor, which then is not there

    ground = _ground(_rays(axes, size), eye, low, high, background, from_below=from_below)
    canvas = ground.repeat(OVERSAMPLING, axis=1).repeat(OVERSAMPLING, axis=2)  # (3, side, side)
    depth = np.full((side, side), np.inf, np.float32)
    parts = np.zeros((side, side), np.uint8)
    numbers: dict[str, int] = {}

    def number(part: str) -> int:
        return numbers.setdefault(part, len(numbers) + 1)  # 0 is where nothing is

    for shape in shapes:
        box = _window(shape.corners(), eye, axes, side)
        window = rays[:, *box].reshape(3, -1)
        if window.size == 0:
            continue
        to_local = (shape.rotation().T / np.array(shape.half)[:, None]).astype(np.float32)
        origin = to_local @ (eye - shape.center).astype(np.float32)
        lengths, outward = shape.hit(origin, to_local @ window)
        nearest = np.flatnonzero(lengths < depth[box].ravel())
        lengths, directions, outward = lengths[nearest], window[:, nearest], outward[:, nearest]
        local = origin[:, None] + lengths * (to_local @ directions)
        color, part = _albedo(shape, local, outward, number)
        heights = None if from_below else eye[2] + lengths * directions[2] - low[2]
        rows, columns = np.unravel_index(nearest, depth[box].shape)
        depth[box][rows, columns], parts[box][rows, columns] = lengths, part
        canvas[:, *box][:, rows, columns] = _lit(
            color, _unit(to_local.T @ outward), directions, light, SHINE[shape.material], heights
        )

    each = range(OVERSAMPLING)
    pixels = sum(canvas[:, i::OVERSAMPLING, j::OVERSAMPLING] for i in each for j in each) / OVERSAMPLING**2
    picture = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8).transpose(1, 2, 0))
    return picture, {part: parts == place for part, place in numbers.items()}


def _rays(axes: np.ndarray, side: int) -> np.ndarray:
    """One through the middle of each of `side` x `side` fields, one unit deep, (3, side, side)."""
    right, up, ahead = axes[:, :, None, None]
    steps = ((np.arange(side, dtype=np.float32) + 0.5) / side * 2 - 1) * np.float32(math.tan(FIELD_OF_VIEW / 2))
    return steps[None, None, :] * right - steps[None, :, None] * up + ahead


def _stand(corners: np.ndarray, camera: Camera) -> tuple[np.ndarray, np.ndarray]:
    """Where the camera sees all corners (n, 3) from, (3,), and what is right, up and ahead there, rows of (3, 3)."""
    azimuth, elevation = math.radians(camera.azimuth), math.radians(camera.elevation)
    back = np.array(
        [
            -math.sin(azimuth) * math.cos(elevation),
            -math.cos(azimuth) * math.cos(elevation),
            math.sin(elevation),
        ]
    )
    right = np.array([math.cos(azimuth), -math.sin(azimuth), 0.0])
    up = np.cross(back, right)
    middle = (corners.min(axis=0) + corners.max(axis=0)) / 2
    around = (corners - middle) @ np.stack([right, up, back], axis=1)
    reach = np.abs(around[:, :2]).max(axis=1) / math.tan(FIELD_OF_VIEW / 2) + around[:, 2]
    # In single precision, or all that is computed with them takes twice as long.
    eye, axes = middle + MARGIN * reach.max() * back, np.stack([right, up, -back])
    return eye.astype(np.float32), axes.astype(np.float32)


def _window(corners: np.ndarray, eye: np.ndarray, axes: np.ndarray, side: int) -> tuple[slice, slice]:
    """The rows and columns of a picture that hold all corners (n, 3)."""
    x, y, away = ((corners - eye) @ axes.T).T
    spread = math.tan(FIELD_OF_VIEW / 2)
    columns = (x / away / spread + 1) / 2 * side
    rows = (1 - y / away / spread) / 2 * side
    top, bottom, left, end = np.clip([rows.min(), rows.max() + 1, columns.min(), columns.max() + 1], 0, side).astype(
        int
    )
    return slice(top, bottom), slice(left, end)


def _lit(
    color: np.ndarray,
    normal: np.ndarray,
    directions: np.ndarray,
    light: np.ndarray,
    shine: tuple[float, float],
    heights: np.ndarray | None,
) -> np.ndarray:
    """Colours (3, n) in the light: paler where they face it, with a highlight, and darker near the floor.

    Args:
        color: In white light, (3, n).
        normal: Of the surface, to either side, (3, n).
        directions: Of the rays that see it, (3, n).
        light: Towards the light, (3,).
        shine: Strength and sharpness of the highlight.
        heights: Above the floor (n,), where there is one.
    """
    towards_camera = (normal * directions).sum(axis=0) < 0
    normal = normal * np.where(towards_camera, np.float32(1), np.float32(-1))
    shade = 0.42 + 0.62 * np.maximum(light @ normal, 0.0) + 0.06 * normal[2]
    if heights is not None:
        shade *= 0.82 + 0.18 * np.clip(heights / 0.25, 0.0, 1.0)
    strength, sharpness = shine
    highlight = np.maximum((normal * _unit(light[:, None] - _unit(directions))).sum(axis=0), 0.0) ** sharpness
    return color * shade + 140 * strength * highlight


def _unit(vectors: np.ndarray) -> np.ndarray:
    """(3, n), each of length one."""
    return vectors / np.maximum(np.sqrt((vectors * vectors).sum(axis=0)), 1e-9)


def _ground(
    rays: np.ndarray, eye: np.ndarray, low: np.ndarray, high: np.ndarray, background: float, *, from_below: bool
) -> np.ndarray:
    """A light wall, and on the floor the soft shadow of the scene's bounding box; from below there is no floor."""
    canvas = np.full(rays.shape, background, np.float32)
    if from_below:
        return canvas
    t = (low[2] - eye[2]) / np.minimum(rays[2], np.float32(-1e-4))
    middle, extent = (low + high) / 2, np.maximum((high - low) / 2, 0.05)
    u = (eye[0] - middle[0] + t * rays[0]) / np.float32(extent[0] * 1.15)
    v = (eye[1] - middle[1] + t * rays[1]) / np.float32(extent[1] * 1.15)
    away = u * u + v * v
    near = (rays[2] < -1e-4) & (away < 4)
    canvas[:, near] *= 1 - 0.38 * np.exp(-1.6 * away[near] ** 1.5)
    return canvas
