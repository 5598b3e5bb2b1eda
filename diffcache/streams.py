"""Streams: the calls of one generation with one condition, and how a call is told to belong to one of them."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch

from diffcache.deciding import Deciding
from diffcache.programs import BASIS, History, Programs
from diffcache.schedule import Schedule
from diffcache.token_programs import NEWEST
from diffcache.token_reads import kept_steps
from diffcache.tracing import tree
from diffcache.tracing.session import Bound


class Stream:
    """The calls of one generation with one condition: where it is, what it keeps, what was hoisted for it."""

    def __init__(self, owner: tuple[Any, ...], invariants: list[Any], schedule: Schedule):
        self.owner, self.schedule = owner, schedule
        self.invariants = [(leaf, version(leaf)) for leaf in invariants]
        self.restart()

    def restart(self) -> None:
        self.position = -1
        self.on_schedule = True
        self.history: History = {}
        self.hoisted: dict[Programs, tuple[Any, Sequence[Any]]] = {}
        self.latent: Any = None
        self.deciding = Deciding(self.schedule)
        self.flops = 0.0  # of its latest call, had it run in full
        self.partial = False  # whether its calls are those of one half of a batch
        self.generation: Any = None  # what joins it with the other branches (see ``generations``)
        self.parts: list[Stream] = []  # one for each sample, if each decides for itself
        self.bound: Bound | None = None  # its latest call, where another branch may have to run it ahead of time
        self.ahead: Any = None  # what was run ahead of time

    def has_run(self) -> None:
        """A call ran; what has no rows leaves no column to print."""
        if not self.schedule.rows:
            self.deciding.log.append("C")

    def leave_out(self, step: int, printed: str = "-") -> None:
        """A step passes at which this branch does not run."""
        self.deciding.log.append(printed)
        self.keep(step, {})

    def forget(self) -> None:
        """What it keeps was made from other inputs than those of the sampler."""
        self.history.clear()
        self.deciding.made = [[] for _ in self.schedule.rows]

    def keep(self, step: int, written: History) -> None:
        """A step has run: add what it wrote to history, and forget what no later step reads."""
        self.history |= written
        live = self.schedule.live_after(step)
        wanted = [
            {
                BASIS,
                *live.get(row.site, ()),
                *kept_steps(made, partial, self.schedule.newest_after(row, step), self.schedule.full_after(row, step)),
                *([NEWEST] if self.schedule.keeps_tokens(row, step) else ()),
            }
            for row, made, partial in zip(
                self.schedule.rows, self.deciding.made, self.deciding.tokens.partial, strict=True
            )
        ]
        self.history = {key: kept for key, kept in self.history.items() if key[2] in wanted[key[0]]}
        self.position = step

    def serves(self, owner: tuple[Any, ...], invariants: list[Any]) -> bool:
        return (
            self.owner == owner
            and len(invariants) == len(self.invariants)
            and all(
                unchanged(old, version, new) for (old, version), new in zip(self.invariants, invariants, strict=True)
            )
        )

    def holds(self, invariants: list[Any]) -> bool:
        """Whether these are the very objects of its first call, not only equal ones."""
        return bool(invariants) and all(old is new for (old, _), new in zip(self.invariants, invariants, strict=True))


def input_at(bound: Bound, path: tree.Path | None) -> Any:
    """An argument by its path; None where this call has no such argument."""
    with contextlib.suppress(KeyError, IndexError, AttributeError, TypeError):
        return tree.follow(bound, path) if path is not None else None
    return None


def calling(found: Sequence[Stream], invariants: list[Any], latent: Any) -> Stream | None:
    """Which of several generations with equal conditions calls, or None where that is not certain.

    The very objects of its conditions tell; else its latent, which one step moves far less than another seed does.
    Only then is a number read from a device.
    """
    same = [stream for stream in found if stream.holds(invariants)]
    found = same or list(found)
    if len(found) < 2:
        return found[0] if found else None
    distances = [_distance(stream.latent, latent) for stream in found]
    nearest, second = sorted(distances)[:2]
    return found[distances.index(nearest)] if nearest < 0.5 * second or nearest == second == 0 else None


def _distance(old: Any, new: Any) -> float:
    if not isinstance(old, torch.Tensor) or not isinstance(new, torch.Tensor) or old.shape != new.shape:
        return float("inf")
    return 0.0 if old is new else float((old.detach().float() - new.detach().float()).norm())


def version(leaf: Any) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    if leaf.is_inference():  # writes leave no trace on it: keep a copy to compare with
        return leaf.clone()
    return leaf._version, leaf.data_ptr()


def unchanged(old: Any, version: Any, new: Any) -> bool:
    """Whether an invariant input is what it was, decided without waiting for a device."""
    if not isinstance(new, torch.Tensor) or not isinstance(old, torch.Tensor):
        return type(old) is type(new) and bool(old == new)
    if isinstance(version, torch.Tensor):
        return new.device.type == "cpu" and new.dtype == version.dtype and torch.equal(new, version)
    if (old._version, old.data_ptr()) != version:
        return False
    if new is old:
        return True
    same_kind = new.shape == old.shape and new.dtype == old.dtype and new.device == old.device
    return same_kind and new.device.type == "cpu" and torch.equal(new, old)


def close(a: float, b: float) -> bool:
    return abs(a - b) <= 1e-6 * max(abs(a), abs(b), 1e-6)
