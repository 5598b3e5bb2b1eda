"""cache-dit 1.5.3, used on a bare transformer: DBCache, alone and with its TaylorSeer calibrator."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from benchmarks.agreement.peers.watching import Run, Watch, observe
from benchmarks.agreement.subjects import Subject

os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")


class Cached:
    """A denoiser under DBCache, for one or several generations."""

    def __init__(
        self,
        subject: Subject,
        *,
        first: int = 1,
        last: int = 0,
        threshold: float = 0.08,
        warmup: int = 8,
        warmup_interval: int = 1,
        max_cached: int = -1,
        max_in_row: int = -1,
        max_accumulated: float | None = None,
        mask: Sequence[int] | None = None,
        static: bool = False,
        order: int | None = None,
        knows_steps: bool = True,
    ):
        import cache_dit

        self.subject, self.model = subject, subject.make()
        self.watch = Watch(self.model, subject.block_paths(self.model))
        self.config = cache_dit.DBCacheConfig(
            Fn_compute_blocks=first,
            Bn_compute_blocks=last,
            residual_diff_threshold=threshold,
            max_warmup_steps=warmup,
            warmup_interval=warmup_interval,
            max_cached_steps=max_cached,
            max_continuous_cached_steps=max_in_row,
            max_accumulated_residual_diff_threshold=max_accumulated,
            enable_separate_cfg=subject.guidance == "separate",
            num_inference_steps=subject.steps if knows_steps else None,
            steps_computation_mask=list(mask) if mask is not None else None,
            steps_computation_policy="static" if static else "dynamic",
        )
        self.calibrator = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=order) if order is not None else None
        cache_dit.enable_cache(self.model, cache_config=self.config, calibrator_config=self.calibrator)

    def generate(self, seed: int = 0, refresh: bool = True) -> Run:
        if refresh:
            import cache_dit

            again = {"calibrator_config": self.calibrator} if self.calibrator is not None else {}
            cache_dit.refresh_context(self.model, cache_config=self.config, **again)
        return observe(self.model, self.subject, seed, self.watch)


def dbcache(subject: Subject, seed: int = 0, **options: Any) -> Run:
    """``enable_cache(transformer, DBCacheConfig(...), TaylorSeerCalibratorConfig(order))``; options as of ``Cached``.

    Blocks: FLUX's double and single blocks are joined into one list, so F counts through them; other classes have one
    list. The first F blocks always run (also under a static mask), then the decision; skipped: the residual of the
    middle blocks (F..L-B) is added to the output of block F-1 of this step, image and text stream each; the last B
    blocks then run. For B > 0 they run on computed steps too, after the middle, so the cached residual ends before
    them. Without a calibrator the residual of the last computed step is reused.

    Decision at step s, first line that applies:
      1. s in range(0, W, warmup_interval): compute (with a mask: W = min(W, length of its first run of ones)).
         The steps between, when warmup_interval > 1, go on below.
      2. a mask: 1 computes; 0 with policy "static" skips; 0 with "dynamic" (or s beyond the mask) goes on.
      3. len(cached so far) >= max_cached_steps >= 0: compute.
      4. cached in a row before this step >= max_continuous_cached_steps >= 0: compute.
      5. accumulated >= max_accumulated (> 0): compute.  accumulated is the sum of d over *all* earlier steps at which
         line 7 was reached and d > 0, whether they then computed or not, and is never set back within a generation:
         once it is reached, every later step computes.
      6. threshold <= 0: compute; nothing kept yet: compute; threshold >= 1: skip.
      7. d = mean|q_c - q| / mean|q_c| over the batch, q = output of block F-1 minus input of block 0, image stream,
         q_c from the last computed step. Skip iff d < threshold (strictly; NaN computes).
    In a warm-up step and under line 2 d is not measured, but q_c is kept at every computed step.

    TaylorSeer calibrator: separate for image and text stream, on the middle residual.
      * ladder D_0 = Y, D_{j+1} = (D_j - D_j of the last update) / (s - s_last), forecast sum_j D_j k^j / j!: our
        "taylor" -- but D_1 and higher are formed only ``if self.current_step > 1``, and the calibrator's state is made
        at the first update, so its step is one behind: derivatives are formed at computed steps s >= 3 only. Forecasts
        whose newest computed step is 0, 1 or 2 are plain reuse; order j needs j computed steps >= 3.
      * no damping, no limit on k.

    Guidance in two calls: a call's parity is its branch (first call "cond"); everything above is kept per branch.
    With guidance in one batch the two halves share one d.

    Faults: no refresh between generations when used without a pipeline (off by one, see ``test_faults.py``); the
    counters of lines 3 to 5; derivatives that begin at step 3.
    """
    return Cached(subject, **options).generate(seed)
