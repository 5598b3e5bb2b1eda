"""Sites made on request by name: the residual of a run of blocks, what a block hands on, a skip's depth, the encoder.

Enters: an ``Anatomy`` and a name. Leaves: a candidate, or a ValueError that says what can be asked for instead.

* ``blocks[first:last]``: what blocks ``first`` to ``last - 1`` of the trunk add to the streams that enter them. Counted
  as Python slices are; both stacks of a joint-attention transformer count on through. ``Fn`` and ``Bn`` of DBCache. The
  stream that the latent began comes first, text behind it.
* ``prefix[b]``: the streams behind block ``b``, as they are: nothing up to it runs (BlockDance).
* ``deep[b]``: DeepCache's feature at branch ``b``, 0 the shallowest: all that lies deeper than skip ``b`` is dead.
* ``output-latent``: what the denoiser returns less what it was handed, where the two have one shape (EasyCache).
* ``encoder``: what the deepest layers hand up and every skip: the way down and the middle are dead (FasterDiffusion).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import islice

from torch import fx

from diffcache.anatomy import Anatomy
from diffcache.blocks import MAX_VALUES, paired, stack_cut, varying
from diffcache.cuts import output_candidates
from diffcache.flow import Candidate

_RANGE = re.compile(r"blocks\[(-?\d+)?:(-?\d+)?\]")
_INDEXED = re.compile(r"(prefix|deep)\[(-?\d+)\]")

Nodes = tuple[fx.Node, ...]
Anchors = tuple[fx.Node | None, ...]


def range_name(first: int, last: int | None = None) -> str:
    """The name of the site that spans blocks ``first`` to ``last - 1`` of the trunk, as ``blocks[first:last]``."""
    return f"blocks[{first or ''}:{'' if last is None else last}]"


def prefix_name(block: int) -> str:
    """The name of the site behind block ``block`` of the trunk, without an anchor."""
    return f"prefix[{block}]"


def deep_name(branch: int) -> str:
    """The name of the deep feature at skip ``branch``, 0 the shallowest."""
    return f"deep[{branch}]"


def is_requested(name: str) -> bool:
    """Whether a name asks for a site that is made on request."""
    return name in ("encoder", "output-latent") or bool(_RANGE.fullmatch(name) or _INDEXED.fullmatch(name))


def requested(anatomy: Anatomy, name: str) -> Candidate:
    """The candidate that a name of this module's forms asks for. Raises ValueError where the denoiser has none."""
    if name == "encoder":
        return _encoder(anatomy)
    if name == "output-latent":
        return _transform(anatomy)
    if found := _RANGE.fullmatch(name):
        first, last = (int(text) if text else None for text in found.groups())
        return _range(anatomy, name, *_span(anatomy, name, first, last))
    found = _INDEXED.fullmatch(name)
    if found is None:
        raise ValueError(
            f"'{name}' asks for no site; the forms are blocks[first:last], prefix[block], deep[branch], encoder and "
            "output-latent"
        )
    kind, index = found[1], int(found[2])
    return _prefix(anatomy, name, index) if kind == "prefix" else _deep(anatomy, name, index)


def _transform(anatomy: Anatomy) -> Candidate:
    flow = anatomy.flow
    output, latent = next(output_candidates(flow), None), flow.latent
    if output is None or latent is None or len(output.values) != 1:
        raise ValueError("'output-latent' needs a denoiser that is handed one latent and returns one tensor")
    if not flow.readable(latent) or not flow.alike(output.values[0], latent):
        shapes = [getattr(flow.spec(node), "shape", None) for node in (output.values[0], latent)]
        raise ValueError(
            f"'output-latent' needs a result of the latent's shape and dtype; got {shapes[0]} and {shapes[1]}. Ask for "
            "the output itself"
        )
    return Candidate("range", "output-latent", output.values, (latent,), "")


# -- runs of blocks -------------------------------------------------------------------------------------------------


def _span(anatomy: Anatomy, name: str, first: int | None, last: int | None) -> tuple[int, int]:
    """First block and the one after the last, counted from 0."""
    count = _count(anatomy, name)
    for bound in (first, last):
        if bound is not None and not -count <= bound <= count:
            raise ValueError(f"'{name}' reaches past the {count} blocks of this denoiser (0 to {count - 1})")
    start, end, _ = slice(first, last).indices(count)
    if start >= end:
        raise ValueError(f"'{name}' holds none of the {count} blocks of this denoiser; the first must lie before last")
    return start, end


def _count(anatomy: Anatomy, name: str) -> int:
    if not anatomy.trunk:
        raise ValueError(
            f"'{name}' counts blocks in a row, and this denoiser has none; "
            + ("ask for deep[branch] or encoder" if anatomy.skips else "ask for a site of find_sites")
        )
    return len(anatomy.trunk)


def _range(anatomy: Anatomy, name: str, first: int, last: int) -> Candidate:
    values, anchors = _residual(anatomy, first, last)
    if not values or all(anchor is None for anchor in anchors):
        raise ValueError(f"'{name}': {_complaint(anatomy, first, last, values)}")
    # the stream that the latent began comes first: it is what a gate looks at (FBCache, DBCache)
    pairs = sorted(zip(values, anchors, strict=True), key=lambda pair: anatomy.foreign(pair[0]))
    values, anchors = tuple(value for value, _ in pairs), tuple(anchor for _, anchor in pairs)
    return Candidate("range", name, values, anchors, _path(anatomy, first), anatomy.trunk[first].call)


