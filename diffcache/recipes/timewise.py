"""Timestep-adaptive caching: one number a step decides whether the whole stack runs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from diffcache import planners
from diffcache.planning_tables import resample_by_nearest
from diffcache.published_coefficients import COEFFICIENTS
from diffcache.recipes.base import GateSpec, Part, Plan, Predict, Recipe, When, method
from diffcache.recipes.picks import one, requested
from diffcache.schedule import SiteChoice


def forced(first: int = 1, last: int = 0, interval: int = 1) -> When:
    """The first and last steps are computed whatever a gate says; of the first every ``interval``-th."""
    return lambda plan, site: sorted(
        {*range(0, min(first, plan.steps), interval), *range(plan.steps - last, plan.steps)}
    )


@method("TeaCache", 2024, "timestep-adaptive", "arXiv 2411.19108", "Open-Sora-Plan 4.41x, FLUX 2x")
def teacache(
    threshold: float = 0.2, coefficients: str | Sequence[float] | None = None, probe: str = "modulated"
) -> Recipe:
    """The stack's residual is reused while ``sum p(d) < threshold``.

    d is the relative L1 change of the first block's modulated input since the step before, p a polynomial of degree 4
    that maps it to the change of the stack's output. Calibration fits p to this denoiser; a name takes a published one
    (see ``published_coefficients``). The first and the last step are computed.
    """

    def gate(plan: Plan, site: SiteChoice) -> GateSpec:
        chosen = COEFFICIENTS[coefficients] if isinstance(coefficients, str) else coefficients
        fitted = fitted_polynomial(plan, probe, site) if chosen is None else tuple(chosen)
        return GateSpec("polynomial", {"threshold": threshold, "coefficients": list(fitted), "probe": probe})

    return Recipe(parts=(Part(sites=one("stack"), when=forced(1, 1), gate=gate),))


def fitted_polynomial(plan: Plan, probe: str, site: SiteChoice, degree: int = 4) -> Sequence[float]:
    """Least squares from the probe's change to that of the site's value, over all steps of all calibration prompts."""
    change = plan.measure([probe], "l1")[probe][:, 1:, 0].ravel()
    output = plan.measure([site.name], "l1", raw=True)[site.name][:, 1:, 0].ravel()
    fitted = np.polyfit(change, output, min(degree, max(1, len(change) // 4)))
    return [float(value) for value in fitted]


@method("MagCache", 2025, "timestep-adaptive", "arXiv 2506.09045", "FLUX 2.8x, Wan 2.5x, Hunyuan 2.7x")
def magcache(
    threshold: float = 0.12, max_skips: int = 4, retention: float = 0.2, ratios: Sequence[float] | None = None
) -> Recipe:
    """What all blocks add is reused while the product of its magnitude ratios stays near one.

    ``rho *= gamma_s, E += |1 - rho|``, reuse while ``E <= threshold`` for at most ``max_skips`` steps, after the first
    ``floor(retention steps)`` (diffusers rounds). ``gamma_s`` is the mean over tokens of ``|r_s| / |r_{s-1}|``, one at
    step 0: measured in calibration, or given as ``ratios``. Nothing is left to decide at run time.
    """

    def computed(plan: Plan, site: SiteChoice) -> Sequence[int]:
        found = ratios
        if found is None:
            measured = plan.measure([site.name], "norm_ratio")[site.name][:, :, 0]
            found = [1.0, *np.mean(measured[:, 1:], axis=0)]
        values = resample_by_nearest(found, plan.steps)
        return planners.mag_cache(values, threshold=threshold, max_skips=max_skips, retention=retention)

    return Recipe(parts=(Part(sites=one("stack0"), when=computed),))


@method("EasyCache", 2025, "timestep-adaptive", "arXiv 2507.02860", "Hunyuan 2.2x PSNR 32.7, Wan 2.5x")
def easycache(threshold: float = 0.05, warm_up: int = 5) -> Recipe:
    """``v = x + (v - x)`` of the last computed step, while ``sum k |x_s - x_{s-1}| / |v|`` stays below a threshold.

    The rate k is measured as it runs; the first ``warm_up`` steps and the last are computed. The branch that is called
    first decides for both.
    """
    gate = GateSpec("transform_rate", {"threshold": threshold})
    site = requested("output-latent", "output")
    return Recipe(parts=(Part(sites=site, when=forced(warm_up, 1), gate=gate),))


@method("SeaCache", 2026, "timestep-adaptive", "arXiv 2602.18993", "FLUX 2.2x PSNR 26.3")
def seacache(threshold: float = 0.3, power: float = 2.0, probe: str = "modulated") -> Recipe:
    """TeaCache without a fit, on a probe that a Wiener filter has cleaned of the noise of its step."""
    gate = GateSpec("spectral", {"threshold": threshold, "power": power, "probe": probe})
    return Recipe(parts=(Part(sites=one("stack"), when=forced(1, 1), gate=gate),))


@method("SenCache", 2026, "timestep-adaptive", "arXiv 2602.24208", "Wan 21 of 50 computed PSNR 29.1")
def sencache(early: float = 0.01, main: float = 0.1, share: float = 0.2, max_skips: int = 3) -> Recipe:
    """Reuse while the output has moved little to first order: ``a |x_s - x_0|_2 + b |t_s - t_0| <= limit``.

    a and b, the change of the output with the latent and with time at every step, are measured in calibration by finite
    differences and relative to the output's length. The limit is ``early`` in the first ``share`` of the steps.
    """

    def gate(plan: Plan, site: SiteChoice) -> GateSpec:
        found = plan.measure(["latent", "timestep"], "derivative")
        by_latent, by_time = (np.mean(found[name][:, :, 0], axis=0).tolist() for name in ("latent", "timestep"))
        edge = round(share * plan.steps)
        limits = [early] * edge + [main] * (plan.steps - edge)
        tables = {"by_latent": by_latent, "by_time": by_time, "limits": limits}
        return GateSpec("sensitivity", {**tables, "max_since": max_skips})

    return Recipe(parts=(Part(sites=one("stack"), when=forced(1), gate=gate),))


@method("AdaptiveDiffusion", 2024, "timestep-adaptive", "arXiv 2410.09873", "2 to 5x")
def adaptive_diffusion(theta: float = 0.01, max_skips: int = 4) -> Recipe:
    """The output is reused while the latent's third-order difference stays below ``theta`` of its step."""
    gate = GateSpec("third_difference", {"theta": theta, "max_since": max_skips})
    return Recipe(parts=(Part(sites=one("output"), when=forced(3), gate=gate),))


