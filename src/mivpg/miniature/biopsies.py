"""Generated slides of gastric adenocarcinoma: patches in H&E colours, and what a report says of them together.

A patch shows one of ten things (`PATCH_TYPES`). A slide is a mix of them, and its report follows from the mix alone:

    main, second   the growth of most tumour patches, and of others where there are any
    subtype        well with moderately differentiated glands, or a sheet beside glands, is a subtype of its own
    mucin          beside glands it comes from them, beside single cells it lies around them
    invasion       muscle beside single cells is infiltrated, beside other tumour invaded; without it, the mucosa
    inflammation   lymphocytes beside solid sheets make a lymphoid stroma, else an inflamed one

So no single patch is enough. A description of a single patch says what that shows, in the report's words, and never
the diagnosis.
"""

import math
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image

from mivpg.miniature.lessons import SHARE_WITH_KEYWORDS, PictureLesson, TextLesson, pixels_of
from mivpg.miniature.wording import choose

PATCH_SIZE = 128
"""Pixels a side; the real ones have 300."""

TUMOR_TYPES = (
    "regular glands",
    "fused glands",
    "papillary fronds",
    "solid sheets",
    "scattered cells",
    "signet ring cells",
    "mucin pools",
)
PATCH_TYPES = (*TUMOR_TYPES, "smooth muscle", "lymphocytes", "stroma")
CLASSES: tuple[str, ...] = tuple(f"patch {kind}" for kind in PATCH_TYPES)

GLANDS = frozenset({"regular glands", "fused glands", "papillary fronds"})
SINGLE_CELLS = frozenset({"scattered cells", "signet ring cells"})

NUM_PATCHES = (5, 300)
"""Fewest and most of a slide."""
SPREAD = 0.8
"""Standard deviation of the logarithm of a slide's number of patches."""

SHARE_OF_REPORTS = 0.65
"""Of the text lessons; the others describe a patch."""


# ── Slides ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Subtype:
    """How the slides of a subtype are made up."""

    how_often: float
    mains: tuple[str, ...]
    """The growth of most tumour patches is one of these."""
    seconds: dict[str, float] | None = None
    """How often there is which other growth; None = that of `mains` which is not the main one."""
    mucin: float = 0.0
    """How often there is mucin beside other growth."""


SUBTYPES = {
    "well differentiated tubular adenocarcinoma": Subtype(
        0.27, ("regular glands",), {"papillary fronds": 0.12}, mucin=0.15
    ),
    "moderately differentiated tubular adenocarcinoma": Subtype(
        0.25, ("fused glands",), {"papillary fronds": 0.1}, mucin=0.15
    ),
    "papillary adenocarcinoma": Subtype(0.14, ("papillary fronds",), {"regular glands": 0.25}, mucin=0.1),
    "moderately to poorly differentiated adenocarcinoma": Subtype(0.09, ("fused glands", "solid sheets")),
    "poorly differentiated adenocarcinoma, non-solid type": Subtype(
        0.08, ("scattered cells",), {"signet ring cells": 0.25}
    ),
    "poorly differentiated adenocarcinoma, solid type": Subtype(0.07, ("solid sheets",), {"scattered cells": 0.2}),
    "well to moderately differentiated tubular adenocarcinoma": Subtype(
        0.06, ("regular glands", "fused glands"), mucin=0.1
    ),
    "signet ring cell carcinoma": Subtype(0.03, ("signet ring cells",), {"scattered cells": 0.3}, mucin=0.25),
    "mucinous adenocarcinoma": Subtype(0.01, ("mucin pools",), {"regular glands": 0.3, "signet ring cells": 0.3}),
}
"""About as frequent as in PatchGastricADC22."""

BESIDE = {"smooth muscle": 0.35, "lymphocytes": 0.35, "stroma": 0.8}
"""How often slides show what is no tumour."""


