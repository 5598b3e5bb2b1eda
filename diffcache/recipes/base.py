"""What a recipe is: sites x when x gate x predictor x tokens x branch, the parts that published methods are made of.

A method is a function of a few lines that returns a ``Recipe`` and is decorated with ``@method``, which remembers where
it comes from. ``Recipe.schedule`` turns it into a reuse schedule for the denoiser that a ``Plan`` describes.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ParamSpec

import numpy as np
from numpy.typing import NDArray

from diffcache import predictors
from diffcache.cells import COMPUTE, Cell, Forecast, GateSpec, Online, Partial, View
from diffcache.forecasting import forecast, used
from diffcache.gates import make_gate
from diffcache.guidance import Guidance
from diffcache.profile_record import Profile
from diffcache.recipes.tokens import Tokens
from diffcache.schedule import Row, Schedule, SiteChoice

P = ParamSpec("P")
Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Plan:
    """A denoiser as recipes see it.

    ``steps`` and the sampler's times ``clock``; ``sites`` that need no name to be found. What only a calibration has is
    there when ``diffcache.compile`` makes the plan: the ``profile``, sites made on request (``site``), numbers from
    uncached generations (``measure``), and the error of the result under a schedule (``error``).
    """

    steps: int
    sites: Sequence[SiteChoice] = ()
    clock: tuple[float, ...] = ()
    profile: Profile | None = None
    find: Callable[[Sequence[str]], Sequence[SiteChoice]] | None = None
    measure_with: Callable[..., Mapping[str, Array]] | None = None
    error_of: Callable[[Schedule], float] | None = None
    refusal_of: Callable[[str], str] | None = None
    trajectory_of: Callable[[str], NDArray[np.float32]] | None = None
    tokens_of: Callable[[str], Collection[int]] | None = None

    def site(self, name: str) -> SiteChoice:
        """The site of a name. Raises ValueError where there is none."""
        for site in self.sites:
            if site.name == name:
                return site
        if self.find is not None:
            return self.find([name])[0]
        raise ValueError(f"no site is named '{name}'; the sites here are: {self.known()}")

    def measure(self, names: Sequence[str], how: str, gaps: int = 1, raw: bool = False) -> Mapping[str, Array]:
        """Numbers ``[streams, steps, gaps]`` of each site or probe; NaN where a step has no such earlier one."""
        if self.measure_with is None:
            raise ValueError(f"this recipe measures '{how}' of {list(names)} in calibration; use diffcache.compile")
        return self.measure_with(tuple(names), how, gaps, raw)

    def trajectory(self, name: str) -> NDArray[np.float32]:
        """What history keeps of some tokens of a site over an uncached generation, ``[steps, tokens, channels]``."""
        if self.trajectory_of is None:
            raise ValueError(f"this recipe looks at the values of '{name}' in calibration; use diffcache.compile")
        return self.trajectory_of(name)

    def probe(self, name: str) -> str:
        """The name of a probe, or of what stands for it here; raises ValueError where the denoiser has no such probe.

        Without blocks in a row the first block of all stands for the first blocks.
        """
        if self.find is None or name in ("", "latent"):
            return name
        rowless = not any(site.blocks for site in self.sites)
        found = "first_block" if rowless and name.startswith("blocks[:") else name
        self.find([found])
        return found

    def error(self, schedule: Schedule) -> float:
        if self.error_of is None:
            raise ValueError("this recipe tries schedules out in calibration; use diffcache.compile")
        return self.error_of(schedule)

    def mixes_tokens(self, name: str) -> str:
        """Why a site cannot run on some of its tokens; empty where it can, or where that is not known yet."""
        return self.refusal_of(name) if self.refusal_of is not None else ""

    def tokens(self, name: str) -> Collection[int]:
        """How many tokens the values of a site have in calibration; empty where that is not known yet."""
        return self.tokens_of(name) if self.tokens_of is not None else ()

    def known(self) -> str:
        names = [f"{site.name} ({site.role})" if site.role else site.name for site in self.sites]
        return ", ".join(names) or "none"


@dataclass(frozen=True)
class Predict:
    """The predictor axis: a rule by name (see ``predictors``) with its options.

    ``history`` is the most computed values it reads, by default what its ``order`` needs; ``timed`` hands it the
    sampler's times; ``fitted`` says that it is fitted to the site's Gram matrix. ``probe`` is what a rule from values
    looks at: "latent", the name of a probe or site, or a function from the site to such a name. ``view`` gives parts of
    a value rules of their own, ``{"projection": "low_band", "options": {"cutoff": 0.1}, "inside": {"predictor":
    "reuse"}}``, or is a function that finds such a ``View`` for a site.
    """

    name: str = "reuse"
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    history: int | None = None
    timed: bool = False
    fitted: bool = False
    probe: str | Callable[[SiteChoice], str] = ""
    view: View | Mapping[str, Any] | Callable[[Plan, SiteChoice], View] | None = field(default=None, hash=False)

    def at(self, plan: Plan, site: SiteChoice) -> Predict:
        """The same with what depends on the site found for this one."""
        probe = plan.probe(self.probe(site) if callable(self.probe) else self.probe)
        view = self.view(plan, site) if callable(self.view) else self.view
        if view is not None and self.fitted:
            raise ValueError(f"predictor '{self.name}' is fitted to whole values; a view needs rules by name")
        return replace(self, probe=probe, view=View.of(view) if isinstance(view, Mapping) else view)

    def online(self) -> Online:
        """The cell of a step at which it is known at run time only what is forecast, or from which weights."""
        assert isinstance(self.probe, str)
        assert self.view is None or isinstance(self.view, View)
        rules = () if self.view is None else self.view.inside
        most = [_reads(self.name, self.options), *(_reads(rule["predictor"], rule["options"]) for rule in rules)]
        return Online(self.name, self.history or max(most), self.options, self.timed, self.probe, self.view)

    def cell(self, plan: Plan, site: SiteChoice, made: Sequence[int], step: int, partial: Collection[int] = ()) -> Cell:
        """The cell of a step that is not computed, when it is known which were, and of which some tokens were."""
        if not self.fitted:
            online = self.online()
            return online if self.name in predictors.FROM_VALUES else forecast(online, made, step, plan.clock, partial)
        if plan.profile is None:
            raise ValueError(f"predictor '{self.name}' is fitted in calibration; use diffcache.compile")
        history = list(made[: self.history or 3])
        found = predictors.fitted_weights(self.name, plan.profile.site(site.name).gram, history, step, **self.options)
        return used(history, found)


def _reads(name: str, options: Mapping[str, Any]) -> int:
    """How many computed values a rule reads at most, unless it is told."""
    if name in predictors.FROM_VALUES:
        return predictors.FROM_VALUES[name].newest
    return int(options.get("order", 0 if name == "reuse" else 2)) + 1


Pick = Callable[[Plan], Sequence[SiteChoice]]
When = Callable[[Plan, SiteChoice], Collection[int]]
Gating = GateSpec | Callable[[Plan, SiteChoice], GateSpec]


def first_step(plan: Plan, site: SiteChoice) -> Collection[int]:
    """Only what has no past is computed whatever a gate says."""
    return (0,)


@dataclass(frozen=True, kw_only=True)
class Part:
    """Some sites, the steps at which they are computed in any case, and what happens at the others.

    Without a gate all others are forecast; with one, those that it lets pass. ``check`` picks the site that a gate
    compares which checks forecasts ("verify"): it is computed on the forecast of the part's sites. At the steps that
    ``tokens`` name a few tokens are computed, of the sites that can run on a few.
    """

    sites: Pick
    when: When = first_step
    gate: Gating | None = None
    predictor: Predict = Predict()
    check: Pick | None = None
    tokens: Tokens | None = None

    def rows(self, plan: Plan, title: str) -> list[Row]:
        """Raises ValueError where no site of a part that is about tokens can run on some, or a check has no gate."""
        sites = self.sites(plan)
        refused = {site.name: plan.mixes_tokens(site.name) for site in sites} if self.tokens is not None else {}
        if refused and all(refused.values()):
            raise ValueError(f"{title} finds no site that can run on a few tokens; the first of them: "
                             f"{next(iter(refused.values()))}")  # fmt: skip
        if self.check is None:
            return [self._row(plan, site, title) for site in sites]
        (checked,), spec = self.check(plan), self.gate
        if not isinstance(spec, GateSpec):
            raise ValueError(f"{title} checks '{checked.name}', but by no gate; give the part GateSpec('verify', ...)")
        part = replace(self, gate=replace(spec, options={**spec.options, "probe": checked.name}))
        return [part._row(plan, site, title) for site in (*sites, checked)]

    def _row(self, plan: Plan, site: SiteChoice, title: str) -> Row:
        computed = sorted(set(self.when(plan, site)))
        if not computed or computed[0] != 0 or computed[-1] >= plan.steps:
            raise ValueError(
                f"{title} computes steps {computed} of {plan.steps}; expected step 0 and steps up to {plan.steps - 1}"
            )
        gate = _looking(plan, self.gate(plan, site) if callable(self.gate) else self.gate)
        predictor = self.predictor.at(plan, site)
        partial: Mapping[int, Cell] = {}
        if self.tokens is not None and not plan.mixes_tokens(site.name):
            partial = self.tokens.cells(plan, site, computed, predictor.online())
        made: list[int] = []
        cells: list[Cell] = []
        for step in range(plan.steps):
            if step in computed:
                made.insert(0, step)
                cells.append(COMPUTE)
            elif step in partial:
                made.insert(0, step)
                cells.append(partial[step])
            elif gate is not None:
                cells.append(predictor.online())
            else:
                cells.append(predictor.cell(plan, site, made, step, partial))
        return Row(site.name, site.residual, tuple(cells), gate)


def _looking(plan: Plan, gate: GateSpec | None) -> GateSpec | None:
    """The gate with its probe as this denoiser has it."""
    if gate is None:
        return None
    wanted = make_gate(gate.name, **gate.options).probe
    found = plan.probe(wanted)
    return gate if found == wanted else GateSpec(gate.name, {**gate.options, "probe": found})


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Parts for different sites, and how branches of guidance and samples of a batch go together.

    ``guidance`` says when the unconditional branch is computed and what stands for it else; ``decide`` and ``samples``
    whether branches and samples decide together (see ``Schedule``). ``origin`` is the call that made it.
    """

    parts: tuple[Part, ...] = ()
    origin: str = "recipe"
    guidance: Guidance | Callable[[Plan], Guidance] | None = None
    decide: str = "separate"
    samples: str = "together"

    def each_sample(self) -> Recipe:
        """Every sample of a batch decides for itself, bit for bit as if it were alone; they run one by one for it."""
        return replace(self, samples="alone")

    def schedule(self, plan: Plan) -> Schedule:
        """The schedule for one denoiser. Raises ValueError for a site or a step that does not exist there."""
        rows = [row for part in self.parts for row in part.rows(plan, self.origin)]
        guidance = self.guidance(plan) if callable(self.guidance) else self.guidance
        if not rows and guidance is None:
            raise ValueError(f"{self.origin} finds no site here; the sites are: {plan.known()}")
        saved = {row.site: plan.site(row.site).flops_fraction_saved for row in rows}
        left = 0.0
        for step in range(plan.steps):
            forecast = sum(saved[row.site] * _saves(row.cells[step]) for row in rows)
            branches = 2 if guidance is None or guidance.gate or step in guidance.computed else 1
            left += (1.0 - forecast) * branches / 2 / plan.steps
        return Schedule(
            plan.steps,
            tuple(rows),
            clock=plan.clock,
            origin=self.origin,
            flops_fraction=min(max(left, 1e-6), 1.0),
            guidance=guidance,
            decide=self.decide,
            samples=self.samples,
        )

    def __repr__(self) -> str:
        return self.origin


