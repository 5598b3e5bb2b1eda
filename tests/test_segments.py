"""Graphs cut at probes: nothing runs twice, whichever way a gate decides, and nothing changes a bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx, nn

import diffcache
from diffcache.cells import COMPUTE, Forecast
from diffcache.finding import SiteFinder
from diffcache.gates import Gate, gate
from diffcache.graphs import count_ops
from diffcache.programs import Carried, Program, Programs
from diffcache.schedule import GateSpec, Online, Row, Schedule
from diffcache.segments import in_order, segment_numbers
from diffcache.sites import Site
from diffcache.tracing import tree
from diffcache.tracing.captured import Captured
from tests.denoisers import CAPTURABLE, FAMILIES
from tests.generation import STEPS, Quiet, Request, make, sample, schedule_of, shared_calibration

SCHEDULE_STEPS = 3


def family(name: str, batch: int = 2) -> tuple[Captured, Any, Any, list[Site], Any]:
    entry = FAMILIES[name]
    args, kwargs = entry.make_inputs(0, batch=batch)
    captured = Captured(entry.make_model())
    bound = captured.bind(args, kwargs)
    variant = captured.add(bound)
    cost, sites = SiteFinder(captured).all(variant, bound)
    return captured, variant, bound, sites, cost


def run(programs: Programs, schedule: Schedule, step: int, column: list[Any], leaves: Any, history: Any) -> Any:
    """One step, segment by segment; returns the result, what was written, and the programs that ran."""
    carried: Carried = {}
    written, ran, result = {}, [], None
    hoisted = programs.prologue(*leaves) if programs.prologue is not None else ()
    for segment in range(len(programs.rows)):
        program = programs.program(schedule, step, column, segment)
        weights = {row: torch.ones(len(column[row].steps)) for row in program.weights}
        result, kept = program(leaves, hoisted, history, column, weights, carried)
        written |= {(*place, step): value for place, value in zip(program.writes, kept, strict=True)}
        ran.append(program)
    return result, written, ran


def names(program: Program) -> list[str]:
    """The captured nodes that a program runs; what passes add has no module call."""
    nodes = program.module.graph.nodes
    return [n.meta.get("captured_as", n.name) for n in nodes if n.op.startswith("call_") and "call" in n.meta]


def same(a: Any, b: Any) -> bool:
    pairs = zip(tree.walk(a), tree.walk(b), strict=True)
    return all(torch.equal(x, y) for (_, x), (_, y) in pairs if isinstance(x, torch.Tensor))


@pytest.mark.parametrize("name", [*(name for name in CAPTURABLE if name not in ("branch", "item", "hooks"))])
def test_no_node_runs_twice_and_no_bit_changes(name: str) -> None:
    _, variant, bound, sites, _ = family(name)
    blocks = [site for site in sites if site.role == "block"] or sites[-3:]
    probes = [blocks[0], blocks[len(blocks) // 2]]
    site = next((s for s in sites if s.role in ("stack", "deepest")), sites[0])
    whole = Programs(variant, (), [site])
    cut = Programs(variant, (), [site], probes=probes)
    leaves = whole.leaves(bound)
    c = COMPUTE
    schedule = Schedule(SCHEDULE_STEPS, (Row(site.name, site.residual, (c, Online(), Online())),))
    with torch.no_grad():
        torch.manual_seed(0)
        expected, kept, _ = run(whole, schedule, 0, [c], leaves, {})
        torch.manual_seed(0)
        result, written, ran = run(cut, schedule, 0, [c], leaves, {})
        assert same(result, expected)
        assert all(torch.equal(written[key], kept[key]) for key in kept)
        assert len(ran) == len(cut.cuts) + 1
        done = [node for program in ran for node in names(program)]
        assert len(set(done)) == len(done), "a node ran twice"
        column = [Forecast((0,), (1.0,))]
        torch.manual_seed(0)
        expected, _, (alone,) = run(whole, schedule, 1, column, leaves, kept)
        torch.manual_seed(0)
        result, _, ran = run(cut, schedule, 1, column, leaves, written)
        assert same(result, expected)
        done = [node for program in ran for node in names(program)]
        assert len(set(done)) == len(done), "a node ran twice"
        assert set(names(alone)) <= set(done)


def test_the_prefix_holds_the_probe_and_what_it_needs() -> None:
    found = shared_calibration()
    variant = found.captured.variants[0]
    sites = {site.role: site for site in found.sites.values()}
    first = next(site for site in found.sites.values() if site.name == "block:blocks.0")
    programs = Programs(variant, (), [sites["stack0"]], probes=[first])
    schedule = schedule_of(found, {"stack0": "CggggggC"})
    prefix = programs.program(schedule, 1, [COMPUTE], 0)
    follows = programs.program(schedule, 1, [Forecast((0,), (1.0,))], 1)
    computes = programs.program(schedule, 1, [COMPUTE], 1)
    assert prefix.probes == ["block:blocks.0"]
    assert count_ops(follows.module.graph) < count_ops(computes.module.graph) / 4
    assert not set(names(prefix)) & set(names(computes))


def test_effects_keep_their_order() -> None:
    """A read before a write stays before it, although the gate needs only the write."""

    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.a(x)
            before = h * 2
            h.mul_(3)
            noise = torch.rand(4)
            probe = h + 1
            return self.b(probe) + before + noise + torch.rand(4)

    graph = diffcache.capture(Writes(), torch.randn(2, 4)).graph_module
    probe = next(node for node in graph.graph.nodes if node.op == "call_method" or node.op == "call_function"
                 if "add" in str(node.target))  # fmt: skip
    cuts = in_order(graph.graph, [Site("probe", "probe", (probe.name,), (None,), "", 0.0, 0)])
    numbers = segment_numbers(graph.graph, cuts)
    by_target = {str(node.target).strip("_"): number for node, number in numbers.items() if isinstance(node, fx.Node)}
    doubled = next(node for node in numbers if "mul" in str(node.target) and "_" not in str(node.target).strip("_"))
    assert numbers[doubled] == 0
    assert by_target["b"] == 1


@gate("recording")
class Recording(Gate):
    """Follows every second step and keeps what it was shown."""

    probe = "block:blocks.0"
    seen: tuple[float, ...] = ()

    def follow(self, moment: Any, numbers: Any) -> Any:
        self.seen = (*self.seen, float(numbers[0, 0]))
        return numbers[:, 0] * 0 + (moment.step % 2) > 0


def test_a_gate_at_a_probe_of_the_graph() -> None:
    found = shared_calibration()
    online = Online("taylor", 2, {"order": 1})
    schedule = schedule_of(found, {"stack0": "Cggggggg"}, GateSpec("recording"), online)
    gated = found.cached(schedule)
    with Quiet():
        first, second = sample(gated, Request(seed=3)), sample(gated, Request(seed=3))
    assert torch.equal(first, second)
    (_, one), (_, two) = gated.decisions
    assert one == two == ["C", "r", "C", "f", "C", "f", "C", "f"]
    # the same decisions as a fixed schedule: the same bits
    fixed = found.cached(schedule_of(found, {"stack0": "CrCfCfCf"}, weights=(1.5, -0.5)))
    assert torch.equal(sample(fixed, Request(seed=3)), first)
    assert 0 < gated.flops < gated.flops_in_full


def test_a_gate_that_always_vetoes_changes_no_bit() -> None:
    found = shared_calibration()
    spec = GateSpec("accumulated_change", {"threshold": 0.0, "probe": "block:blocks.0"})
    gated = found.cached(schedule_of(found, {"stack0": "Cggggggg"}, spec))
    with Quiet():
        assert torch.equal(sample(gated, Request(seed=3)), sample(make(), Request(seed=3)))
    assert gated.steps_forecast == 0
    assert gated.flops == gated.flops_in_full
    assert len(gated.decisions[0][1]) == STEPS
