"""Which tokens one stream computes at a step that is for some of them: what is known of each token, and the choice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffcache.cells import COMPUTE, Cell, Partial, Selected
from diffcache.forecasting import forecast
from diffcache.memory import in_full
from diffcache.programs import History
from diffcache.schedule import Schedule
from diffcache.token_programs import NEWEST, TokenRegions
from diffcache.token_scores import TokenView, cluster_tokens, score_tokens, select_tokens

Place = tuple[int, int]  # a row and a value of its site


class TokenChoice:
    """The tokens of one stream: when each was computed last, and its cluster. Nothing waits for the device."""

    def __init__(self, schedule: Schedule):
        self.schedule = schedule
        self.number = {row.site: number for number, row in enumerate(schedule.rows)}
        self.partial: list[set[int]] = [set() for _ in schedule.rows]  # steps at which some of its tokens were
        self._full: dict[int, int] = {}  # row -> the last step at which all of its tokens were computed
        self._computed: dict[Place, Tensor] = {}  # the step at which each token was computed last [batch, tokens]
        self._clusters: dict[Place, tuple[int, Tensor]] = {}  # made from what was computed at a step
        self._latent: Sequence[int] = ()
        self._device: torch.device | None = None

    def begin(self, latent: Any) -> None:
        """A step begins with this latent, whose shape tells how the tokens lie."""
        if isinstance(latent, Tensor):
            self._latent, self._device = latent.shape, latent.device

    def possible(self, row: int, cell: Partial, made: Sequence[Sequence[int]]) -> bool:
        """Whether enough has been computed to choose by."""
        looked_at = self.number[cell.beside] if cell.beside else row
        return bool(made[row]) and len(made[looked_at]) >= cell.looks

    def select(
        self, row: int, cell: Partial, made: Sequence[Sequence[int]], step: int, history: History, regions: TokenRegions
    ) -> Selected:
        """The tokens of a row at this step; ``made`` are the steps whose values each row has, newest first.

        Raises:
            ValueError: the score is unknown or looks at what there is not, or the site beside has other tokens.
        """
        others = forecast(cell.others, made[row], step, self.schedule.clock, self.partial[row])
        if others.reads == 1 and not others.is_reuse:
            raise ValueError(
                f"site '{self.schedule.rows[row].site}' forecasts the other tokens at step {step} from one value with "
                f"the weight {others.weights[0]:g}; of one value only the reuse is possible"
            )
        parts = _parts(history, row, made[row][0])
        assert parts, f"row {row} runs on some tokens at step {step}, and nothing is kept of step {made[row][0]}"
        found = [self._of_value((row, part), cell, made, step, history, regions) for part in parts]
        blend = (cell.blend, cell.clusters) if cell.clusters and cell.blend else None
        tokens, clusters = zip(*found, strict=True)
        return Selected(others, tuple(chosen.shape[1] for chosen in tokens), blend, tokens, clusters)

    def _of_value(
        self, place: Place, cell: Partial, made: Sequence[Sequence[int]], step: int, history: History,
        regions: TokenRegions,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """The tokens of one value, and the clusters of all."""
        row, part = place
        own = self._get(history, (row, part, made[row][0]))
        batch, tokens = own.shape[:2]
        at = self._beside(place, cell, made, history, tokens) if cell.beside else place
        newest = made[at[0]]
        values = [self._get(history, (*at, made_at)) for made_at in newest[: cell.looks]]
        clusters = self._clustered(place, cell, own)
        view = TokenView(
            values[0], step,
            before=values[1] if cell.looks > 1 else None,
            attended=self._attended(at, history, regions, tokens),
            stale=step - self._last(place, batch, tokens, own.device),
            clusters=clusters,
            grid=grid_of(self._latent, tokens),
        )  # fmt: skip
        return select_tokens(score_tokens(cell.score, view, **cell.options), cell.count(tokens)), clusters

    def _beside(
        self, place: Place, cell: Partial, made: Sequence[Sequence[int]], history: History, tokens: int
    ) -> Place:
        """The value of the site beside that has as many tokens; of several the one of the same number."""
        row = self.number[cell.beside]
        parts = _parts(history, row, made[row][0])
        alike = [part for part in parts if history[row, part, made[row][0]].shape[1] == tokens]  # type: ignore[union-attr]
        if not alike:
            raise ValueError(
                f"site '{self.schedule.rows[place[0]].site}' has {tokens} tokens and chooses them by '{cell.beside}', "
                "which has others; choose by a site on the same tokens"
            )
        return row, place[1] if place[1] in alike else alike[0]

    def _attended(self, at: Place, history: History, regions: TokenRegions, tokens: int) -> Tensor | None:
        row, part = at
        first = len(regions.sites[row].values)
        if not any(number == row and value >= first for number, value, _ in history):
            return None
        place = regions.of(row).attended[part]
        if place is None or (row, first + place[0], NEWEST) not in history:
            return None
        return self._get(history, (row, first + place[0], NEWEST)).narrow(2, place[1], tokens)

    def _get(self, history: History, key: tuple[int, int, int]) -> Tensor:
        value = in_full(history[key])
        return value.to(self._device or value.device, non_blocking=True)  # what was offloaded comes back

    def _last(self, place: Place, batch: int, tokens: int, device: torch.device) -> Tensor:
        """The step at which each token was computed last."""
        if place not in self._computed:
            self._computed[place] = torch.full((batch, tokens), self._full.get(place[0], 0), device=device)
        return self._computed[place]

    def _clustered(self, place: Place, cell: Partial, value: Tensor) -> Tensor | None:
        """Clusters of the tokens, made anew from what was computed since; those before are where they start."""
        if not cell.clusters:
            return None
        since = self._full.get(place[0], 0)
        known = self._clusters.get(place)
        if known is None or known[0] != since:
            start = known[1] if known is not None and known[1].shape == value.shape[:2] else None
            count = min(cell.clusters, value.shape[1])
            known = self._clusters[place] = since, cluster_tokens(value, count, start=start)
        return known[1]

    def finish(self, step: int, column: Sequence[Cell]) -> None:
        """The step ran with this column."""
        for row, cell in enumerate(column):
            if cell is COMPUTE:
                self._full[row] = step
                self._computed = {place: known for place, known in self._computed.items() if place[0] != row}
            elif isinstance(cell, Selected):
                self.partial[row].add(step)
                for part, tokens in enumerate(cell.tokens):
                    self._computed[row, part] = self._computed[row, part].scatter(1, tokens, step)

    def adopt(self, other: TokenChoice) -> None:
        """The history of another stream was taken over: all of its tokens count as of its last full step."""
        self._full = {row: max(self._full.get(row, 0), step) for row, step in {**self._full, **other._full}.items()}
        self.partial = [a | b for a, b in zip(self.partial, other.partial, strict=True)]
        self._computed.clear()


def _parts(history: History, row: int, step: int) -> list[int]:
    return sorted(part for number, part, known in history if (number, known) == (row, step))


def grid_of(latent: Sequence[int], tokens: int) -> tuple[int, int] | None:
    """How tokens lie that are square patches of a latent [batch, channels, (frames,) height, width] in reading order.

    Frames count as one below the other. None where they cannot be such patches.
    """
    if len(latent) not in (4, 5):
        return None
    height, width = latent[-2:]
    frames = latent[2] if len(latent) == 5 else 1
    for taken in range(1, frames + 1):
        for patch in range(1, min(height, width) + 1):
            if frames % taken or height % patch or width % patch:
                continue
            grid = frames // taken * (height // patch), width // patch
            if grid[0] * grid[1] == tokens:
                return grid
    return None
