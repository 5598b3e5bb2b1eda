"""Write ``docs/methods.md``: what every recipe is made of, what was published and what we measure, and what is none.

    python -m benchmarks.methods_page [--check]

The axes are read from the recipe itself, on a stand-in for a denoiser: eight blocks with attention of every kind. What
a recipe asks of calibration is seen from what it asks the stand-in. Figures come from ``results/methods.json``.
"""

from __future__ import annotations

import argparse
import inspect
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import measured
from benchmarks.measured import MODELS, Row
from benchmarks.survey import BEYOND, SURVEY
from diffcache.cells import COMPUTE, GateSpec
from diffcache.memory import plan_memory
from diffcache.profile_record import SiteProfile
from diffcache.recipes import METHODS, Method, Part, Plan, Recipe
from diffcache.schedule import Schedule, SiteChoice

PAGE = Path(__file__).resolve().parents[1] / "docs" / "methods.md"
STEPS, BLOCKS = 50, 8
KINDS = ("self", "cross", "temporal")
# recipes without defaults for all that they need
NEEDED: dict[str, dict[str, Any]] = {"steps": {"computed": (0, 2, 5)}, "published_table": {"name": "meancache-flux-13"}}


class StandIn(Plan):
    """A plan without a denoiser: numbers of smooth made-up trajectories; ``asked`` holds what calibration is asked."""

    def __init__(self) -> None:
        generator = np.random.default_rng(0)
        walk = np.cumsum(np.cumsum(generator.standard_normal((STEPS, 64)), axis=0), axis=0)
        self.gram = walk @ walk.T / walk.shape[1]
        sites = [_site("output", "output"), _site("stack", "stack", True), _site("stack0", "stack0", True)]
        for depth in range(BLOCKS):
            sites.append(_site(f"block:blocks.{depth}", "block", True, depth))
            sites += [_site(f"attn:blocks.{depth}.{kind}", "attention", False, depth, kind) for kind in KINDS]
            sites.append(_site(f"ff:blocks.{depth}.ff", "feedforward", False, depth))
        clock = tuple(1.0 - step / STEPS for step in range(STEPS))
        asked: set[str] = set()
        super().__init__(STEPS, tuple(sites), clock, find=lambda names: [_requested(name) for name in names])
        object.__setattr__(self, "asked", asked)
        object.__setattr__(self, "profile", _Profiled(self.gram, self.sites, asked))

    asked: set[str]

    def measure(self, names: Sequence[str], how: str, gaps: int = 1, raw: bool = False) -> Mapping[str, Any]:
        self.asked.add("changes")
        generator = np.random.default_rng(1)
        shape = (2, STEPS, 5 if how == "pooled" else gaps)
        return {name: 0.1 + 0.02 * generator.random(shape) for name in names}

    def trajectory(self, name: str) -> Any:
        self.asked.add("values")
        return np.cumsum(np.random.default_rng(2).standard_normal((STEPS, 16, 32)), axis=0).astype(np.float32)

    def error(self, schedule: Schedule) -> float:
        self.asked.add("generations")
        return 0.01 * sum((step + 1) * len(cell) for step, cell in _forecasts(schedule))


class _Profiled:
    """Stands for a profile in which all sites have one Gram matrix."""

    def __init__(self, gram: Any, sites: Sequence[SiteChoice], asked: set[str]):
        self.gram, self._sites, self.asked = gram, sites, asked

    def site(self, name: str) -> SiteProfile:
        self.asked.add("Gram matrix")
        return SiteProfile(name, False, 1.0, 1, self.gram[None], np.linspace(2.0, 1.0, STEPS))

    @property
    def sites(self) -> list[SiteProfile]:
        return [SiteProfile(site.name, False, 1.0, 1, self.gram[None], np.ones(STEPS)) for site in self._sites]


def _site(name: str, role: str, residual: bool = False, depth: int = -1, kind: str = "") -> SiteChoice:
    return SiteChoice(name, residual, 0.01, role, depth, BLOCKS, kind)


def _requested(name: str) -> SiteChoice:
    return _site(name, name, name.startswith("blocks["))


