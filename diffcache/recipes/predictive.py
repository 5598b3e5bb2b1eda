"""Predictive caching: features are forecast from their past instead of repeated."""

from __future__ import annotations

from collections.abc import Sequence

from diffcache.recipes.base import GateSpec, Part, Pick, Plan, Predict, Recipe, method
from diffcache.recipes.picks import every_one, modules, one
from diffcache.recipes.static import at
from diffcache.recipes.timewise import forced
from diffcache.schedule import SiteChoice


def _every(
    interval: int,
    warm_up: int,
    predictor: Predict,
    lite: bool = False,
    site: str = "stack",
    offset: int = -1,
    last: int = 0,
    pick: Pick | None = None,
) -> Recipe:
    """What most of these papers share: warm-up, then every ``interval``-th step, all modules or one site."""
    sites = pick or (one(site) if lite else modules())
    when = at("every", interval=interval, warm_up=warm_up, offset=offset, last=last)
    return Recipe(parts=(Part(sites=sites, when=when, predictor=predictor),))


@method("TaylorSeer", 2025, "predictive", "arXiv 2503.06923", "FLUX 4.99x ImageReward 1.004, DiT 2.77x FID 2.34")
def taylorseer(
    interval: int = 5,
    order: int = 1,
    warm_up: int = 3,
    offset: int = -1,
    last: int = 0,
    roles: Sequence[str] = ("attention", "feedforward"),
) -> Recipe:
    """Every attention and feed-forward output by a Taylor series in the step: ``sum_i D_i k^i / i!``.

    Computed: ``warm_up`` steps, then where ``(s - warm_up - offset) mod interval = 0``, and the ``last`` ones. The
    paper's code counts skipped steps, ``offset=-1``; the hook in diffusers is ``offset=1, roles=("attention",)``.
    """
    pick = None if set(roles) == {"attention", "feedforward"} else every_one(*roles)
    return _every(interval, warm_up, Predict("taylor", {"order": order}), offset=offset, last=last, pick=pick)


@method("TaylorSeer-Lite", 2025, "predictive", "arXiv 2503.06923")
def taylorseer_lite(
    interval: int = 5, order: int = 1, warm_up: int = 3, offset: int = -1, last: int = 0, site: str = "stack"
) -> Recipe:
    """TaylorSeer of the stack's residual alone, or of another site: a fraction of the memory.

    The hook in diffusers is ``offset=1, site="output"``.
    """
    predictor = Predict("taylor", {"order": order})
    return _every(interval, warm_up, predictor, lite=True, site=site, offset=offset, last=last)


@method("Newton", 2025, "predictive", "methods of TaylorSeer's follow-ups")
def newton(interval: int = 5, order: int = 2, warm_up: int = 3) -> Recipe:
    """The polynomial through the last values: exact on that degree at any gaps, where TaylorSeer is not."""
    return _every(interval, warm_up, Predict("newton", {"order": order}), lite=True)


@method("AB-Cache", 2025, "predictive", "arXiv 2504.10540", "3x on FLUX and Hunyuan")
def ab_cache(interval: int = 6, order: int = 2, warm_up: int = 2) -> Recipe:
    """The output by the Adams-Bashforth weights of the last computed ones, whatever the distance."""
    return _every(interval, warm_up, Predict("adams_bashforth", {"order": order}), lite=True, site="output")


@method("HiCache", 2025, "predictive", "arXiv 2508.16984", "FLUX 5.55x ImageReward .998")
def hicache(interval: int = 6, order: int = 2, sigma: float = 0.5, warm_up: int = 3) -> Recipe:
    """TaylorSeer with scaled Hermite polynomials in place of powers."""
    return _every(interval, warm_up, Predict("hermite", {"order": order, "sigma": sigma}))


@method("HiCache++ (DMD)", 2026, "predictive", "hicache-plus-plus", "FLUX 3.14x LPIPS .378")
def hicache_modes(interval: int = 2, warm_up: int = 3) -> Recipe:
    """The stack's residual as a sum of modes ``c_i lambda_i^s`` found in its last four to six values."""
    return _every(interval, warm_up, Predict("modes", history=6), lite=True)


