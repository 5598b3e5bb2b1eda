"""Sites: which are found in which family, and that every one of them is a true cut."""

from __future__ import annotations

import contextlib
import functools
import inspect
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import fx

from diffcache.anatomy import Anatomy
from diffcache.cost import Cost, measure_cost
from diffcache.liveness import live_nodes
from diffcache.sites import ROLES, Site, all_sites, describe, find_sites, named_site
from diffcache.tracing.captured import capture
from tests.denoisers import CAPTURABLE, FAMILIES
from tests.token_denoisers import TOKENS

# Sites that are made when they are asked for by name; a denoiser may have some of these only.
REQUESTS = ("blocks[0:1]", "blocks[1:]", "blocks[1:-1]", "blocks[1:3]", "prefix[1]", "deep[0]", "deep[2]", "encoder")


@dataclass(frozen=True)
class Found:
    """A capture with its cost and its sites; ``inputs`` are one call's arguments by parameter name."""

    graph: fx.GraphModule
    cost: Cost
    anatomy: Anatomy
    sites: list[Site]
    inputs: dict[str, Any]

    @functools.cached_property
    def requested(self) -> list[Site]:
        """What this denoiser has of ``REQUESTS``."""
        made = []
        for name in REQUESTS:
            with contextlib.suppress(ValueError):
                made.append(named_site(self.anatomy, name))
        return made

    def by_role(self, role: str) -> list[Site]:
        return [site for site in self.sites if site.role == role]

    def named(self, name: str) -> Site:
        return next(site for site in self.sites if site.name == name)

    def share(self, site: Site) -> float:
        return site.flops_saved / self.cost.total


@functools.cache
def found(name: str, batch: int = 2, scale: int = 1) -> Found:
    entry = {**FAMILIES, **TOKENS}[name]
    args, kwargs = entry.make_inputs(1, batch=batch, scale=scale)
    with torch.no_grad():
        variant = capture(entry.make_model(), *args, **kwargs).variants[-1]
    graph = variant.graph_module
    cost = measure_cost(graph, args, kwargs)
    inputs = dict(inspect.signature(graph.forward).bind(*args, **kwargs).arguments)
    anatomy = Anatomy(graph, variant.trace.calls, cost)
    return Found(graph, cost, anatomy, all_sites(anatomy), inputs)


# -- what is found ----------------------------------------------------------------------------------------------------


def names(name: str, *roles: str) -> list[str]:
    return sorted(site.name for site in found(name).sites if site.role in roles)


def test_plain_transformer():
    assert names("dit", "block") == [f"block:blocks.{i}" for i in range(4)]
    assert names("dit", "attention") == [f"attn:blocks.{i}.attn" for i in range(4)]
    assert names("dit", "feedforward") == [f"ff:blocks.{i}.mlp" for i in range(4)]
    assert names("dit", "output", "stack", "stack0", "stack2") == [
        "output",
        "stack0:blocks.0..blocks.3",
        "stack2:blocks.0..blocks.3",
        "stack:blocks.0..blocks.3",
    ]


@pytest.mark.parametrize(
    ("name", "stack"),
    [
        ("dit", "blocks.0..blocks.3"),
        ("class_dit", "transformer_blocks.0..transformer_blocks.2"),
        ("flux", "transformer_blocks.0..single_transformer_blocks.2"),
        ("sd3", "transformer_blocks.0..transformer_blocks.3"),
        ("pixart", "transformer_blocks.0..transformer_blocks.2"),
        ("wan", "blocks.0..blocks.2"),
        ("stable_audio", "transformer_blocks.0..transformer_blocks.2"),
        ("skip_dit", "blocks.0..blocks.4"),
    ],
)
def test_one_stack_on_the_residual_after_the_first_block(name: str, stack: str):
    (site,) = found(name).by_role("stack")
    assert site.name == f"stack:{stack}"
    assert site.residual
    first = stack.split("..")[0]
    (anchor,) = site.anchors
    block = found(name).named(f"block:{first}")
    assert anchor in block.values
    assert found(name).by_role("stack0")[0].flops_saved > site.flops_saved