def _forecasts(schedule: Schedule) -> list[tuple[int, tuple[int, ...]]]:
    return [
        (step, getattr(cell, "steps", ()))
        for row in schedule.rows
        for step, cell in enumerate(row.cells)
        if hasattr(cell, "steps")
    ]


# -- reading a recipe ------------------------------------------------------------------------------------------------


def read(name: str) -> dict[str, str]:
    """The axes of a recipe as words."""
    plan, recipe = StandIn(), METHODS[name].make(**NEEDED.get(name, {}))
    parts = [(part, list(part.sites(plan))) for part in recipe.parts]
    schedule = recipe.schedule(plan)
    return {
        "sites": _joined(_sites(sites) for _, sites in parts if sites) or "none",
        "when": _joined(_when(plan, part, sites) for part, sites in parts if sites),
        "gate": _joined(_gate(plan, part, sites[0]) for part, sites in parts if sites and part.gate is not None) or "-",
        "predictor": _joined(_predictor(part) for part, sites in parts if sites),
        "tokens": _joined(part.tokens.score for part, _ in parts if getattr(part, "tokens", None) is not None) or "-",
        "branch": _branch(recipe),
        "calibration": ", ".join(sorted(plan.asked)) or "none",
        "memory": _memory(schedule),
    }


def _joined(words: Any) -> str:
    return "; ".join(dict.fromkeys(words))


def _sites(sites: Sequence[SiteChoice]) -> str:
    roles = Counter(f"{site.kind} {site.role}".strip() for site in sites)
    named = {"stack0": "all blocks", "stack": "blocks after the first"}
    return ", ".join(named.get(role, role) if count == 1 else f"every {role}" for role, count in roles.items())


def _when(plan: StandIn, part: Part, sites: Sequence[SiteChoice]) -> str:
    before = set(plan.asked)
    plan.asked.clear()
    part.when(plan, sites[0])
    asked = set(plan.asked)
    plan.asked |= before
    if "changes" in asked:
        return "where changes measured in calibration allow it"
    row = part.rows(plan, "")[0]
    computed = [step for step, cell in enumerate(row.cells) if cell is COMPUTE]
    if part.gate is None:
        chosen = f", chosen by {asked.pop()}" if asked else ""
        return f"{len(computed)} of {STEPS}{chosen}"
    first = next((n for n, step in enumerate(computed) if n != step), len(computed))
    last = len(computed) - first
    return f"first {first}" + (f" and last {last}" if last else "") + ", then the gate"


def _gate(plan: Plan, part: Part, site: SiteChoice) -> str:
    gate = part.gate(plan, site) if callable(part.gate) else part.gate
    assert isinstance(gate, GateSpec)
    return gate.name


def _predictor(part: Part) -> str:
    if type(part) is not Part:
        return "mean velocity"
    predictor = part.predictor
    words = _rule(predictor.name, predictor.options) + (" (fitted)" if predictor.fitted else "")
    if callable(predictor.view):
        return "one of several for each cluster of channels"
    if isinstance(predictor.view, Mapping):
        inside = predictor.view["inside"]
        return f"{words}; {_rule(inside['predictor'], inside.get('options', {}))} in {predictor.view['projection']}"
    return words


def _rule(name: str, options: Mapping[str, Any]) -> str:
    return f"{name} {options['order']}" if "order" in options else name


def _branch(recipe: Recipe) -> str:
    guidance = getattr(recipe, "guidance", None)
    if guidance is not None:
        return getattr(guidance, "rule", "by plan")
    return {"shared": "first decides"}.get(getattr(recipe, "decide", "separate"), "each its own")


def _memory(schedule: Schedule) -> str:
    """The most values of history at one time: those of one site, and of how many sites."""
    entries = plan_memory(schedule, defaultdict(lambda: 1)).entries
    sites = {row.site for row in schedule.rows}
    most = max((count for name, count in entries.items() if name in sites), default=0)
    looked_at = sum(count for name, count in entries.items() if name.startswith("probe "))
    return f"{most} x {len(sites)}" + (f" and {looked_at} of probes" if looked_at else "")


