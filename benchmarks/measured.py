"""What ``benchmarks.methods`` measured, as tables for the page of methods and as a picture.

    python -m benchmarks.measured                     # draws docs/methods.png

Everything is compared at equal cost: beside a row stands the best PSNR that the search of ``diffcache.compile`` reached
with no more FLOPs than that row, and how many decibels lie between. Nothing is interpolated.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.method_settings import SETTINGS
from diffcache.recipes import METHODS

RESULTS = Path(__file__).parent / "results" / "methods.json"
FIGURE = Path(__file__).resolve().parents[1] / "docs" / "methods.png"
MODELS = ("emoji-mmdit", "emoji-unet", "emoji-video")
OURS, STEPS = "Speedup", "fewer steps"
EXACT = 0.999  # from this share of FLOPs on nothing was reused
MOST = 70.0  # dB at the top of the picture: nobody sees more
COLOURS = {
    "baseline": "#8a949e",
    "static": "#3b82c4",
    "timestep-adaptive": "#1d9a6c",
    "layer-adaptive": "#a25bc4",
    "predictive": "#e08a1e",
    "hybrid": "#d6455d",
}
INK = "#1b2733"

Row = dict[str, Any]


def rows() -> list[Row]:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else []


def at_no_more(found: Iterable[Row], way: str, model: str, flops: float) -> Row | None:
    """The best row of a way that costs no more than this share of FLOPs."""
    fitting = [row for row in found if (row["model"], row["way"]) == (model, way) and row["flops"] <= flops + 1e-3]
    return max(fitting, key=lambda row: row["psnr"], default=None)


def of_recipes(found: Iterable[Row], model: str) -> list[Row]:
    """Rows of recipes that reused something, cheapest first."""
    kept = [row for row in found if row["model"] == model and row["way"] in METHODS and row.get("flops", 1) < EXACT]
    return sorted(kept, key=lambda row: row["flops"])


def standing(found: Sequence[Row], model: str) -> tuple[int, int, list[str]]:
    """Recipes' rows that ours can be compared with, those that it beats, and the ways that are nearer somewhere."""
    compared, beaten, nearer = 0, 0, {}
    for row in of_recipes(found, model):
        ours = at_no_more(found, OURS, model, row["flops"])
        if ours is None:
            continue
        compared += 1
        if ours["psnr"] >= row["psnr"]:
            beaten += 1
        else:
            nearer[row["way"]] = None
    return compared, beaten, list(nearer)


def middle(found: Iterable[Row], way: str, model: str) -> Row | None:
    """The row of a recipe's first setting."""
    wanted = json.dumps(SETTINGS.get(way, [{}])[0])
    return next((r for r in found if (r["model"], r["way"], json.dumps(r["setting"])) == (model, way, wanted)), None)


def in_short(row: Row | None) -> str:
    """FLOPs left, speed-up and PSNR, or why there are none."""
    if row is None:
        return ""
    if "refused" in row:
        return "refused"
    return f"{100 * row['flops']:.0f} %, {row['time']:.2f}x, {decibels(row['psnr'])}"


def decibels(value: float) -> str:
    return "exact" if math.isinf(value) else f"{value:.1f} dB"


HEAD = ("way", "setting", "FLOPs left", "time", "PSNR", "relative L2", "MB kept", "ours at no more FLOPs", "apart")


def lines(found: Sequence[Row], model: str) -> list[list[str]]:
    """One line for every row of a model that was not refused, cheapest first."""
    made = []
    for row in sorted((r for r in found if r["model"] == model and "flops" in r), key=lambda row: row["flops"]):
        setting = ", ".join(f"{name}={value}" for name, value in row["setting"].items()) or "defaults"
        memory = f"{row['megabytes']:.2f}" if "megabytes" in row else "-"
        line = [row["way"], setting, f"{100 * row['flops']:.0f} %", f"{row['time']:.2f}x", decibels(row["psnr"])]
        line += [f"{row['relative_l2']:.4f}", memory]
        ours = None if row["way"] == OURS else at_no_more(found, OURS, model, row["flops"])
        if row["flops"] >= EXACT:
            line += ["nothing passes", ""]
        elif ours is None:
            line += ["-", "-"]
        else:
            line += [decibels(ours["psnr"]), f"{ours['psnr'] - row['psnr']:+.1f}"]
        made.append(line)
    return made


def refusals(found: Iterable[Row], model: str) -> list[str]:
    """Recipes that a model refused, and what was said."""
    said = {row["way"]: row["refused"] for row in found if row["model"] == model and "refused" in row}
    return [f"- `{way}`: {reason.partition(';')[0].strip()}" for way, reason in said.items()]


def draw(found: Sequence[Row], path: Path) -> None:
    """PSNR over FLOPs left, a panel for each model: recipes as dots, ours and fewer steps as lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = [model for model in MODELS if of_recipes(found, model)]
    figure, panels = plt.subplots(1, len(shown), figsize=(5.2 * len(shown), 4.6), squeeze=False, sharey=True)
    for panel, model in zip(panels[0], shown, strict=True):
        for row in of_recipes(found, model):
            colour = COLOURS[METHODS[row["way"]].category]
            panel.scatter(100 * row["flops"], min(row["psnr"], MOST), s=22, color=colour, alpha=0.8, linewidths=0)
        for way, colour, style in ((STEPS, INK, "--"), (OURS, INK, "-")):
            line = sorted((100 * r["flops"], min(r["psnr"], MOST)) for r in found
                          if (r["model"], r["way"]) == (model, way) and "flops" in r)  # fmt: skip
            xs, ys = [x for x, _ in line], [y for _, y in line]
            panel.plot(xs, ys, style, color=colour, lw=2.2 if way == OURS else 1.4, marker="o", ms=4)
        panel.set_title(model, loc="left", fontsize=11, color=INK)
        panel.set_xlabel("FLOPs left, %")
        panel.grid(alpha=0.2)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel(f"PSNR to the uncached result, dB (at most {MOST:.0f})")
    dots = [plt.Line2D([], [], marker="o", ls="", color=colour, ms=5, label=name) for name, colour in COLOURS.items()]
    both = [plt.Line2D([], [], color=INK, lw=2.2, marker="o", ms=4, label="diffcache, Speedup(...)"),
            plt.Line2D([], [], color=INK, lw=1.4, ls="--", marker="o", ms=4, label="fewer steps")]  # fmt: skip
    figure.legend(handles=[*both, *dots], loc="lower center", ncol=8, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FIGURE)
    found = rows()
    for model in MODELS:
        compared, beaten, nearer = standing(found, model)
        print(f"{model}: ours is nearer than {beaten} of {compared} rows at no more FLOPs; not than {nearer}")
    draw(found, parser.parse_args().out)


if __name__ == "__main__":
    main()