def draw_mix(generator: random.Random, *, mean_patches: float = 30, evenly: bool = False) -> dict[str, int]:
    """How many patches of each type a slide has, 5 to 300 in all; types that it lacks are left out.

    Args:
        generator: Chooses.
        mean_patches: Of the slides before they are held within 5 to 300.
        evenly: All subtypes equally often, where rare ones are to be learnt.
    """
    weights = None if evenly else [subtype.how_often for subtype in SUBTYPES.values()]
    (subtype,) = generator.choices(list(SUBTYPES.values()), weights)
    main = generator.choice(subtype.mains)
    others = [kind for kind, often in BESIDE.items() if generator.random() < often]
    if subtype.seconds is None:
        others.insert(0, next(kind for kind in subtype.mains if kind != main))
    else:
        often = subtype.seconds | {"": 1 - sum(subtype.seconds.values())}
        (second,) = generator.choices(list(often), list(often.values()))
        others = [second, *others] if second else others
    if generator.random() < subtype.mucin:
        others.append("mucin pools")
    fewest, most = NUM_PATCHES
    number = round(generator.lognormvariate(math.log(mean_patches) - SPREAD**2 / 2, SPREAD))
    number = min(max(number, fewest), most)
    others = others[: number - 2]  # two of the main type at least
    shares = [generator.uniform(0.1, 0.45) for _ in others]  # of one of the main type
    spare = number - 1 - len(others)
    mix = {kind: 1 + int(spare * share / (1 + sum(shares))) for kind, share in zip(others, shares, strict=True)}
    return {main: number - sum(mix.values())} | mix


def facts_of(mix: Mapping[str, int]) -> dict[str, str]:
    """What is true of a slide, by name, `none` where there is nothing to say.

    Args:
        mix: How many patches of each type it has; some are of a tumour.
    """
    growths = sorted((kind for kind in TUMOR_TYPES if mix.get(kind)), key=lambda kind: -mix[kind])
    main, *rest = growths
    present = {kind for kind, number in mix.items() if number}
    inflamed = "lymphoid stroma" if "solid sheets" in present else "inflamed stroma"
    invaded = "muscle infiltrated" if present & SINGLE_CELLS else "muscle invaded"
    mucin = "from glands" if present & GLANDS else "around cells"
    return {
        "subtype": _subtype_of(main, present),
        "main": main,
        "second": next((kind for kind in rest if kind != "mucin pools"), "none"),
        "mucin": mucin if "mucin pools" in rest else "none",
        "invasion": invaded if "smooth muscle" in present else "mucosa",
        "inflammation": inflamed if "lymphocytes" in present else "none",
    }


def _subtype_of(main: str, present: set[str]) -> str:
    for name, subtype in SUBTYPES.items():
        if main in subtype.mains and len(subtype.mains) > 1 and present >= set(subtype.mains):
            return name
    return next(name for name, subtype in SUBTYPES.items() if subtype.mains == (main,))


# ── Words ───────────────────────────────────────────────────────────────────────────────────────────────────────────

USUAL = 0.8
"""How often the usual wording is chosen where there are several."""

GROWTH = {
    "regular glands": "form regular tubular glands",
    "fused glands": "form irregular fused glands",
    "papillary fronds": "form papillary fronds",
    "solid sheets": "grow in solid sheets",
    "scattered cells": "lie scattered one by one",
    "signet ring cells": "appear as signet ring cells",
    "mucin pools": "float in pools of mucin",
}
"""What "tumor cells" do, in reports and in descriptions."""
MUCIN = {"from glands": "with mucin secreted by the glands", "around cells": "with mucin around the cells"}
INVASION = {
    "mucosa": "remain within the mucosa",
    "muscle invaded": "invade the muscle layer",
    "muscle infiltrated": "infiltrate between the bundles of the muscle layer",
}
INFLAMMATION = {
    "inflamed stroma": ("with inflammation of the stroma", "and the stroma shows inflammation"),
    "lymphoid stroma": ("with a dense lymphoid stroma", "and the stroma is densely lymphoid"),
}
"""The usual wording first."""

DESCRIPTIONS = {
    "regular glands": "regular tubular glands in fibrous stroma",
    "fused glands": "irregular fused glands with narrow lumens",
    "papillary fronds": "papillary fronds with thin cores",
    "solid sheets": "solid sheets of tumor cells without lumens",
    "scattered cells": "scattered tumor cells in fibrous stroma",
    "signet ring cells": "signet ring cells in fibrous stroma",
    "mucin pools": "pools of mucin with a few tumor cells",
    "smooth muscle": "bundles of smooth muscle of the muscle layer",
    "lymphocytes": "dense lymphocytes and inflammation of the stroma",
    "stroma": "fibrous stroma without tumor cells",
}
"""Of a single patch."""