def _residual(anatomy: Anatomy, first: int, last: int) -> tuple[Nodes, Anchors]:
    """The streams that leave a run of blocks on those that enter it; no values where they cannot be cached.

    Between blocks tokens may be grouped anew (frames, places), so that either end has two forms: as one block hands
    the stream out, and as the next one takes it in. The first pair of forms that goes together in full is taken.
    """
    best: tuple[Nodes, Anchors] = ((), ())
    entering = list(_entering(anatomy, first))
    for values in _leaving(anatomy, first, last):
        for boundary in entering:
            anchors = paired(anatomy.flow, values, boundary, anatomy.axes)
            if None not in anchors:
                return values, anchors
            if not best[0] or sum(map(bool, anchors)) > sum(map(bool, best[1])):
                best = values, anchors
    return best


def _entering(anatomy: Anatomy, first: int) -> Iterator[Sequence[fx.Node]]:
    yield varying(anatomy.flow, anatomy.trunk[first].inputs)
    if first:
        yield anatomy.trunk[first - 1].outputs


def _leaving(anatomy: Anatomy, first: int, last: int) -> Iterator[Nodes]:
    """Values that cut the trunk behind block ``last - 1``, in the order of preference."""
    flow, run = anatomy.flow, anatomy.trunk
    if last == len(run):
        for boundary in _entering(anatomy, first):
            values, anchors = stack_cut(flow, run, boundary, anatomy.axes)  # one stream may be all that goes on
            if values and None not in anchors:
                yield values
    made = _streams(anatomy, run[last - 1].outputs)
    if made:
        yield made
    if last < len(run):
        outputs = set(run[last - 1].outputs)
        taken = [n for n in run[last].inputs if n not in outputs and not outputs.isdisjoint(flow.ancestors(n))]
        regrouped = _streams(anatomy, taken)
        if regrouped:
            yield regrouped


def _streams(anatomy: Anatomy, nodes: Sequence[fx.Node]) -> Nodes:
    """Those that hang on the latent, if all of these can be cached."""
    flow = anatomy.flow
    found = tuple(node for node in nodes if node in flow.from_latent)
    return found if 0 < len(found) <= MAX_VALUES and all(map(flow.eligible, found)) else ()


def _complaint(anatomy: Anatomy, first: int, last: int, values: Nodes) -> str:
    """Why a run of blocks is no site, and the nearest runs that are."""
    if not values:
        return (
            f"what leaves block {last - 1} cannot be cached (it is written in place, or is no tensor); choose another "
            "last block"
        )
    count = len(anatomy.trunk)
    others = [(first, end) for end in range(first + 1, count + 1)], [(start, last) for start in range(last)]
    nearest: list[tuple[int, int]] = []
    for runs in others:
        runs.sort(key=lambda run: abs(run[0] - first) + abs(run[1] - last))
        nearest += islice((run for run in runs[1:] if _is_site(anatomy, *run)), 2)
    ways = [range_name(*way) for way in nearest] + [prefix_name(last - 1)]
    return (
        f"the stream that leaves block {last - 1} has another shape than the one that enters block {first}, so there "
        f"is no residual; ask for {' or '.join(ways)}"
    )


def _is_site(anatomy: Anatomy, first: int, last: int) -> bool:
    return any(anchor is not None for anchor in _residual(anatomy, first, last)[1])


def _path(anatomy: Anatomy, block: int) -> str:
    return anatomy.flow.calls[anatomy.trunk[block].call].path


def _prefix(anatomy: Anatomy, name: str, block: int) -> Candidate:
    count = _count(anatomy, name)
    if not -count <= block < count:
        raise ValueError(f"'{name}' is none of the {count} blocks of this denoiser (0 to {count - 1})")
    block %= count
    values = _streams(anatomy, anatomy.trunk[block].outputs)
    if not values:
        raise ValueError(f"'{name}': what leaves block {block} cannot be cached (it is written in place)")
    return Candidate("prefix", name, values, (None,) * len(values), _path(anatomy, block), anatomy.trunk[block].call)


# -- skip connections -----------------------------------------------------------------------------------------------


def _deep(anatomy: Anatomy, name: str, branch: int) -> Candidate:
    count = len(anatomy.skips)
    if not -count <= branch < count:
        has = f"{count} skip connections (0 to {count - 1})" if count else "no skip connections"
        raise ValueError(f"'{name}': this denoiser has {has}")
    skip = anatomy.skips[branch]
    return Candidate("deep", name, (skip.deep,), (None,), str(skip.deep.meta.get("path", "")))


def _encoder(anatomy: Anatomy) -> Candidate:
    """What the middle hands up, then the skips from the shallowest."""
    if not anatomy.skips:
        raise ValueError("'encoder' is the way down to the skip connections, and this denoiser has none")
    kept = [anatomy.skips[-1].deep, *(node for skip in anatomy.skips for node in skip.around)]
    values = tuple(node for node in dict.fromkeys(kept) if anatomy.flow.eligible(node))
    return Candidate("encoder", "encoder", values, (None,) * len(values), "")