def test_joint_blocks_are_cut_through_both_streams():
    site = found("flux").named("block:transformer_blocks.1")
    assert len(site.values) == 2
    assert site.anchors == found("flux").named("block:transformer_blocks.0").values


def test_the_stack_of_a_joint_transformer_is_anchored_on_the_image_stream():
    for name in ("flux", "sd3"):
        case = found(name)
        (site,) = case.by_role("stack")
        (anchor,) = site.anchors
        specs = {node.name: node.meta.get("val") for node in case.graph.graph.nodes}
        assert specs[anchor] == specs[site.values[0]]
        assert case.share(site) > 0.7


def test_cross_attention_transformer_has_two_attentions_a_block():
    for name in ("pixart", "wan"):
        assert len(found(name).by_role("attention")) == 2 * len(found(name).by_role("block"))
        assert len(found(name).by_role("feedforward")) == len(found(name).by_role("block"))


def test_unet_is_cut_at_every_skip():
    case = found("sdxl_unet")
    assert not case.by_role("stack")
    (deepest,) = case.by_role("deepest")
    assert deepest.name == "deep:up_blocks.2.resnets.1"
    deep = [site.name for site in case.by_role("deep")]
    assert deep[:5] == [
        "deep:up_blocks.2.resnets.0",
        "deep:up_blocks.1",
        "deep:up_blocks.1.attentions.1",
        "deep:up_blocks.1.attentions.0",
        "deep:up_blocks.0",
    ]


def test_the_deepest_cut_keeps_the_shallow_level_live():
    case = found("sdxl_unet")
    (deepest,) = case.by_role("deepest")
    nodes = {node.name: node for node in case.graph.graph.nodes}
    live = {n.name for n in live_nodes(case.graph.graph, [nodes[v] for v in deepest.values])}
    assert {"conv_in", "conv_out"} <= live
    dead = {n.meta.get("path", "").split(".")[0] for n in nodes.values() if n.name not in live}
    assert "mid_block" in dead
    assert not any(nodes[name].meta.get("path", "").startswith(("mid_block", "up_blocks.0")) for name in live)
    assert 0.5 < case.share(deepest) < 1.0


def test_long_skips_give_deep_cuts_in_a_transformer_too():
    assert found("skip_dit").by_role("deepest")


def test_no_deep_cuts_without_skips():
    for name in ("dit", "flux", "sd3", "pixart", "wan", "random"):
        assert not found(name).by_role("deepest"), name


@pytest.mark.parametrize("name", CAPTURABLE)
def test_every_denoiser_has_its_output_and_an_inner_site(name: str):
    case = found(name)
    assert len(case.by_role("output")) == 1
    assert any(site.role != "output" for site in case.sites)
    assert all(len(case.by_role(role)) <= 1 for role in ("output", "stack", "deepest"))
    assert {site.role for site in case.sites} <= set(ROLES)
    assert len({site.name for site in case.sites}) == len(case.sites)
    saved = [site.flops_saved for site in case.sites]
    assert saved == sorted(saved, reverse=True)


@pytest.mark.parametrize("name", CAPTURABLE)
def test_sites_are_no_memory_that_is_written(name: str):
    case = found(name)
    nodes = {node.name: node for node in case.graph.graph.nodes}
    for site in case.sites:
        for value in (*site.values, *(anchor for anchor in site.anchors if anchor)):
            assert not nodes[value].meta.get("mutated")


@pytest.mark.parametrize("name", ["dit", "flux", "sd3", "pixart", "wan", "stable_audio", "sdxl_unet"])
def test_names_are_the_same_at_another_size(name: str):
    larger = found(name, batch=1, scale=FAMILIES[name].scales[-1])
    main = ("output", "stack", "stack0", "stack2", "deepest", "block")
    assert {s.name for s in found(name).sites if s.role in main} == {s.name for s in larger.sites if s.role in main}