@method("FoCa", 2025, "predictive", "arXiv 2508.16211", "FLUX 5.50x, Hunyuan 6.45x")
def foca(interval: int = 5, warm_up: int = 3, heun: bool = False) -> Recipe:
    """One BDF2 step of the features' equation; with ``heun`` the reading that corrects it by Heun's rule."""
    return _every(interval, warm_up, Predict("foca", {"heun": heun}, history=3))


@method("Spectrum", 2026, "predictive", "CVPR 2026", "FLUX 3.47x LPIPS .217, Wan 3.40x")
def spectrum(
    warm_up: int = 5, window: float = 2.0, growth: float = 0.75, degree: int = 4, ridge: float = 0.1
) -> Recipe:
    """Chebyshev polynomials fitted by ridge regression to all computed outputs, in windows that grow.

    Its weights are made to sum to one (``centred``), so that a value that does not change is reproduced.
    """
    predictor = Predict("spectrum", {"degree": degree, "ridge": ridge}, history=6)
    when = at("growing", warm_up=warm_up, window=window, growth=growth)
    return Recipe(parts=(Part(sites=one("stack"), when=when, predictor=predictor),))


@method("ResilPhase", 2026, "predictive", "arXiv 2606.26769")
def resilphase(interval: int = 6, warm_up: int = 3, order: int = 1, alpha: float = 0.55) -> Recipe:
    """Barycentric extrapolation of the stack's residual on a clock that tanh compresses."""
    return _every(interval, warm_up, Predict("barycentric", {"order": order, "alpha": alpha}), lite=True)


@method("L2P", 2026, "predictive", "arXiv 2604.26365", "FLUX 4.55x, Qwen-Image 5.59x")
def l2p(interval: int = 5, warm_up: int = 3, history: int = 6) -> Recipe:
    """Weights solved in closed form for the steps that this schedule computes, on the calibration's Gram matrix."""
    return _every(interval, warm_up, Predict("l2p", history=history, fitted=True), lite=True)


@method("ScalingCache", 2025, "predictive", "ICLR 2026", "Wan 2.5x PSNR 26.6, FLUX 3.0x LPIPS .131")
def scalingcache(warm_up: int = 14, scale: float = 1.0, interval: int = 0) -> Recipe:
    """``y_0 + alpha_s k (y_0 - y_1) / n`` with alpha fitted in calibration for every step and module.

    The steps are ``interval``-spaced after the warm-up; 0 takes the gate that adds up the modules' changes, and then
    the slope is TaylorSeer's, since alpha depends on which steps were computed.
    """
    if interval:
        return _every(interval, warm_up, Predict("scaling", history=2, fitted=True))
    gate = GateSpec("accumulated_drift", {"warm_up": warm_up, "scale": scale})
    taylor = Predict("taylor", {"order": 1})
    return Recipe(parts=(Part(sites=modules(), when=forced(warm_up), gate=gate, predictor=taylor),))


@method("RFC", 2025, "predictive", "arXiv 2602.19506", "FLUX 13.8 computed of 50, Hunyuan 9 of 50")
def rfc(threshold: float = 0.3, warm_up: int = 3, order: int = 1, lite: bool = False) -> Recipe:
    """The direction of TaylorSeer, as far as the module's own input has moved: ``O_0 + s |I - I_0| D / |D|``.

    ``s = |O_0 - O_1| / |I_0 - I_1|``; computed again when the forecast errors of the stack's input add up to a
    threshold. ``lite`` forecasts the stack alone.
    """

    def own_input(site: SiteChoice) -> str:
        _, _, path = site.name.partition(":")
        return "stack_input" if lite or not path else f"input:{path}"

    gate = GateSpec("input_error", {"threshold": threshold, "probe": "stack_input"})
    predictor = Predict("relation", {"order": order}, history=order + 1, probe=own_input)
    sites = one("stack") if lite else modules()
    return Recipe(parts=(Part(sites=sites, when=forced(warm_up), gate=gate, predictor=predictor),))