# -- writing -----------------------------------------------------------------------------------------------------------


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    cells = [[str(cell).replace("|", "\\|") for cell in line] for line in (head, ["---"] * len(head), *lines)]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _recipes(found: Sequence[Row]) -> str:
    lines = []
    for name, method in METHODS.items():
        axes = read(name)
        lines.append(
            [f"[`{name}`](#{name})", method.title, str(method.year), method.category]
            + [axes[axis] for axis in ("sites", "when", "gate", "predictor", "tokens", "branch")]
            + [axes["calibration"], axes["memory"], method.published or "-"]
            + [measured.in_short(measured.middle(found, name, model)) for model in MODELS]
        )
    head = ["recipe", "method", "year", "class", "sites", "when", "gate", "predictor", "tokens", "branch",
            "asked of calibration", "entries kept", "published", *MODELS]  # fmt: skip
    return table(head, lines)


def _survey() -> str:
    lines = []
    for number, row in (*SURVEY.items(), *(("", row) for row in BEYOND)):
        ready = [name for name in row.recipes if name in METHODS]
        if ready:
            lines.append([str(number), row.title, ", ".join(f"`{name}`" for name in ready), row.reason or "-", ""])
        else:
            lines.append([str(number), row.title, "none", row.reason, row.nearest])
    return table(["no.", "method", "recipe", "left out, or why there is none", "nearest here"], lines)


def _measured(found: Sequence[Row], model: str) -> str:
    compared, beaten, _ = measured.standing(found, model)
    refused = measured.refusals(found, model)
    text = f"### {model}\n\nOf {compared} rows of recipes, `Speedup` is nearer to the uncached result than {beaten}, "
    text += "at no more FLOPs.\n\n" + table(measured.HEAD, measured.lines(found, model))
    return text + ("\n\nRefused:\n\n" + "\n".join(refused) if refused else "")


def _described(name: str, method: Method) -> str:
    signature = inspect.signature(inspect.unwrap(method.make)).replace(return_annotation=inspect.Signature.empty)
    text = inspect.cleandoc(method.make.__doc__ or "")
    source = f" {method.source}." if method.source else ""
    return f'<a id="{name}"></a>\n### `{name}`\n{method.title}, {method.year}.{source}\n\n`{name}{signature}`\n\n{text}'


def page(found: Sequence[Row]) -> str:
    """The whole page with the figures that were found."""
    sections = "\n\n".join(_measured(found, model) for model in MODELS)
    described = "\n\n".join(_described(name, method) for name, method in METHODS.items())
    return f"""# Published methods as recipes

Written by `python -m benchmarks.methods_page`; do not edit. A recipe is sites x when x gate x predictor x tokens x
branch: `diffcache.compile(pipe, prompts, recipe=diffcache.recipes.teacache(threshold=0.2))`.

Axes are read from the recipe at its defaults, on a stand-in of {BLOCKS} blocks and {STEPS} steps. *When* counts
computed steps, *entries kept* is the most values of history that one site holds times the number of sites.
*Published* is what the source reports, on its own models. The last columns are ours: FLOPs left, speed-up of the
process's time on one CPU thread, and PSNR to the uncached result, on held-out prompts and a held-out seed, over 28
steps at the recipe's middle setting (`benchmarks/method_settings.py`). Empty cells are not measured yet.

## Recipes

{_recipes(found)}

## The survey, row by row

Every method of the survey (arXiv 2510.19755) and its follow-ups: which recipe it is and what that leaves out, or why it
has none.

{_survey()}

## Measured

`python -m benchmarks.methods`: calibrated on pairs that the models were trained on, judged on held-out pairs and
another seed. "Fewer steps" is the same sampler with that many steps, `Speedup` the search of `diffcache.compile`.
Beside each row stands the best that `Speedup` reached with no more FLOPs, and how many decibels lie between.

![PSNR over FLOPs left for every recipe](methods.png)

{sections}

## What each recipe does

{described}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say whether the page is up to date")
    text = page(measured.rows())
    if parser.parse_args().check:
        raise SystemExit(0 if PAGE.read_text() == text else "docs/methods.md is out of date; write it again")
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
