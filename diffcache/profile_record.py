"""What profiling measures, as frozen data that can be saved, looked at and searched over.

Enters: the numbers of one calibration. Leaves: a ``Profile``, stored as one safetensors file (no pickle) whose
metadata holds everything that is not an array.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from diffcache import gram

FORMAT = "diffcache.profile"
VERSION = 1

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class SiteProfile:
    """Measurements of one site over T steps and P calibration prompts (or prompts and branches).

    * ``residual``: the values are ``value - anchor``;
    * ``flops_saved``: FLOPs of one denoiser call that vanish when the site is forecast;
    * ``bytes_kept``: bytes of one history value;
    * ``gram``: ``[P, T, T]`` inner products of the values at any two steps;
    * ``sensitivity``: ``[T]``. When the value is wrong at step t only: relative squared error of the final result
      divided by the relative squared error of the value, which is ``||error||^2 / gram.scale(G)[p]``, that is, relative
      to the mean of ``||v||^2`` over all steps (not to ``||v_t||^2``).
    """

    name: str
    residual: bool
    flops_saved: float
    bytes_kept: int
    gram: Array
    sensitivity: Array

    def __post_init__(self) -> None:
        object.__setattr__(self, "gram", np.asarray(self.gram, dtype=np.float64))
        object.__setattr__(self, "sensitivity", np.asarray(self.sensitivity, dtype=np.float64))
        shape = self.gram.shape
        if len(shape) != 3 or shape[1] != shape[2] or shape[0] < 1:
            raise ValueError(f"site '{self.name}': gram has shape {list(shape)}, expected [prompts, steps, steps]")
        if self.sensitivity.shape != shape[1:2]:
            raise ValueError(
                f"site '{self.name}': sensitivity has shape {list(self.sensitivity.shape)}, expected [{shape[1]}] "
                "like the steps of gram"
            )
        if not (np.isfinite(self.gram).all() and np.isfinite(self.sensitivity).all()):
            raise ValueError(f"site '{self.name}': gram or sensitivity is not finite; did a calibration run overflow?")
        if (self.sensitivity < 0).any():
            raise ValueError(f"site '{self.name}': sensitivity is a ratio of squares and cannot be negative")

    @property
    def scale(self) -> Array:
        """Per prompt, what local squared errors are divided by: mean of ``||v||^2`` over the steps, ``[P]``."""
        return gram.scale(self.gram)


@dataclass(frozen=True, eq=False)
class Profile:
    """All measured sites of one denoiser, for ``steps`` steps at the timestep values ``clock`` (may be empty).

    ``total_flops`` counts one full call; ``fingerprint`` names the capture the profile was made for.
    """

    steps: int
    total_flops: float
    sites: tuple[SiteProfile, ...]
    clock: tuple[float, ...] = ()
    fingerprint: str = ""

    def __post_init__(self) -> None:
        if not self.total_flops > 0:
            raise ValueError(f"total_flops must be positive, got {self.total_flops}")
        if self.clock and len(self.clock) != self.steps:
            raise ValueError(f"profile has {self.steps} steps but {len(self.clock)} clock values; give one per step")
        names = [site.name for site in self.sites]
        if len(set(names)) != len(names):
            raise ValueError(f"site names must be unique, got {names}")
        for site in self.sites:
            if site.gram.shape[1] != self.steps:
                raise ValueError(
                    f"site '{site.name}' was measured over {site.gram.shape[1]} steps, the profile has {self.steps}"
                )
            if not 0 <= site.flops_saved <= self.total_flops:
                raise ValueError(
                    f"site '{site.name}' saves {site.flops_saved:g} FLOPs of a call that costs {self.total_flops:g}"
                )

    def site(self, name: str) -> SiteProfile:
        """The measurements of one site. Raises ValueError for an unknown name."""
        for site in self.sites:
            if site.name == name:
                return site
        raise ValueError(f"no site '{name}' in this profile; it has {[site.name for site in self.sites]}")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to one safetensors file."""
        arrays: dict[str, Array] = {}
        records = []
        for index, site in enumerate(self.sites):
            # by index: site names may hold characters or lengths that a tensor name should not
            arrays[f"{index}.gram"] = np.ascontiguousarray(site.gram)
            arrays[f"{index}.sensitivity"] = np.ascontiguousarray(site.sensitivity)
            records.append(
                {
                    "name": site.name,
                    "residual": site.residual,
                    "flops_saved": float(site.flops_saved),
                    "bytes_kept": int(site.bytes_kept),
                }
            )
        document = {
            "version": VERSION,
            "steps": self.steps,
            "total_flops": float(self.total_flops),
            "clock": [float(value) for value in self.clock],
            "fingerprint": self.fingerprint,
            "sites": records,
        }
        save_file(arrays, path, metadata={FORMAT: json.dumps(document)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Profile:
        """Read what ``save`` wrote. Raises ValueError for other files and for newer versions."""
        try:
            with safe_open(path, framework="np") as file:
                text = (file.metadata() or {}).get(FORMAT)
                arrays = {name: file.get_tensor(name) for name in file.keys()}
        except SafetensorError as error:
            raise ValueError(
                f"'{path}' is no safetensors file ({error}); expected the output of Profile.save"
            ) from error
        if text is None:
            raise ValueError(
                f"'{path}' is a safetensors file but holds no profile; expected the output of Profile.save"
            )
        document = json.loads(text)
        if document["version"] > VERSION:
            raise ValueError(
                f"'{path}' has profile version {document['version']}, this diffcache reads up to {VERSION}; "
                "upgrade diffcache"
            )
        sites = tuple(
            SiteProfile(**record, gram=arrays[f"{index}.gram"], sensitivity=arrays[f"{index}.sensitivity"])
            for index, record in enumerate(document["sites"])
        )
        clock = tuple(document["clock"])
        return cls(document["steps"], document["total_flops"], sites, clock, document["fingerprint"])
