"""Sites and probes of a captured denoiser by name; each variant is taken apart once."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

from diffcache.anatomy import Anatomy
from diffcache.cost import Cost, measure_cost
from diffcache.probes import find_probes
from diffcache.ranges import is_requested
from diffcache.sites import Site, all_sites, named_site
from diffcache.tracing.captured import Captured
from diffcache.tracing.session import Bound, unbind
from diffcache.tracing.variant import Variant


class Parts:
    """One variant taken apart."""

    def __init__(self, variant: Variant, cost: Cost):
        self.cost = cost
        self.anatomy = Anatomy(variant.graph_module, variant.trace.calls, cost)
        self.sites = all_sites(self.anatomy)
        self._named = {site.name: site for site in self.sites}

    def named(self, name: str) -> Site:
        """The site or probe of a name, made on request where it has to be. Raises ValueError where there is none."""
        if name not in self._named:
            if is_requested(name):
                self._named[name] = named_site(self.anatomy, name, self.sites)
            else:  # probes that share a name with a site are the site
                self._named = {**find_probes(self.anatomy), **self._named}
        if name not in self._named:
            named_site(self.anatomy, name, self.sites)  # says what there is
        return self._named[name]


class SiteFinder:
    """Sites and probes of each variant of a captured denoiser."""

    def __init__(self, captured: Captured):
        self.captured = captured
        self._found: dict[int, Parts] = {}

    def parts(self, variant: Variant, bound: Bound) -> Parts:
        found = self._found.get(id(variant))
        if found is None:
            args, kwargs = unbind(self.captured.signature, bound)
            cost = measure_cost(variant.graph_module, args, kwargs)
            found = self._found[id(variant)] = Parts(variant, cost)
        return found

    def all(self, variant: Variant, bound: Bound) -> tuple[Cost, list[Site]]:
        """The cost of a variant, and the sites that need no name to be found."""
        parts = self.parts(variant, bound)
        return parts.cost, parts.sites

    def first(self, name: str) -> Site:
        """The site or probe of a name in the first variant that was taken apart. Raises ValueError for none."""
        return next(iter(self._found.values())).named(name)

    def flops_by_node(self) -> Mapping[str, float]:
        """FLOPs of every node of the first variant that was taken apart."""
        return next(iter(self._found.values())).cost.flops

    def everywhere(self) -> list[Site]:
        """The sites that all variants so far have, as the first has them."""
        first, *others = self._found.values()
        return [site for site in first.sites if all(site.name in {s.name for s in part.sites} for part in others)]

    def __call__(self, variant: Variant, bound: Bound, names: Sequence[str]) -> Sequence[Site]:
        """Those that this variant has, in the order of the names and under them."""
        parts, found = self.parts(variant, bound), []
        for name in names:
            with contextlib.suppress(ValueError):
                found.append(replace(parts.named(name), name=name))
        return found

    def flops(self, variant: Variant, bound: Bound) -> Mapping[str, float]:
        """FLOPs of every node."""
        return self.parts(variant, bound).cost.flops