NAMED_BY = {
    "regular glands": "regular tubular glands",
    "fused glands": "irregular fused glands",
    "papillary fronds": "papillary fronds",
    "solid sheets": "solid sheets",
    "scattered cells": "scattered",
    "signet ring cells": "signet ring cells",
    "mucin pools": "pools of mucin",
    "smooth muscle": "smooth muscle",
    "lymphocytes": "lymphocytes",
    "stroma": "fibrous stroma",
}
"""By which words a text is known to speak of a type of patch."""
_NAMES = re.compile(r"\b(?:" + "|".join(NAMED_BY.values()) + r")\b")
_SUBTYPE_NAMES = re.compile(r"\b(?:" + "|".join(sorted(SUBTYPES, key=len, reverse=True)) + r")\b")


def report(facts: Mapping[str, str], generator: random.Random | None = None) -> str:
    """One or two sentences that say all that is true of a slide; without a generator in the usual wording."""
    growth = GROWTH[facts["main"]]
    if facts["second"] != "none":
        growth = f"mainly {growth} and in part {GROWTH[facts['second']]}"
    cells = f"tumor cells {growth}"
    if facts["mucin"] != "none":
        cells += f", {MUCIN[facts['mucin']]},"
    cells += f" and {INVASION[facts['invasion']]}"
    if facts["inflammation"] != "none":
        cells += f", {choose(generator, INFLAMMATION[facts['inflammation']], USUAL)}"
    subtype = facts["subtype"]
    manner = choose(generator, ("consistent", "two sentences", "in which"), USUAL)
    if manner == "consistent":
        return _sentence(f"{cells}, consistent with {subtype}")
    if manner == "in which":
        return _sentence(f"{subtype}, in which {cells}")
    return f"{_sentence(subtype)} {_sentence(cells)}"


def description(kind: str, generator: random.Random) -> str:
    """What a single patch shows."""
    if kind in GROWTH and generator.random() < 0.5:
        return _sentence(f"tumor cells {GROWTH[kind]}")
    return _sentence(DESCRIPTIONS[kind])


def keywords(mix: Mapping[str, int], generator: random.Random) -> list[str]:
    """What the patches of a slide show, a few words a type, in any order: "mainly fused glands", "lymphocytes"."""
    facts = facts_of(mix)
    is_mixed = facts["second"] != "none" or facts["mucin"] != "none"
    words = [f"mainly {kind}" if is_mixed and kind == facts["main"] else kind for kind in mix]
    generator.shuffle(words)
    return words


def text_lesson(generator: random.Random) -> TextLesson:
    """A report after what the patches of a slide show, or a description after what a patch shows."""
    if generator.random() < SHARE_OF_REPORTS:
        mix = draw_mix(generator, evenly=True)
        words, text = keywords(mix, generator), report(facts_of(mix), generator)
    else:
        kind = generator.choice(PATCH_TYPES)
        words, text = [kind], description(kind, generator)
    return TextLesson(words if generator.random() < SHARE_WITH_KEYWORDS else [], text)


def picture_lesson(generator: random.Random) -> PictureLesson:
    """A patch, made smaller as the base model sees those of a slide, and what it shows."""
    kind = generator.choice(PATCH_TYPES)
    return PictureLesson(
        pixels=pixels_of(draw_patch(kind, generator)),
        keywords=[],
        text=description(kind, generator),
        classes=frozenset({f"patch {kind}"}),
        facts={"type": kind},
    )


def right_of_said(caption: str, facts: Mapping[str, str]) -> dict[str, bool]:
    """Whether a description of a patch names its type, {"type": …}; nothing where it names none.

    Args:
        caption: A model's or our own; the type named first counts.
        facts: Of a picture lesson.
    """
    named = _named(caption)
    return {"type": named[0] == facts["type"]} if named else {}


def claims(caption: str) -> dict[str, str]:
    """What a report says, under the names and in the values of `facts_of`.

    A report speaks of all second growth, mucin and inflammation that there is, so one that is silent on them says
    `none`. What it should say and does not (subtype, main, invasion) is left out; of a text that says none of these,
    everything is.
    """
    text = _plain(caption)
    read: dict[str, str] = {}
    if subtype := _SUBTYPE_NAMES.search(text):
        read["subtype"] = subtype.group()
    growths = [kind for kind in _named(caption) if kind in GROWTH]
    if growths:
        read["main"] = growths[0]
    if invasion := [value for value, words in INVASION.items() if words in text]:
        read["invasion"] = invasion[0]
    if not read:
        return {}
    inflamed = [value for value, options in INFLAMMATION.items() if any(words in text for words in options)]
    mucin = [value for value, words in MUCIN.items() if words in text]
    return read | {
        "second": growths[1] if len(growths) > 1 else "none",
        "mucin": mucin[0] if mucin else "none",
        "inflammation": inflamed[0] if inflamed else "none",
    }


