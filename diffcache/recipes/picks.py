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


def every_one(role: str, *roles: str, kind: str = "", first: int = 0, last: int | None = None) -> Pick:
    """All sites of some roles, in blocks ``first`` to ``last - 1``; of attentions those of a kind only."""

    def pick(plan: Plan) -> Sequence[SiteChoice]:
        found = [site for site in plan.sites if site.role in (role, *roles)]
        if not found:
            raise ValueError(f"no site has a role of {[role, *roles]}; the sites and roles here are: {plan.known()}")
        return found

    return pick
