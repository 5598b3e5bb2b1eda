"""The site axis of recipes: which sites of a denoiser a part is about. Nothing here knows a model."""

from __future__ import annotations

from collections.abc import Sequence

from diffcache.recipes.base import Pick, Plan
from diffcache.schedule import SiteChoice

# A denoiser without repeated blocks in a row (a U-Net) has no stack; its deep features are what published rules cache.
INSTEAD = {"stack": ("stack", "deepest", "output"), "stack0": ("stack0", "stack", "deepest", "output")}


def one(wanted: str) -> Pick:
    """A site by its name or its role ("stack", "output", "deepest"), or what stands for that role here."""

    def pick(plan: Plan) -> Sequence[SiteChoice]:
        for role in (wanted, *INSTEAD.get(wanted, ())):
            for site in plan.sites:
                if role in (site.name, site.role):
                    return [site]
        if plan.find is not None and wanted not in INSTEAD:
            return plan.find([wanted])
        raise ValueError(f"no site is named '{wanted}' or has that role; the sites and roles here are: {plan.known()}")

    return pick


def requested(name: str, instead: str = "") -> Pick:
    """A site that is made on request (``blocks[8:-2]``, ``prefix[5]``, ``deep[0]``, ``encoder``), or another role.

    The other role stands in only for what the denoiser lacks altogether, blocks in a row or skip connections: a block
    or a skip past the last one is refused.
    """

    def pick(plan: Plan) -> Sequence[SiteChoice]:
        try:
            return [plan.site(name)]
        except ValueError:
            counted = name.startswith(("blocks[", "prefix[")) and _blocks(plan) > 0
            nested = name.startswith(("deep[", "encoder")) and _skips(plan)
            if not instead or counted or nested:
                raise
            return one(instead)(plan)

    return pick


def _blocks(plan: Plan) -> int:
    return max((site.blocks for site in plan.sites), default=0)


def _skips(plan: Plan) -> bool:
    return any(site.role in ("deep", "deepest") and site.depth >= 0 for site in plan.sites)


def blocks_of(plan: Plan) -> int:
    """How many blocks in a row the denoiser has. Raises ValueError for none."""
    count = _blocks(plan)
    if not count:
        raise ValueError(
            f"this recipe splits a row of equal blocks, and this denoiser has none (as U-Nets have none); take one for "
            f"skip connections, such as deepcache. The sites and roles here are: {plan.known()}"
        )
    return count


def between(first: int, last: int | None = None) -> Pick:
    """The residual of blocks ``first`` to ``last - 1``; without blocks in a row, the deepest features."""
    return requested(f"blocks[{first or ''}:{'' if last is None else last}]", "stack0" if first else "stack")


def every_one(*roles: str, kinds: Sequence[str] = (), first: int = 0, last: int | None = None) -> Pick:
    """All sites of some roles in blocks ``first`` to ``last - 1``; of attentions those of some kinds only.

    Of sites within one another, as blocks within the stages of a U-Net, the outermost.
    """

    def pick(plan: Plan) -> Sequence[SiteChoice]:
        found = [site for site in plan.sites if site.role in roles and (not kinds or site.kind in kinds)]
        placed = [s for s in found if s.depth < 0 or s.depth in range(*slice(first, last).indices(s.blocks))]
        chosen = [site for site in placed if not any(_within(site, other) for other in placed)]
        if not chosen:
            what = f"{' or '.join(roles)}{f' of kind {list(kinds)}' if kinds else ''}"
            raise ValueError(f"no site here is of the role {what}; the sites and roles here are: {plan.known()}")
        return chosen

    return pick


def _within(site: SiteChoice, other: SiteChoice) -> bool:
    return site.name.partition(":")[2].startswith(other.name.partition(":")[2] + ".")


def profiled(pick: Pick) -> Pick:
    """Those that do enough of the work to have been profiled."""

    def pick_profiled(plan: Plan) -> Sequence[SiteChoice]:
        if plan.profile is None:
            raise ValueError("this recipe plans on what calibration measures; use diffcache.compile")
        known = {site.name for site in plan.profile.sites}
        return [site for site in pick(plan) if site.name in known]

    return pick_profiled


def modules(first: int = 0, last: int | None = None) -> Pick:
    """Every attention and feed-forward, or where there are none the blocks."""

    def pick(plan: Plan) -> Sequence[SiteChoice]:
        for roles in (("attention", "feedforward"), ("block",)):
            if any(site.role in roles for site in plan.sites):
                return every_one(*roles, first=first, last=last)(plan)
        return one("stack")(plan)

    return pick


def if_any(pick: Pick) -> Pick:
    """The same, or nothing where there are no such sites: for methods that treat several kinds apart."""

    def pick_if(plan: Plan) -> Sequence[SiteChoice]:
        try:
            return pick(plan)
        except ValueError:
            return []

    return pick_if