def right_claims(caption: str, facts: Mapping[str, str]) -> dict[str, bool]:
    """Which claims of a report are right, by name.

    Args:
        caption: A model's or our own.
        facts: Of the slide, as `facts_of` gives them.
    """
    return {name: value == facts[name] for name, value in claims(caption).items()}


def _named(caption: str) -> list[str]:
    """Types of patches that a text speaks of, in its order."""
    kinds = {words: kind for kind, words in NAMED_BY.items()}
    return list(dict.fromkeys(kinds[words] for words in _NAMES.findall(_plain(caption))))


def _plain(caption: str) -> str:
    return " ".join(caption.lower().split())


def _sentence(words: str) -> str:
    return f"{words[0].upper()}{words[1:]}."


# ── Drawing ─────────────────────────────────────────────────────────────────────────────────────────────────────────

HEMATOXYLIN = np.array((0.78, 0.85, 0.34), np.float32)
"""Optical density of nuclei in red, green and blue."""
EOSIN = np.array((0.14, 0.80, 0.42), np.float32)
"""Of all else."""
WIDTH = 96.0
"""Of a patch, in units of length in which a nucleus measures 3 to 6."""


def draw_patch(kind: str, generator: random.Random, *, size: int = PATCH_SIZE) -> Image.Image:
    """A patch of a type, with a stain, a scale, a density and a rotation of its own; 2 to 5 ms at 128 pixels."""
    tissue = Tissue(np.random.default_rng(generator.getrandbits(64)), size)
    PAINTERS[kind](tissue)
    return tissue.image()