def test_describe_lists_every_site():
    case = found("flux")
    text = describe(case.sites, case.graph, case.cost)
    assert len(text.splitlines()) == len(case.sites) + 1
    assert "stack:transformer_blocks.0..single_transformer_blocks.2" in text
    assert "%" in text
    assert len(describe(case.sites).splitlines()) == len(case.sites) + 1


def test_a_cost_of_another_graph_is_refused():
    case = found("dit")
    with pytest.raises(ValueError, match="measure the cost"):
        find_sites(case.graph, [], Cost({}, 0.0))


# -- every site is a true cut -----------------------------------------------------------------------------------------


class Recording(fx.Interpreter):
    """Runs a graph on arguments by name and keeps every value."""

    def __init__(self, module: fx.GraphModule, inputs: dict[str, Any], graph: fx.Graph | None = None) -> None:
        super().__init__(module, garbage_collect_values=False, graph=graph)
        self.inputs = inputs
        self.values: dict[str, Any] = {}

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self.inputs[str(target).lstrip("*")]

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.values[n.name] = value.clone() if isinstance(value, torch.Tensor) else value
        return value


def given(case: Found, site: Site) -> fx.Graph:
    """The graph with the site's values as further inputs ``given_0``, ...; what then is dead is left out."""
    nodes = {node.name: node for node in case.graph.graph.nodes}
    values = [nodes[name] for name in site.values]
    live = live_nodes(case.graph.graph, values, [nodes[name] for name in site.anchors if name])
    graph = fx.Graph()
    copies = {value: graph.placeholder(f"given_{index}") for index, value in enumerate(values)}
    for node in case.graph.graph.nodes:
        if node in live:
            copy = graph.node_copy(node, copies.__getitem__)
            copies.setdefault(node, copy)  # a given value stays given where its node must still run
    return graph


def result(output: Any) -> torch.Tensor:
    value = output[0] if isinstance(output, tuple) else output
    return value if isinstance(value, torch.Tensor) else value.sample


@pytest.mark.parametrize("name", [*CAPTURABLE, *TOKENS])
def test_the_true_value_in_a_sites_place_gives_the_true_result(name: str):
    case = found(name)
    with torch.no_grad():
        torch.manual_seed(7)
        full = Recording(case.graph, case.inputs)
        expected = result(full.run())
        for site in (*case.sites, *case.requested):
            pruned = given(case, site)
            for residual in {False, site.residual}:
                fed = {}
                for index, (value, anchor) in enumerate(zip(site.values, site.anchors, strict=True)):
                    truth = full.values[value]
                    base = full.values[anchor] if residual and anchor else None
                    fed[f"given_{index}"] = truth if base is None else base + (truth - base)
                torch.manual_seed(7)
                got = result(Recording(case.graph, {**case.inputs, **fed}, pruned).run())
                if residual:
                    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4, msg=site.name)
                else:
                    assert torch.equal(got, expected), site.name


@pytest.mark.parametrize("name", [*CAPTURABLE, *TOKENS])
def test_flops_saved_is_the_cost_of_what_is_gone(name: str):
    case = found(name)
    whole = case.cost.of(live_nodes(case.graph.graph))
    for site in (*case.sites, *case.requested):
        left = {node.name for node in given(case, site).nodes}
        kept = case.cost.of(node for node in case.graph.graph.nodes if node.name in left)
        assert site.flops_saved == pytest.approx(whole - kept, abs=1e-6 * whole), site.name


@pytest.mark.parametrize("name", [*CAPTURABLE, *TOKENS])
def test_anchors_match_their_values_and_do_not_need_them(name: str):
    case = found(name)
    nodes = {node.name: node for node in case.graph.graph.nodes}
    order = {node: i for i, node in enumerate(nodes)}
    for site in (*case.sites, *case.requested):
        assert len(site.values) == len(site.anchors)
        assert site.bytes_kept == sum(nodes[value].meta["val"].bytes for value in site.values)
        left = {node.name for node in given(case, site).nodes}
        for value, anchor in zip(site.values, site.anchors, strict=True):
            if anchor is not None:
                assert nodes[anchor].meta["val"] == nodes[value].meta["val"]
                assert order[anchor] < order[value]
                assert anchor in left