@method("VDE", 2026, "predictive", "arXiv 2605.23381", "Qwen-Image 2.04x PSNR 28.6, Wan 2.08x")
def vde(stable: int = 6, interval: int = 3) -> Recipe:
    """``v = a z + b |z| u``: a and b on straight lines in time, the direction u kept. The last step is computed."""

    def when(plan: Plan, site: SiteChoice) -> Sequence[int]:
        return sorted({*range(min(stable, plan.steps)), *range(stable, plan.steps, interval), plan.steps - 1})

    predictor = Predict("decomposed", history=2, probe="latent", timed=True)
    return Recipe(parts=(Part(sites=one("output"), when=when, predictor=predictor),))


@method("SpeCa", 2025, "hybrid", "arXiv 2509.11628", "FLUX 6.34x, DiT 7.3x, Hunyuan 6.1x")
def speca(
    threshold: float = 0.3,
    decay: float = 0.5,
    floor: float = 0.1,
    order: int = 2,
    warm_up: int = 3,
    unchecked: int = 1,
    longest: int = 8,
) -> Recipe:
    """Forecast all blocks but the last by TaylorSeer, run the last on it, and accept if it gives its own forecast.

    ``mean(|pred - true| / |true|) <= max(threshold * decay^(s / S), floor)``; a refused step is completed, and only the
    last block runs again. The first ``unchecked`` forecasts in a row pass as they are, ``longest`` is the most.
    """
    options = {"threshold": threshold, "decay": decay, "floor": floor, "unchecked": unchecked, "longest": longest}
    part = Part(
        sites=one("blocks[:-1]"),
        check=one("blocks[-1:]"),
        when=forced(warm_up),
        gate=GateSpec("verify", options),
        predictor=Predict("taylor", {"order": order}),
    )
    return Recipe(parts=(part,))


@method("TAP", 2026, "hybrid", "CVPR 2026", "FLUX 6.24x ImageReward .99, Qwen-Image 3.57x")
def tap(interval: int = 5, warm_up: int = 3, max_order: int = 2, shifts: int = 4) -> Recipe:
    """Each token takes the Taylor order and horizon that would have forecast its modulated input best at this step."""
    predictor = Predict("token_choice", {"max_order": max_order, "shifts": shifts}, probe="modulated")
    return _every(interval, warm_up, predictor, lite=True)


@method("WorldCache", 2026, "hybrid", "ICML 2026", "Voyager 3.65x, Aether 1.68x")
def worldcache(interval: int = 3, warm_up: int = 3, low: float = 0.2, high: float = 0.8) -> Recipe:
    """Tokens that hardly bend are reused, the middle ones go on straight, the most curved with a damped velocity.

    The paper's gate adds up the curvature of the last group; here the interval is fixed.
    """
    predictor = Predict("curvature", {"low": low, "high": high, "max_skips": max(2, interval - 1)})
    return _every(interval, warm_up, predictor, lite=True, site="output")


@method("GOC", 2025, "predictive", "arXiv 2503.05156", "FORA + 12 % fidelity")
def goc(interval: int = 2, eta: float = 1.2) -> Recipe:
    """FORA whose kept modules go on by ``eta`` times their last difference."""
    return _every(interval, 2, Predict("goc", {"eta": eta}, history=2))


@method("TaoCache", 2025, "predictive", "arXiv 2508.08978")
def taocache(start: float = 0.5, interval: int = 3) -> Recipe:
    """The output's differences go on with the length and the angle that calibration measured, in late steps only."""

    def late(plan: Plan, site: SiteChoice) -> Sequence[int]:
        edge = max(2, round(start * plan.steps))
        return sorted({*range(edge), *range(edge, plan.steps, interval)})

    return Recipe(parts=(Part(sites=one("output"), when=late, predictor=Predict("tao", history=3, fitted=True)),))
