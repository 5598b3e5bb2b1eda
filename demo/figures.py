"""The demo's pictures: what came out, the schedule, and how similar neighbouring steps are."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.colors import ListedColormap
from numpy.typing import NDArray

from diffcache.schedule import Schedule

INK, MUTED = "#1b2733", "#7a8794"
KINDS = {"C": "#1f4e79", "r": "#f2b134", "f": "#7fb2d9", ".": "#eef1f4"}
LABELS = {"C": "computed", "r": "reused", "f": "forecast", ".": "skipped"}


def picture_grid(
    uncached: NDArray[np.float64], cached: NDArray[np.float64], prompts: list[str], title: str, file: Path
) -> None:
    """Rows uncached / cached / difference x 8, one column for each picture; images are [N, H, W, 3] in 0..1."""
    count = len(prompts)
    figure, axes = plt.subplots(3, count, figsize=(1.15 * count + 0.9, 4.3), layout="constrained")
    rows = (uncached, cached, 8 * np.abs(cached - uncached).mean(axis=-1))
    for row, (images, label) in enumerate(zip(rows, ("uncached", "diffcache", "difference x 8"), strict=True)):
        for column in range(count):
            axis = axes[row, column]
            axis.imshow(images[column], cmap="magma", vmin=0, vmax=1, interpolation="bicubic" if row < 2 else "nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            if row == 0:
                axis.set_title(_wrapped(prompts[column]), fontsize=8, color=INK)
        axes[row, 0].set_ylabel(label, fontsize=9, color=INK)
    figure.suptitle(title, fontsize=10, color=INK)
    _save(figure, file)


def _wrapped(prompt: str) -> str:
    words = prompt.split()
    half = (len(words) + 1) // 2
    return " ".join(words[:half]) + "\n" + " ".join(words[half:])


def schedule_grid(schedule: Schedule, file: Path) -> None:
    """Sites x steps, one colour for each kind of cell."""
    order = "".join(KINDS)
    cells = [
        [order.index(schedule.structure(step).kinds[row]) for step in range(schedule.steps)]
        for row in range(len(schedule.rows))
    ]
    height = 1.5 + 0.3 * len(schedule.rows)
    figure, axis = plt.subplots(figsize=(8.5, height), layout="constrained")
    axis.imshow(cells, cmap=ListedColormap(list(KINDS.values())), vmin=-0.5, vmax=len(KINDS) - 0.5, aspect="auto")
    axis.set_yticks(range(len(schedule.rows)), [_short(row.site) for row in schedule.rows], fontsize=8)
    axis.set_xticks(range(0, schedule.steps, 2))
    axis.set_xticks(np.arange(-0.5, schedule.steps), minor=True)
    axis.set_yticks(np.arange(-0.5, len(schedule.rows)), minor=True)
    axis.grid(which="minor", color="white", linewidth=2)
    axis.tick_params(which="both", length=0, labelsize=8, colors=INK)
    axis.spines[:].set_visible(False)
    axis.set_xlabel("denoising step", fontsize=9, color=INK)
    axis.set_title(
        f"Reuse schedule: {len(schedule.computed_steps())} of {schedule.steps} steps computed in full, "
        f"{100 * schedule.flops_fraction:.0f} % of the FLOPs", fontsize=10, color=INK, loc="left",
    )  # fmt: skip
    used = sorted({cell for row in cells for cell in row})
    handles = [plt.Rectangle((0, 0), 1, 1, color=list(KINDS.values())[k]) for k in used]
    figure.legend(
        handles,
        [list(LABELS.values())[k] for k in used],
        ncols=4,
        fontsize=8,
        frameon=False,
        loc="outside lower center",
    )
    _save(figure, file)


def _short(name: str) -> str:
    return name if len(name) <= 34 else name[:15] + "..." + name[-16:]


def similarity_map(matrices: dict[str, NDArray[np.float64]], file: Path) -> None:
    """Relative L2 change of each site's value between any two steps (dark: nearly the same)."""
    figure, axes = plt.subplots(
        1, len(matrices), figsize=(3.4 * len(matrices) + 0.8, 3.5), layout="constrained", squeeze=False
    )
    top = max(float(m.max()) for m in matrices.values())
    for axis, (name, matrix) in zip(axes[0], matrices.items(), strict=True):
        shown = axis.imshow(matrix, cmap="viridis", vmin=0, vmax=min(top, 1.5), origin="lower")
        axis.set_title(_short(name), fontsize=8, color=INK)
        axis.set_xlabel("step", fontsize=8, color=INK)
        axis.tick_params(labelsize=7, colors=INK)
    axes[0, 0].set_ylabel("step", fontsize=8, color=INK)
    bar = figure.colorbar(shown, ax=axes[0].tolist(), shrink=0.9)
    bar.set_label("relative L2 change", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    figure.suptitle("How much a site's value changes between two steps", fontsize=10, color=INK)
    _save(figure, file)


def _save(figure: plt.Figure, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
    plt.close(figure)