def _saves(cell: Cell) -> float:
    """The share of a site's work that is surely not done."""
    return 1.0 - cell.share if isinstance(cell, Partial) else float(isinstance(cell, Forecast))


@dataclass(frozen=True)
class Method:
    """Where a recipe comes from: what the page of methods says about it."""

    title: str
    year: int
    category: str
    source: str
    published: str
    make: Callable[..., Recipe]


METHODS: dict[str, Method] = {}
CATEGORIES = ("baseline", "static", "timestep-adaptive", "layer-adaptive", "predictive", "hybrid")


def method(
    title: str, year: int, category: str, source: str = "", published: str = ""
) -> Callable[[Callable[P, Recipe]], Callable[P, Recipe]]:
    """Register a recipe: its paper's name and year, its class in the survey, where to read it, what it reported."""
    assert category in CATEGORIES, category

    def register(make: Callable[P, Recipe]) -> Callable[P, Recipe]:
        @functools.wraps(make)
        def called(*args: P.args, **kwargs: P.kwargs) -> Recipe:
            given = inspect.signature(make).bind(*args, **kwargs).arguments
            text = ", ".join(f"{name}={value!r}" for name, value in given.items())
            return replace(make(*args, **kwargs), origin=f"{make.__name__}({text})")

        METHODS[make.__name__] = Method(title, year, category, source, published, called)
        return called

    return register