@method("DiCache", 2025, "timestep-adaptive", "arXiv 2508.17356", "Hunyuan 2.34x PSNR 32.8")
def dicache(threshold: float = 0.2, probe_depth: int = 1, retention: float = 0.2, high: float = 1.5) -> Recipe:
    """Run the first blocks; while their change adds up to less than a threshold, follow the trend that they show.

    ``r = r_1 + gamma (r_0 - r_1)``, ``gamma = clip(|p - p_1| / |p_0 - p_1|, 1, high)``, p the first blocks' residual.
    """
    probe = f"blocks[:{probe_depth}]"
    gate = GateSpec("accumulated_change", {"threshold": threshold, "probe": probe})
    predictor = Predict("trend", {"high": high}, history=2, probe=probe)

    def early(plan: Plan, site: SiteChoice) -> Sequence[int]:
        return range(max(1, round(retention * plan.steps)))

    return Recipe(parts=(Part(sites=one("stack"), when=early, gate=gate, predictor=predictor),))


@method("FastCache", 2025, "timestep-adaptive", "arXiv 2505.20353")
def fastcache(scale: float = 0.01) -> Recipe:
    """The stack is reused while its input's squared change passes a chi-square test. The learned map is left out."""
    return Recipe(parts=(Part(sites=one("stack"), gate=GateSpec("chi_square", {"scale": scale})),))
