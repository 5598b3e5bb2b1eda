"""The cache hooks of diffusers 0.42: first block, TaylorSeer, MagCache, pyramid attention broadcast, FasterCache.

State is kept per name of ``cache_context`` (first block, TaylorSeer; MagCache falls back to one name "inference"), or
per module whatever the context (PAB, FasterCache). It is cleared by ``_reset_stateful_cache``, which pipelines call at
the end of a successful ``__call__`` and nobody else does; ``reset=True`` here means that we call it first.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from benchmarks.agreement.peers.watching import Run, Watch, observe
from benchmarks.agreement.subjects import Subject


def _in_context(model: nn.Module) -> Callable[[int, str], AbstractContextManager[Any]]:
    """Every call inside a cache context; models without ``CacheMixin`` (DiT) get it set by hand."""
    from diffusers.hooks.hooks import CacheContext, _set_cache_context

    @contextlib.contextmanager
    def context(step: int, branch: str) -> Iterator[None]:
        _set_cache_context(model, CacheContext(branch))
        try:
            yield
        finally:
            _set_cache_context(model, None)

    return context


class Hooked:
    """A denoiser under one of the hooks, for one or several generations."""

    def __init__(self, subject: Subject, config: Any, paths: list[str] | None = None):
        import diffusers.hooks as hooks

        apply = {
            "FirstBlockCacheConfig": hooks.apply_first_block_cache,
            "TaylorSeerCacheConfig": hooks.apply_taylorseer_cache,
            "MagCacheConfig": hooks.apply_mag_cache,
            "PyramidAttentionBroadcastConfig": hooks.apply_pyramid_attention_broadcast,
            "FasterCacheConfig": hooks.apply_faster_cache,
        }[type(config).__name__]
        self.subject, self.model = subject, subject.make()
        self.watch = Watch(self.model, subject.block_paths(self.model) if paths is None else paths)
        self.step = 0
        if hasattr(config, "current_timestep_callback"):
            config.current_timestep_callback = lambda: subject.timestep(self.step)
        apply(self.model, config)

    def generate(self, seed: int = 0, reset: bool = True) -> Run:
        if reset:
            from diffusers.hooks import HookRegistry

            HookRegistry.check_if_exists_or_initialize(self.model).reset_stateful_hooks()
        return observe(self.model, self.subject, seed, self.watch, self._around)

    def _around(self, step: int, branch: str) -> AbstractContextManager[Any]:
        self.step = step
        return _in_context(self.model)(step, branch)


def attention_paths(model: nn.Module) -> list[str]:
    """All modules that diffusers counts as attention, in the order in which the model lists them."""
    from diffusers.hooks._common import _ATTENTION_CLASSES

    return [path for path, module in model.named_modules() if isinstance(module, _ATTENTION_CLASSES)]


def first_block_cache(subject: Subject, threshold: float, seed: int = 0) -> Run:
    """``FirstBlockCacheConfig(threshold)``.

    Blocks: all ``ModuleList`` children of the model with a known name, in the order of ``named_children``: here double,
    then single blocks. At every call the first block runs; q = its output minus its input (image stream only).

    * d = mean|q - q_c| / mean|q_c| over the whole batch, q_c from the last *computed* step of this context.
    * skip iff d <= threshold (computed iff ``d > threshold``: equality and NaN skip). The first call computes. No
      warm-up, no limit on skips in a row, no forced last step.
    * computed: q_c, the outputs of the first block and (last block's output minus first block's output), for image and
      text stream, are kept. Skipped: first block's output + kept residual, both streams; the blocks between pass
      their inputs on.
    * all in the model's dtype; one ``.item()`` a call.

    Fault: a last block that returns None for the text stream (SD3) raises TypeError.
    """
    from diffusers.hooks import FirstBlockCacheConfig

    return Hooked(subject, FirstBlockCacheConfig(threshold=threshold)).generate(seed)


def taylorseer(
    subject: Subject,
    *,
    interval: int = 5,
    before: int = 3,
    after: int | None = None,
    order: int = 1,
    lite: bool = False,
    dtype: torch.dtype = torch.float32,
    identifiers: list[str] | None = None,
    seed: int = 0,
) -> Run:
    """``TaylorSeerCacheConfig``; watches the attention modules, or the blocks and the output layer when ``lite``.

    * computed iff s < before, or (s - before - 1) mod interval == 0, or s >= after. So with before=3, interval=5:
      0 1 2, 4, 9, 14, ...: the first forecast is a single step at s = before, and only then the counting begins.
    * D_0 = value; at an update D_{j+1} = (D_j - D_j of the last update) / (s - s_last), for all j that the last update
      had: after n updates order n - 1 is known, at most ``order``. Forecast sum_j D_j k^j / j!, k = s - s_last. This
      is our predictor "taylor"; order 1 equals "newton" (linear), order 2 does not equal it.
    * sites: modules whose whole path matches ``^blocks.*attn``, ``^transformer_blocks.*attn``,
      ``^single_transformer_blocks.*attn``; value = what the module returns (both outputs of joint attention), before
      gate and residual. Everything else runs at every step.
    * lite: site ``proj_out`` (the output before unpatchify); blocks return zeros of the last shapes.
    * factors are stored in ``taylor_factors_dtype``, bfloat16 by default even in an fp32 model: then even order 0
      is a value rounded to 8 bits. Steps s >= after compute and update (the docstring says they do not update).
    * state per module and context; the counter is the number of calls, never reset but by ``_reset_stateful_cache``.

    Faults: the default patterns find nothing where attention is called attn1 or attn2; lite silently gives garbage on
    models without a ``proj_out``; the ladder of backward differences is not exact on a quadratic.
    """
    from diffusers.hooks import TaylorSeerCacheConfig

    config = TaylorSeerCacheConfig(
        cache_interval=interval,
        disable_cache_before_step=before,
        disable_cache_after_step=after,
        max_order=order,
        taylor_factors_dtype=dtype,
        use_lite_mode=lite,
        cache_identifiers=identifiers,
    )
    model = subject.make()
    if lite:
        paths = [*subject.block_paths(model), "proj_out"]
    else:
        paths = [p for p in attention_paths(model) if "block" in p]
    return Hooked(subject, config, paths).generate(seed)


def mag_ratios(subject: Subject, seed: int = 0) -> list[float]:
    """What MagCache prints in calibration, one number a step.

    ratio_0 = 1; ratio_s = mean over tokens and batch of ||r_s|| / (||r_{s-1}|| + 1e-8), norms over channels in fp32,
    r = last block's output minus first block's *input*, image stream. One run, one prompt.
    """
    from diffusers.hooks import MagCacheConfig

    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        Hooked(subject, MagCacheConfig(num_inference_steps=subject.steps, calibrate=True)).generate(seed)
    printed = re.search(r"\[([-+0-9.e, ]+)\]\n", said.getvalue().split("mag_ratios=...):")[1])
    assert printed is not None, said.getvalue()
    return [float(number) for number in printed.group(1).split(",")]


def mag_cache(
    subject: Subject,
    ratios: list[float],
    *,
    threshold: float = 0.06,
    max_skip: int = 3,
    retention: float = 0.2,
    seed: int = 0,
) -> Run:
    """``MagCacheConfig(mag_ratios=ratios, ...)``.

    From step ``int(retention * steps + 0.5)`` on, at every step: rho *= ratio_s; n += 1; E += |1 - rho|; skip iff a
    residual is kept and E <= threshold and n <= max_skip; otherwise compute and set rho = 1, n = 0, E = 0. Before that
    step everything computes and the sums stay at their start. Numbers are fp32 0-d tensors: the decisions are those
    of single precision. The image plays no part: the schedule is static given the ratios.

    * skipped: first block's input + r of the last computed step (plain reuse); the text stream passes through.
    * ratios of another length are taken at round(i (n - 1) / (steps - 1)).
    * the step counter wraps at ``num_inference_steps`` and clears sums and residual then: a second generation of the
      same length is clean without a reset; one that was interrupted shifts the next.

    Fault: with two calls a step in *different* contexts it is right, but without contexts both guidance branches share
    one counter and one residual.
    """
    from diffusers.hooks import MagCacheConfig

    config = MagCacheConfig(
        threshold=threshold,
        max_skip_steps=max_skip,
        retention_ratio=retention,
        num_inference_steps=subject.steps,
        mag_ratios=list(ratios),
    )
    return Hooked(subject, config).generate(seed)


def pyramid_attention_broadcast(
    subject: Subject,
    *,
    spatial: int | None = 2,
    cross: int | None = None,
    window: tuple[int, int] = (100, 800),
    seed: int = 0,
) -> Run:
    """``PyramidAttentionBroadcastConfig``; watches every attention module.

    Per module: computed iff no cache, or i == 0, or not (lo < timestep < hi), or i mod range == 0, where i counts this
    module's calls from the start of the generation (also outside the window, also skipped ones). So with range 2 the
    even steps compute. Reused: what the module returned last (both streams of joint attention), before gate and
    residual. Kinds: "cross" iff the module says ``is_cross_attention``, else spatial (or temporal by its path).
    The timestep is what ``current_timestep_callback`` gives; here 1000 sigma.

    Fault: the counter knows no guidance branch. With two calls a step and range 2 the conditional call always computes
    and the unconditional one always gets the conditional attention.
    """
    from diffusers.hooks import PyramidAttentionBroadcastConfig

    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=spatial,
        cross_attention_block_skip_range=cross,
        spatial_attention_timestep_skip_range=window,
        cross_attention_timestep_skip_range=window,
    )
    return Hooked(subject, config, attention_paths(subject.make())).generate(seed)


def faster_cache(
    subject: Subject,
    *,
    interval: int = 2,
    window: tuple[int, int] = (-1, 681),
    weight: float = 0.5,
    uncond_interval: int = 5,
    uncond_window: tuple[int, int] = (-1, 641),
    boost: float = 1.1,
    tensor_format: str = "BCFHW",
    seed: int = 0,
) -> Run:
    """``FasterCacheConfig``: attention outputs extrapolated, and the unconditional branch of a batched call guessed.

    Attention (every self-attention module found by path), i counts its calls: skipped iff lo < timestep < hi and not
    (i > 0 and i mod interval == 0), and (guidance distilled, or this call has only the conditional half). Then
    A = A_0 + w (A_0 - A_1), with A_0, A_1 the last two values *used*: a guessed value enters the history as if it had
    been computed (the paper speaks of computed ones). With interval 2 a skipped step is
    (1 + w) C_0 - w (1 + w) C_1 + w^2 (1 + w) C_2 - ..., C the computed values newest first, until the window began.

    Unconditional half, i counts calls of the denoiser: skipped iff i > 0, inside its window and i mod uncond_interval
    != 0. At a full call dLF = LF(u) - LF(c), dHF = HF(u) - HF(c): fft2 over the last two axes, shifted, low inside
    radius min(H, W) // 5. At a skipped one dLF *= boost (if 99 < t < 901), dHF *= boost (if t < 301): the factors
    compound over the skips in a row; u = real(ifft2(LF(c) + dLF + HF(c) + dHF)). Then only the conditional half runs,
    and attention is skipped in it as above; at full calls attention always runs.

    Faults: with a distilled model and the first timestep inside the window it fails on an empty cache; only inputs
    in a fixed list of names are halved, so models with pooled prompts or class labels fail.
    """
    from diffusers.hooks import FasterCacheConfig

    config = FasterCacheConfig(
        spatial_attention_block_skip_range=interval,
        spatial_attention_timestep_skip_range=window,
        unconditional_batch_skip_range=uncond_interval,
        unconditional_batch_timestep_skip_range=uncond_window,
        attention_weight_callback=lambda module: weight,
        alpha_low_frequency=boost,
        alpha_high_frequency=boost,
        tensor_format=tensor_format,
        is_guidance_distilled=subject.guidance != "batched",
    )
    return Hooked(subject, config, attention_paths(subject.make())).generate(seed)
