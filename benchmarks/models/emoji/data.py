"""Build the emoji data set: pictures in several styles, their captions, and the split, from packages of npm.

    python -m benchmarks.models.emoji.data

Downloads about 40 MB through `npm pack` the first time and keeps them under `out/`. All pictures are of styles whose
licences are MIT or Apache 2.0; THIRD_PARTY.md names them.
"""

import hashlib
import io
import json
import re
import subprocess
import tarfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

CACHE = Path("out/emoji")
SIDE = 64  # pixels

NAMES = "unicode-emoji-json@0.9.0"
RENDERED = {"fluent 3d": "@lobehub/fluent-emoji-3d@1.1.0"}  # pictures named by code point
DRAWN = {  # SVG named by what they show
    "fluent gradient": "@iconify-json/fluent-emoji@1.2.7",
    "fluent flat": "@iconify-json/fluent-emoji-flat@1.2.6",
    "noto": "@iconify-json/noto@1.2.9",
    "blob": "@iconify-json/noto-v1@1.2.5",
    "firefox": "@iconify-json/fxemoji@1.2.2",
}
STYLES = (*RENDERED, *DRAWN)

COLOURED = "fe0f"  # the code point that asks for a picture instead of a letter
HELD_OUT_CAPTIONS = 0.04  # never seen in any style
HELD_OUT_PAIRS = 0.10  # caption seen in other styles only
KEPT_ASIDE = 0.06  # of the training pairs, where training on a GPU is validated


@dataclass(frozen=True)
class Emoji:
    """Pictures [n, 64, 64, 3] in uint8 on white; for each its caption, its style, its group and its split."""

    pixels: np.ndarray
    captions: list[str]
    styles: list[str]
    groups: list[str]
    splits: list[str]

    def where(
        self,
        *,
        split: str | None = None,
        groups: Collection[str] | None = None,
        styles: Collection[str] | None = None,
        captions: Collection[str] | None = None,
    ) -> "Emoji":
        """The rows of one split ("train", "pair" or "caption"), of these groups, styles and captions."""
        wanted = ((self.groups, groups), (self.styles, styles), (self.captions, captions))
        rows = [
            row
            for row in range(len(self))
            if split in (None, self.splits[row]) and all(these is None or of[row] in these for of, these in wanted)
        ]
        return self.at(rows)

    def at(self, rows: list[int]) -> "Emoji":
        lists = ([values[row] for row in rows] for values in (self.captions, self.styles, self.groups, self.splits))
        return Emoji(self.pixels[rows], *lists)

    def __len__(self) -> int:
        return len(self.captions)


def prompt(caption: str, style: str) -> str:
    """How a picture is asked for: "red apple, noto style"."""
    return f"{caption}, {style} style"


def split_of(caption: str, style: str) -> str:
    """Fixed by the words alone, so that no later change of the data can leak a held-out pair into training."""
    if chance(caption) < HELD_OUT_CAPTIONS:
        return "caption"
    return "pair" if chance(caption + "|" + style) < HELD_OUT_PAIRS else "train"


def kept_aside(one: str, other: str) -> bool:
    """Whether a training pair, of a caption and a style or a motion, is for validation where there is such."""
    return chance(f"{one}|{other}|validation") < KEPT_ASIDE


def chance(words: str) -> float:
    """A number in [0, 1) that depends on nothing but the words."""
    return int.from_bytes(hashlib.sha256(words.encode()).digest()[:6], "big") / 2**48


def load(cache: Path = CACHE) -> Emoji:
    """The data set, built on the first call."""
    path = cache / "emoji.npz"
    if not path.exists():
        build(path)
    with np.load(path) as arrays:
        words = (arrays[name].tolist() for name in ("captions", "styles", "groups"))
        captions, styles, groups = words
        splits = [split_of(*pair) for pair in zip(captions, styles, strict=True)]
        return Emoji(arrays["pixels"], captions, styles, groups, splits)


def build(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [(picture, caption, style, group) for style in STYLES for picture, caption, group in pictures(style, path)]
    pixels, captions, styles, groups = zip(*rows, strict=True)
    np.savez_compressed(path, pixels=np.stack(pixels), captions=captions, styles=styles, groups=groups)


def pictures(style: str, path: Path) -> Iterator[tuple[np.ndarray, str, str]]:
    """Every picture of a style that has a name in Unicode: pixels, caption, group."""
    with tarfile.open(packed(NAMES, path.parent)) as archive:
        known = json.load(member(archive, "package/data-by-emoji.json"))
    known = {emoji: entry for emoji, entry in known.items() if entry["group"] != "Flags"}
    if style in RENDERED:
        with tarfile.open(packed(RENDERED[style], path.parent)) as archive:
            files = {points(name): name for name in archive.getnames() if name.endswith(".webp")}
            for emoji, entry in known.items():
                name = files.get(tuple(f"{ord(c):x}" for c in emoji if f"{ord(c):x}" != COLOURED))
                if name is not None:
                    yield on_white(Image.open(member(archive, name))), caption_of(entry), entry["group"]
        return
    with tarfile.open(packed(DRAWN[style], path.parent)) as archive:
        icons = json.load(member(archive, "package/icons.json"))
    by_name = {squeezed(name): icon for name, icon in icons["icons"].items() if not icon.get("hidden")}
    for entry in known.values():
        icon = by_name.get(squeezed(entry["name"]))
        if icon is not None:
            yield on_white(rendered(icon, icons)), caption_of(entry), entry["group"]


def points(name: str) -> tuple[str, ...]:
    """The code points in a file's name without the one that only asks for colour."""
    return tuple(point.lstrip("0") for point in Path(name).stem.split("-") if point != COLOURED)


def squeezed(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def caption_of(entry: dict[str, str]) -> str:
    return entry["name"].lower().replace("’", "'")


def rendered(icon: dict, icons: dict) -> Image.Image:
    """An SVG of iconify at four times the size, which the reduction to 64 pixels then smooths."""
    import resvg_py

    width = icon.get("width", icons.get("width", icons.get("height", 16)))
    height = icon.get("height", icons.get("height", 16))
    box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
    side = 4 * SIDE
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}" width="{side}" height="{side}">{icon["body"]}</svg>'
    return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg))))


def on_white(picture: Image.Image) -> np.ndarray:
    picture = picture.convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    flat = Image.alpha_composite(white, picture).convert("RGB")
    smooth = Image.Resampling.BOX if flat.width % SIDE == 0 else Image.Resampling.LANCZOS
    return np.asarray(flat.resize((SIDE, SIDE), smooth))


def packed(package: str, folder: Path) -> Path:
    """The tarball of a package, by npm's own client, kept."""
    name = package.removeprefix("@").replace("/", "-").replace("@", "-") + ".tgz"
    if not (folder / name).exists():
        subprocess.run(["npm", "pack", "--silent", "--pack-destination", str(folder), package], check=True)
    return folder / name


def member(archive: tarfile.TarFile, name: str) -> io.BufferedReader:
    file = archive.extractfile(name)
    assert file is not None, name
    return file


if __name__ == "__main__":
    data = load()
    print(f"{len(data)} pictures, {len(set(data.captions))} captions, {len(STYLES)} styles")
    for style in STYLES:
        counts = {split: len(data.where(split=split, styles=(style,))) for split in ("train", "pair", "caption")}
        print(f"  {style:16}", "  ".join(f"{split} {count}" for split, count in counts.items()))