class Tissue:
    """How much of each stain every pixel takes, h x w. Positions are (n, 2), x and y in units."""

    def __init__(self, rng: np.random.Generator, size: int) -> None:
        self.rng, self.size = rng, size
        self.unit = size / WIDTH  # pixels
        self.zoom = rng.uniform(0.88, 1.14)
        self.angle = rng.uniform(0, 2 * math.pi)
        steps = (np.arange(size, dtype=np.float32) + 0.5) / self.unit
        self.x, self.y = np.meshgrid(steps, steps)
        along = np.array((math.cos(self.angle), math.sin(self.angle)), np.float32)
        self.u = ((self.x - WIDTH / 2) * along[0] + (self.y - WIDTH / 2) * along[1]) / self.zoom
        self.v = ((self.y - WIDTH / 2) * along[0] - (self.x - WIDTH / 2) * along[1]) / self.zoom
        self.eosin = np.zeros((size, size), np.float32)
        self.hematoxylin = np.zeros((size, size), np.float32)

    def noise(self, length: float) -> np.ndarray:
        """Smooth, of about unit variance, that changes over such a length."""
        cells = max(round(WIDTH / length), 1) + 3
        grid = Image.fromarray(self.rng.standard_normal((cells, cells)).astype(np.float32))
        box = (1, 1, cells - 1, cells - 1)
        return 1.4 * np.asarray(grid.resize((self.size, self.size), Image.Resampling.BICUBIC, box))

    def fibers(self, length: float, waviness: float) -> np.ndarray:
        """Wavy stripes of such a width along `angle`, -1 to 1."""
        phase = self.v * (2 * math.pi / length) + waviness * self.noise(26)
        return 0.6 * np.sin(phase) + 0.4 * np.sin(1.7 * phase + 1.5 * self.noise(14))

    def places(self, spacing: float, where: np.ndarray | None = None) -> np.ndarray:
        """Centres about so far from each other, inside a mask if one is given."""
        steps = np.arange(-spacing, WIDTH + 2 * spacing, spacing)
        grid = np.stack(np.meshgrid(steps, steps), axis=-1)
        grid[1::2, :, 0] += spacing / 2
        grid = (grid + self.rng.uniform(-0.38, 0.38, grid.shape) * spacing).reshape(-1, 2)
        return grid if where is None else grid[self.within(grid, where)]

    def within(self, places: np.ndarray, where: np.ndarray) -> np.ndarray:
        """Which places lie inside a mask, (n,)."""
        pixels = np.floor(places * self.unit).astype(int)
        inside = ((pixels >= 0) & (pixels < self.size)).all(axis=1)
        pixels = pixels.clip(0, self.size - 1)
        return inside & where[pixels[:, 1], pixels[:, 0]]

    def nuclei(
        self,
        places: np.ndarray,
        radius: float,
        *,
        slender: float = 1.3,
        angles: np.ndarray | None = None,
        shade: float = 0.85,
        vary: float = 0.15,
    ) -> None:
        """Dark ellipses, `slender` times as long as wide, of any direction if no `angles` (n,) are given."""
        number = len(places)
        radii = radius * self.zoom * self.rng.uniform(1 - vary, 1 + vary, number)
        angles = self.rng.uniform(0, math.pi, number) if angles is None else angles
        shades = shade * self.rng.uniform(0.8, 1.2, number)
        self.stamp(self.hematoxylin, places, radii * math.sqrt(slender), radii / math.sqrt(slender), angles, shades)

    def stamp(
        self,
        stain: np.ndarray,
        places: np.ndarray,
        long: np.ndarray,
        short: np.ndarray,
        angles: np.ndarray,
        shades: np.ndarray,
    ) -> None:
        """Raises `stain` to `shades` inside ellipses; all arguments after `places` are (n,)."""
        if not len(places):
            return
        reach = math.ceil(1.2 * float(long.max()) * self.unit) + 1
        steps = np.arange(-reach, reach + 1)
        centers = np.floor(places * self.unit).astype(int)
        x = centers[:, :1] + steps  # (n, k)
        y = centers[:, 1:] + steps
        dx = ((x + 0.5) / self.unit - places[:, :1])[:, None, :]  # (n, 1, k)
        dy = ((y + 0.5) / self.unit - places[:, 1:])[:, :, None]  # (n, k, 1)
        cos, sin = np.cos(angles)[:, None, None], np.sin(angles)[:, None, None]
        distance = np.hypot((dx * cos + dy * sin) / long[:, None, None], (dy * cos - dx * sin) / short[:, None, None])
        values = ((1.2 - distance) / 0.35).clip(0, 1) * shades[:, None, None]  # (n, k, k)
        inside = ((x >= 0) & (x < self.size))[:, None, :] & ((y >= 0) & (y < self.size))[:, :, None] & (values > 0)
        pixels = (y[:, :, None] * self.size + x[:, None, :])[inside]
        np.maximum.at(stain.reshape(-1), pixels, values[inside].astype(np.float32))

    def image(self) -> Image.Image:
        """With grain, in stains that differ from laboratory to laboratory."""
        grain = 1 + 0.1 * self.rng.standard_normal((self.size, self.size), np.float32)
        blue, pink = self.rng.uniform(0.85, 1.2, 2)
        densities = (self.hematoxylin * grain * blue)[..., None] * (HEMATOXYLIN * self.rng.uniform(0.93, 1.07, 3)) + (
            self.eosin.clip(0) * grain * pink
        )[..., None] * (EOSIN * self.rng.uniform(0.9, 1.1, 3))
        pixels = self.rng.uniform(240, 250) * np.exp(-densities)
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _stroma(tissue: Tissue, *, cells: bool = True) -> None:
    """Pink fibres, gaps between them and a few slender nuclei along them."""
    fibers = tissue.fibers(tissue.rng.uniform(7, 10), 2.2)
    tissue.eosin[:] = 0.42 + 0.14 * fibers + 0.06 * tissue.noise(4)
    tissue.eosin *= 1 - 0.75 * ((tissue.noise(9) - 1.0) / 0.3).clip(0, 1)
    if cells:
        places = tissue.places(tissue.rng.uniform(19, 24))
        angles = tissue.angle + tissue.rng.normal(0, 0.3, len(places))
        tissue.nuclei(places, 1.9, slender=4, angles=angles, shade=0.7)


def _muscle(tissue: Tissue) -> None:
    """Deep pink bundles with pale clefts between them, and long nuclei along them."""
    fibers = tissue.fibers(tissue.rng.uniform(4, 6), 1.1)
    tissue.eosin[:] = 0.85 + 0.13 * fibers + 0.05 * tissue.noise(5)
    bundle = np.abs(np.sin(tissue.v * (math.pi / tissue.rng.uniform(24, 34)) + 0.6 * tissue.noise(36)))
    tissue.eosin *= 1 - 0.75 * ((0.12 - bundle) / 0.08).clip(0, 1)
    places = tissue.places(tissue.rng.uniform(12, 15))
    tissue.nuclei(places, 2.1, slender=6, angles=tissue.angle + tissue.rng.normal(0, 0.08, len(places)), shade=0.75)


