"""A diffusers pipeline as something to calibrate: which components denoise, one generation, another denoiser put in.

Nothing here knows a model: the denoisers are the components that the pipeline calls over and over with something the
shape of what they return.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from diffcache.tracing import tree

MIN_CALLS = 4


def is_pipeline(model: Any) -> bool:
    """Whether ``model`` is like a diffusers pipeline: named components and ``__call__``, and no module itself."""
    return (
        not isinstance(model, nn.Module) and isinstance(getattr(model, "components", None), Mapping) and callable(model)
    )


def call_arguments(pipe: Any, item: Any, seed: int) -> dict[str, Any]:
    """One calibration item as the pipeline's arguments: latents out, no progress bar's worth of decoding, a fixed seed.

    Raises:
        ValueError: the item is neither a string nor a dict of arguments the pipeline takes.
    """
    accepted, forwards = accepted_arguments(type(pipe))
    if isinstance(item, str):
        item = {"prompt": item}
    if not isinstance(item, Mapping):
        raise ValueError(f"a calibration prompt is a string or a dict of pipeline arguments, got {type(item).__name__}")
    unknown = sorted(set(item) - accepted)
    if unknown and not forwards:
        raise ValueError(f"{type(pipe).__name__} takes no arguments {unknown}; it takes {sorted(accepted)}")
    arguments = dict(item)
    if "generator" in accepted and arguments.get("generator") is None:
        arguments["generator"] = torch.Generator("cpu").manual_seed(seed)
    if "output_type" in accepted:
        arguments["output_type"] = "latent"
    return arguments


def accepted_arguments(pipeline_class: type) -> tuple[set[str], bool]:
    """Names that calling such a pipeline takes, and whether it takes any others.

    A class that hands ``**kwargs`` on takes what its base classes take.
    """
    names: set[str] = set()
    for cls in pipeline_class.__mro__:
        call = vars(cls).get("__call__")
        if call is None:
            continue
        parameters = inspect.signature(call).parameters.values()
        names |= {p.name for p in parameters if p.kind is not p.VAR_KEYWORD and p.kind is not p.VAR_POSITIONAL}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return names - {"self"}, False
    return names - {"self"}, True


def generate(pipe: Any, item: Any, seed: int) -> torch.Tensor:
    """The latents (or whatever tensors the pipeline returns) of one generation, as one flat float tensor."""
    arguments = call_arguments(pipe, item, seed)
    given = arguments.get("generator")
    if isinstance(given, torch.Generator):  # the same noise however often the item is generated
        arguments["generator"] = _afresh(given)
    elif isinstance(given, list | tuple):
        arguments["generator"] = [_afresh(generator) for generator in given]
    with seeded(seed):
        result = flat(pipe(**arguments))
    if result.numel() == 0:
        raise ValueError(
            f"{type(pipe).__name__} returned nothing that errors can be measured on: neither tensors nor arrays nor "
            "pictures; give it an output_type, or compile the denoiser itself with sample="
        )
    return result


def _afresh(generator: torch.Generator) -> torch.Generator:
    return torch.Generator(generator.device).manual_seed(generator.initial_seed())


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Global random generators of all devices seeded inside, and as they were afterwards."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def flat(result: Any) -> torch.Tensor:
    """All tensors, arrays and pictures of a result, in one float vector."""
    parts = []
    for _, leaf in tree.walk(result, is_leaf=_is_array):
        if _is_array(leaf):
            leaf = torch.as_tensor(np.array(leaf))
        if isinstance(leaf, torch.Tensor) and leaf.dtype != torch.bool:
            parts.append(leaf.detach().to("cpu", torch.float32).flatten())
    return torch.cat(parts) if parts else torch.zeros(0)


def _is_array(value: Any) -> bool:
    """NumPy's arrays and what turns into them: PIL's pictures are objects with attributes otherwise."""
    return not isinstance(value, torch.Tensor) and (
        hasattr(value, "__array__") or hasattr(value, "__array_interface__")
    )


def quiet(pipe: Any) -> Any:
    """A copy of the pipeline without progress bars, over the same components."""
    silent = copy.copy(pipe)
    silent._progress_bar_config = {**getattr(pipe, "_progress_bar_config", {}), "disable": True}
    return silent


def with_components(pipe: Any, replaced: Mapping[str, nn.Module]) -> Any:
    """A pipeline of the same class over the same components, with some replaced; ``pipe`` is left as it is."""
    other = copy.copy(pipe)
    for name, module in replaced.items():
        object.__setattr__(other, name, module)  # the config goes on naming the class that was there
    return other


def find_denoisers(pipe: Any, item: Any, seed: int) -> dict[str, nn.Module]:
    """The components that denoise, by name, found by watching one generation.

    Raises:
        ValueError: no component was called at least four times with something the shape of its result.
    """
    counts: dict[str, int] = {}
    hooks = []
    for name, module in pipe.components.items():
        if isinstance(module, nn.Module):
            counts[name] = 0
            hooks.append(module.register_forward_hook(_counter(counts, name), with_kwargs=True))
    try:
        generate(quiet(pipe), item, seed)
    finally:
        for hook in hooks:
            hook.remove()
    found = {name: pipe.components[name] for name, count in counts.items() if count >= MIN_CALLS}
    if not found:
        raise ValueError(
            f"no component of {type(pipe).__name__} was called {MIN_CALLS} times or more with an input of the shape it "
            f"returns (seen: {counts}); calibrate with at least {MIN_CALLS} steps, or pass the denoiser itself"
        )
    return found


def _counter(counts: dict[str, int], name: str) -> Any:
    def count(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        result = next((leaf for _, leaf in tree.walk(output) if isinstance(leaf, torch.Tensor)), None)
        inputs = [leaf for _, leaf in tree.walk((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if result is not None and any(_same_but_channels(result, leaf) for leaf in inputs):
            counts[name] += 1

    return count


def _same_but_channels(x: torch.Tensor, y: torch.Tensor) -> bool:
    return (
        x.is_floating_point()
        and x.ndim == y.ndim >= 2
        and sum(a != b for a, b in zip(x.shape, y.shape, strict=True)) <= 1
    )
