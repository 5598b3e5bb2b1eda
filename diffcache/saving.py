"""Save and load compiled denoisers: JSON and safetensors, nothing that runs code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from diffcache.call_pattern import CallPattern, TwoBranches
from diffcache.finding import SiteFinder
from diffcache.fingerprint import graph_fingerprint, module_fingerprint
from diffcache.integrations.diffusers import is_pipeline, with_components
from diffcache.lower import check_backend
from diffcache.options import RunOptions
from diffcache.profile_record import Profile
from diffcache.report import CompileReport
from diffcache.runtime import CachedDenoiser
from diffcache.schedule import Schedule
from diffcache.tracing import tree
from diffcache.tracing.captured import Captured

FORMAT, VERSION = "diffcache", 1
MANIFEST = "diffcache.json"


def save(denoisers: Mapping[str, CachedDenoiser], folder: str | Path) -> None:
    """Write schedules, call patterns, reports and profiles; weights stay with the model."""
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    entries = {}
    for name, cached in denoisers.items():
        (path / f"{name}.schedule.json").write_text(cached.schedule.to_json())
        profile = getattr(cached, "profile", None)
        if isinstance(profile, Profile):
            profile.save(path / f"{name}.profile.safetensors")
        entries[name] = {
            "modules": module_fingerprint(cached.denoiser),
            "graphs": _graphs(cached),
            "leaf_modules": _leaf_paths(cached),
            "options": {k: v for k, v in asdict(cached.options).items() if k != "backend"},
            "uncached": cached.captured.refused,
            "pattern": _pattern_to_json(cached.pattern),
            "report": cached.report.to_json() if cached.report is not None else None,
            "profile": isinstance(profile, Profile),
        }
    manifest = {"format": FORMAT, "version": VERSION, "denoisers": entries}
    (path / MANIFEST).write_text(json.dumps(manifest, indent=1))


def load(model: Any, folder: str | Path, *, backend: str = "eager", strict: bool = True) -> Any:
    """Put a saved schedule on a model: the counterpart of ``fast.save(folder)``.

    Args:
        model: the pipeline or denoiser that was compiled, or another copy of it.
        strict: refuse a model whose modules differ from those the schedule was made for; with False (a LoRA was added,
            say) sites are matched by name, and calls without them are computed in full.

    Raises:
        ValueError: the folder holds no compiled model, is damaged or newer, or was made for another model.
    """
    path = Path(folder)
    manifest = _read(path)
    names = list(manifest["denoisers"])
    if len(names) > 1 and isinstance(model, nn.Module):
        raise ValueError(f"{path} holds {len(names)} denoisers, {names}: load it on the pipeline that has them")
    cached = {}
    for name, entry in manifest["denoisers"].items():
        denoiser = _component(model, name)
        found = module_fingerprint(denoiser)
        if strict and found != entry["modules"]:
            raise ValueError(
                f"{path} was made for another model: modules of '{name}' have fingerprint {entry['modules']}, this "
                f"model's {type(denoiser).__name__} has {found}. Load it on the model it was made for, compile again, "
                "or pass strict=False if only adapters differ."
            )
        cached[name] = _load_one(path, name, entry, denoiser, check_backend(backend))
    return attach(model, cached)


def attach(model: Any, cached: Mapping[str, CachedDenoiser]) -> Any:
    """What ``compile`` and ``load`` return: the denoiser itself, or a pipeline with it in place, with handles."""
    for name, denoiser in cached.items():
        object.__setattr__(denoiser, "save", lambda folder, d=denoiser, n=name: save({n: d}, folder))
    if not is_pipeline(model):
        return next(iter(cached.values()))
    fast = with_components(model, cached)
    single = next(iter(cached.values())) if len(cached) == 1 else None
    for handle in ("schedule", "report"):
        value = getattr(single, handle) if single is not None else {n: getattr(d, handle) for n, d in cached.items()}
        object.__setattr__(fast, handle, value)
    object.__setattr__(fast, "save", lambda folder: save(cached, folder))
    return fast


def _component(model: Any, name: str) -> nn.Module:
    if not is_pipeline(model):
        if not isinstance(model, nn.Module):
            raise ValueError(f"expected a diffusers pipeline or a torch.nn.Module, got {type(model).__name__}")
        return model.denoiser if isinstance(model, CachedDenoiser) else model
    if name not in model.components:
        raise ValueError(f"the schedule is for component '{name}', which this {type(model).__name__} lacks")
    component = model.components[name]
    return component.denoiser if isinstance(component, CachedDenoiser) else component


def _load_one(path: Path, name: str, entry: Mapping[str, Any], denoiser: nn.Module, backend: str) -> CachedDenoiser:
    file = path / f"{name}.schedule.json"
    try:
        schedule = Schedule.from_json(file.read_text())
        file = path / f"{name}.profile.safetensors"
        profile = Profile.load(file) if entry["profile"] else None
        file = path / MANIFEST
        pattern = _pattern_from_json(entry["pattern"])
        report = (
            CompileReport(**{**entry["report"], "sites": tuple(entry["report"]["sites"])}) if entry["report"] else None
        )
        captured = Captured(
            denoiser, leaf_modules=entry["leaf_modules"], on_uncapturable="eager" if entry["uncached"] else "raise"
        )
        captured.refused = entry["uncached"]
        cached = CachedDenoiser(
            captured,
            schedule,
            pattern,
            SiteFinder(captured),
            options=RunOptions(
                backend, **{**entry["options"], "disable_passes": tuple(entry["options"]["disable_passes"])}
            ),
            title=name,
        )
        cached.graphs = frozenset(entry["graphs"])
    except FileNotFoundError as error:
        raise ValueError(f"{path} is incomplete: {file.name} is missing; save the compiled model again") from error
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{file} is damaged or does not fit ({type(error).__name__}: {error}); save the compiled model again"
        ) from error
    cached.report = report
    if profile is not None:
        object.__setattr__(cached, "profile", profile)
    return cached


def _graphs(cached: CachedDenoiser) -> list[str]:
    """Fingerprints of all graphs the schedule was made for and was used on."""
    known = {graph_fingerprint(variant.graph_module.graph) for variant in cached.captured.variants}
    return sorted((known | cached.graphs | {cached.schedule.fingerprint}) - {""})


def _leaf_paths(cached: CachedDenoiser) -> list[str]:
    """The modules kept as single nodes by their paths; classes are not stored."""
    leaves = cached.captured.leaf_modules
    kinds = tuple(leaf for leaf in leaves if isinstance(leaf, type))
    named = [path for path, module in cached.denoiser.named_modules() if path and isinstance(module, kinds)]
    return [*(leaf for leaf in leaves if isinstance(leaf, str)), *named]


def _read(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    if not file.is_file():
        raise ValueError(f"{path} holds no compiled model: {MANIFEST} is missing; pass the folder given to save()")
    try:
        manifest = json.loads(file.read_text())
        known = manifest["format"] == FORMAT
        version = int(manifest["version"])
        complete = bool(manifest["denoisers"]) and all("modules" in entry for entry in manifest["denoisers"].values())
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{file} is damaged ({type(error).__name__}: {error}); save the compiled model again"
        ) from error
    if not known:
        raise ValueError(f"{file} was not written by diffcache (format {manifest['format']!r})")
    if version > VERSION:
        raise ValueError(f"{file} has version {version}, this diffcache reads up to {VERSION}; upgrade diffcache")
    if not complete:
        raise ValueError(f"{file} is damaged (a denoiser or what it was made for is missing); save the model again")
    return manifest


def _pattern_to_json(pattern: CallPattern) -> dict[str, Any]:
    return {
        "invariant": [list(map(list, path)) for path in pattern.invariant],
        "clock": None if pattern.clock is None else list(map(list, pattern.clock)),
        "probe": None if pattern.probe is None else list(map(list, pattern.probe)),
        "steps": pattern.steps,
        "streams": pattern.streams,
        "clock_values": list(pattern.clock_values),
        "branches": None if pattern.branches is None else asdict(pattern.branches),
        "shared": [list(map(list, path)) for path in pattern.shared],
    }


def _pattern_from_json(data: Mapping[str, Any]) -> CallPattern:
    def path(steps: Any) -> tree.Path | None:
        return None if steps is None else tuple((kind, key) for kind, key in steps)

    return CallPattern(
        tuple(p for steps in data["invariant"] if (p := path(steps)) is not None),
        path(data["clock"]),
        path(data["probe"]),
        int(data["steps"]),
        int(data["streams"]),
        tuple(data["clock_values"]),
        None if (found := data.get("branches")) is None else TwoBranches(**{**found, "names": tuple(found["names"])}),
        tuple(p for steps in data.get("shared", ()) if (p := path(steps)) is not None),
    )