def _lymphocytes(tissue: Tissue) -> None:
    """Small, round, very dark cells, crowded in stroma."""
    _stroma(tissue, cells=False)
    crowd = tissue.noise(24) > tissue.rng.uniform(-1.1, -0.5)
    tissue.nuclei(tissue.places(tissue.rng.uniform(5.2, 6.2), crowd), 2.0, slender=1.1, shade=1.25, vary=0.08)


def _regular_glands(tissue: Tissue) -> None:
    """Round rings of tall cells, nuclei at their foot, around white lumens."""
    _stroma(tissue)
    spacing = tissue.rng.uniform(31, 37) * tissue.zoom
    centers = tissue.places(spacing)
    centers = centers[((centers > -spacing / 2) & (centers < WIDTH + spacing / 2)).all(axis=1)]
    number = len(centers)
    radii, stretch = spacing * tissue.rng.uniform(0.38, 0.46, number), tissue.rng.uniform(1.0, 1.3, number)
    long, short = radii * np.sqrt(stretch), radii / np.sqrt(stretch)
    angles = tissue.rng.uniform(0, math.pi, number)
    distance = np.full_like(tissue.eosin, np.inf)  # to the nearest centre, 1 at the rim
    for (x, y), a, b, angle in zip(centers.tolist(), long.tolist(), short.tolist(), angles.tolist(), strict=True):
        dx, dy = tissue.x - x, tissue.y - y
        along = dx * (math.cos(angle) / a) + dy * (math.sin(angle) / a)
        across = dy * (math.cos(angle) / b) - dx * (math.sin(angle) / b)
        np.minimum(distance, np.hypot(along, across), out=distance)
    distance += 0.05 * tissue.noise(10)
    _fill(tissue, distance < 1, eosin=0.42, hematoxylin=0.2)
    _fill(tissue, distance < tissue.rng.uniform(0.38, 0.5))
    around = np.linspace(0, 2 * math.pi, 18, endpoint=False) + tissue.rng.uniform(0, 1, (number, 1))  # (n, 18)
    along, across = 0.8 * long[:, None] * np.cos(around), 0.8 * short[:, None] * np.sin(around)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    rim = centers[:, None] + np.stack([along * cos - across * sin, along * sin + across * cos], axis=-1)  # (n, 18, 2)
    rim = rim.reshape(-1, 2)
    kept = tissue.within(rim, distance > 0.65)  # not in the lumen of the next gland
    tissue.nuclei(rim[kept], 2.1, slender=1.8, angles=(around + angles[:, None]).reshape(-1)[kept])


def _fused_glands(tissue: Tissue) -> None:
    """Cells around many small crooked lumens, back to back."""
    _stroma(tissue)
    shape = tissue.noise(15)
    tumor = tissue.noise(30) > -0.9
    lumen = tumor & (np.abs(shape) < 0.16) & (tissue.noise(14) > -0.5)
    _fill(tissue, tumor, eosin=0.4, hematoxylin=0.24)
    _fill(tissue, lumen, eosin=0.03)
    tissue.nuclei(tissue.places(5.4, tumor & (np.abs(shape) > 0.36)), 2.3, slender=1.5, shade=0.85, vary=0.3)


def _papillary_fronds(tissue: Tissue) -> None:
    """Long fingers of cells on a thin pink core, in white space."""
    period = tissue.rng.uniform(30, 36)
    across = tissue.v + 3.5 * tissue.noise(34) + period * 10 + tissue.rng.uniform(0, period)
    finger = np.floor(across / period).astype(int)
    distance = np.abs(across % period - period / 2)
    lobes = tissue.rng.uniform(0, 2 * math.pi, finger.max() + 1)[finger]
    width = period * (0.33 + 0.07 * np.sin(tissue.u * 0.42 + lobes))
    tips = tissue.rng.uniform(2, 44, finger.max() + 1)[finger]
    width *= np.sqrt(((tips - tissue.u) / 12).clip(0, 1))
    tissue.eosin[:] = 0.02
    cells = distance < width
    _fill(tissue, cells, eosin=0.42, hematoxylin=0.2)
    _fill(tissue, distance < width - 8.5, eosin=0.5)
    lining = cells & (distance > width - 8.5) & (distance < width - 2.2)
    tissue.nuclei(tissue.places(4.6, lining), 1.9, slender=1.7, shade=0.9)


