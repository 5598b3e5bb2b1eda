"""DeepCache 0.1.1 on a U-Net."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.agreement.peers.watching import Run, Watch, observe
from benchmarks.agreement.subjects import Subject


def unet_paths(model: Any) -> list[str]:
    """The parts DeepCache may skip: resnets, attentions, samplers, and the middle block."""
    kinds = ("resnets", "attentions", "downsamplers", "upsamplers")
    down = [
        f"{side}.{i}.{kind}.{j}"
        for side in ("down_blocks", "up_blocks")
        for i, block in enumerate(getattr(model, side))
        for kind in kinds
        for j in range(len(getattr(block, kind, None) or ()))
    ]
    return [*down, "mid_block"]


class Helped:
    """A U-Net under ``DeepCacheSDHelper``, for one or several generations."""

    def __init__(self, subject: Subject, *, interval: int = 3, branch: int = 0, mode: str = "uniform"):
        from DeepCache import DeepCacheSDHelper

        self.subject, self.model = subject, subject.make()
        self.watch = Watch(self.model, unet_paths(self.model))
        given = [subject.inputs(subject.latent(0), s, "cond", subject.prompt) for s in subject.sigmas()[:-1]]
        timesteps = torch.stack([args[1] for args, _ in given])
        pipe = SimpleNamespace(unet=self.model, scheduler=SimpleNamespace(timesteps=timesteps))
        self.helper = DeepCacheSDHelper(pipe=pipe)
        self.helper.set_params(cache_interval=interval, cache_branch_id=branch, skip_mode=mode)
        self.helper.enable()

    def generate(self, seed: int = 0) -> Run:
        return observe(self.model, self.subject, seed, self.watch)


def deepcache(subject: Subject, *, interval: int = 3, branch: int = 0, seed: int = 0) -> Run:
    """``DeepCacheSDHelper.set_params(cache_interval=interval, cache_branch_id=branch)``.

    * s = index of the call's timestep in ``scheduler.timesteps``; computed in full iff (s - s_first) mod interval == 0,
      s_first that of the first call since ``enable``. Nothing else decides; guidance calls of a step decide alike.
    * branch b = 3 block + layer, block 0 the highest resolution. On a cached step run: ``conv_in``, the time
      embedding, the down path before layer ``layer`` of down block ``block``, the up path from layer ``layer`` (counted
      from the output) of the mirrored up block on, and the head. So the value that is reused is the *input of that up
      layer* (the deep features), the output of the up layer before it; its skip connection is current: the output of
      the down layer before, or of ``conv_in`` for branch 0. Reuse only, in the model's dtype.
    * a whole down block is replayed when layer == 0: its skip connections are old, but only skipped layers read them.
    * the helper has "uniform" alone: any other ``skip_mode`` never computes and fails on its empty cache. The paper's
      non-uniform steps exist only in the package's copy of old pipelines, see ``quadratic_steps``.

    Faults: other modes as above; s_first survives until ``disable()``, so a later generation that starts elsewhere
    (image to image) may begin with a cached step.
    """
    return Helped(subject, interval=interval, branch=branch).generate(seed)


def quadratic_steps(steps: int, computed: int, center: int, power: float) -> list[int]:
    """The package's own ``sample_from_quad_center``, read out of a module that no longer imports.

    x = linspace((-c)^(1/p), (steps - c)^(1/p), computed + 1); steps 0 and c + int(x^p), first and last left out; p is
    lowered by 0.02 until ``computed`` distinct ones result. (-c)^(1/p) is a *complex* number in Python and the line to
    the real end runs through the complex plane; int() then drops the imaginary part. So the points are not c +- u^p as
    the paper says.
    """
    found = importlib.util.find_spec("DeepCache")
    assert found is not None
    assert found.submodule_search_locations is not None
    path = Path(found.submodule_search_locations[0]) / "sd" / "pipeline_stable_diffusion.py"
    tree = ast.parse(path.read_text())
    wanted = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "sample_from_quad_center"]
    import numpy as np

    scope: dict[str, Any] = {"np": np}
    exec(compile(ast.Module(wanted, []), str(path), "exec"), scope)
    chosen, _ = scope["sample_from_quad_center"](steps, computed, center, power)
    return sorted(int(step) for step in chosen)