def _solid_sheets(tissue: Tissue) -> None:
    """Large unlike nuclei everywhere in purple cytoplasm."""
    tissue.eosin[:] = 0.4 + 0.05 * tissue.noise(6)
    tissue.hematoxylin[:] = 0.3
    septum = np.abs(tissue.noise(40)) < 0.05
    _fill(tissue, septum, eosin=0.4)
    tissue.nuclei(tissue.places(tissue.rng.uniform(7.2, 8.2), ~septum), 3.0, slender=1.3, shade=0.85, vary=0.3)


def _scattered_cells(tissue: Tissue) -> None:
    """Single large dark cells of odd forms in stroma."""
    _stroma(tissue, cells=False)
    places = tissue.places(tissue.rng.uniform(13, 16))
    places = places[tissue.rng.random(len(places)) < 0.85]
    number = len(places)
    angles = tissue.rng.uniform(0, math.pi, number)
    for stain, shade in ((tissue.eosin, 0.6), (tissue.hematoxylin, 0.3)):
        size = np.full(number, 5.2 * tissue.zoom)
        tissue.stamp(stain, places, size, 0.8 * size, angles, np.full(number, shade))
    tissue.nuclei(places, 3.1, slender=1.4, angles=angles, shade=1.15, vary=0.25)


def _signet_ring_cells(tissue: Tissue) -> None:
    """Round pale drops in stroma, each with a nucleus pressed flat against its rim."""
    _stroma(tissue, cells=False)
    spacing = tissue.rng.uniform(15, 18) * tissue.zoom
    places = tissue.places(spacing)
    places = places[tissue.rng.random(len(places)) < 0.9]
    number = len(places)
    radii = spacing * tissue.rng.uniform(0.36, 0.46, number)
    drop = np.zeros_like(tissue.eosin)
    tissue.stamp(drop, places, radii, radii, np.zeros(number), np.ones(number))
    rim = (drop > 0) & (drop < 0.75)
    _fill(tissue, drop > 0, eosin=0.06, hematoxylin=0.05)
    _fill(tissue, rim, eosin=0.55, hematoxylin=0.15)
    toward = tissue.rng.uniform(0, 2 * math.pi, number)
    edge = places + 0.92 * radii[:, None] * np.stack([np.cos(toward), np.sin(toward)], axis=-1)
    tissue.nuclei(edge, 2.4, slender=2.6, angles=toward + math.pi / 2, shade=1.1)


def _mucin_pools(tissue: Tissue) -> None:
    """A pale blue pool with streaks, thin pink walls, and a few clusters of cells adrift in it."""
    tissue.eosin[:] = 0.04
    tissue.hematoxylin[:] = 0.17 + 0.06 * tissue.fibers(13, 2.5) + 0.03 * tissue.noise(10)
    wall = np.abs(tissue.noise(44)) < 0.09
    _fill(tissue, wall, eosin=0.5)
    centers = tissue.places(42)
    near = np.zeros_like(tissue.eosin)
    number = len(centers)
    size = tissue.rng.uniform(5, 9, number)
    tissue.stamp(near, centers, 1.4 * size, size, tissue.rng.uniform(0, math.pi, number), np.ones(number))
    cluster = near + 0.15 * tissue.noise(6) > 0.5
    _fill(tissue, cluster, eosin=0.4, hematoxylin=0.28)
    tissue.nuclei(tissue.places(5.5, cluster), 2.1, shade=0.95)


def _fill(tissue: Tissue, where: np.ndarray, *, eosin: float = 0.0, hematoxylin: float = 0.0) -> None:
    tissue.eosin[where] = eosin
    tissue.hematoxylin[where] = hematoxylin


PAINTERS: dict[str, Callable[[Tissue], None]] = {
    "regular glands": _regular_glands,
    "fused glands": _fused_glands,
    "papillary fronds": _papillary_fronds,
    "solid sheets": _solid_sheets,
    "scattered cells": _scattered_cells,
    "signet ring cells": _signet_ring_cells,
    "mucin pools": _mucin_pools,
    "smooth muscle": _muscle,
    "lymphocytes": _lymphocytes,
    "stroma": _stroma,
}
