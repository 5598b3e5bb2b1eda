"""Probes: that they are cheap, and that they hang on what they should, in every family."""

from __future__ import annotations

import functools

import pytest

from diffcache.probes import find_probes, probe_flops
from diffcache.sites import Site
from diffcache.timestep import clock_node
from tests.denoisers import CAPTURABLE
from tests.test_sites import found
from tests.token_denoisers import TOKENS

EVERYWHERE = {"latent", "output", "timestep", "modulated"}
WITH_BLOCKS = ("dit", "class_dit", "flux", "sd3", "pixart", "wan", "stable_audio", "latte", "cogvideo", "aura")


@functools.cache
def probes(name: str) -> dict[str, Site]:
    return find_probes(found(name).anatomy)


def hangs_on(name: str, probe: Site) -> tuple[bool, bool]:
    """Whether any of a probe's values hangs on the latent, and on the timestep."""
    flow = found(name).anatomy.flow
    timed = flow.reached_from(clock_node(flow))
    values = flow.named(probe.values)
    return any(v in flow.from_latent for v in values), any(v in timed for v in values)


def share(name: str, probe: str) -> float:
    anatomy = found(name).anatomy
    return probe_flops(anatomy, probes(name)[probe]) / anatomy.flow.total


@pytest.mark.parametrize("name", [*CAPTURABLE, *TOKENS])
def test_every_denoiser_has_the_probes_that_need_no_blocks(name: str):
    assert set(probes(name)) >= EVERYWHERE
    assert {probe.role for probe in probes(name).values()} == {"probe"}
    assert hangs_on(name, probes(name)["latent"]) == (True, False)
    assert hangs_on(name, probes(name)["timestep"]) == (False, True)
    assert hangs_on(name, probes(name)["modulated"]) == (True, True)
    assert hangs_on(name, probes(name)["output"]) == (True, True)


@pytest.mark.parametrize("name", [*CAPTURABLE, *TOKENS])
def test_looking_costs_little(name: str):
    assert share(name, "latent") == 0
    assert share(name, "timestep") < 0.05
    assert share(name, "modulated") < 0.15
    assert share(name, "output") > 0.9


@pytest.mark.parametrize("name", WITH_BLOCKS)
def test_the_first_block_costs_one_block(name: str):
    case = found(name)
    blocks = case.anatomy.trunk
    assert share(name, "stack_input") < 0.05
    assert share(name, "modulated") < 0.08
    first = probes(name)["first_block"]
    assert all(anchor is not None for anchor in first.anchors)
    alone = case.anatomy.flow.call_flops[blocks[0].call] / case.anatomy.flow.total
    assert alone <= share(name, "first_block") < alone + 0.08
    two = find_probes(case.anatomy, ["blocks[:2]"])["blocks[:2]"]
    assert two.role == "probe"
    assert probe_flops(case.anatomy, two) > probe_flops(case.anatomy, first)


@pytest.mark.parametrize(
    ("name", "node"),
    [
        ("dit", "blocks_0_add_1"),
        ("flux", "transformer_blocks_0_norm1_add_1"),
        ("sd3", "transformer_blocks_0_norm1_add_1"),
        ("pixart", "transformer_blocks_0_add_2"),
        ("wan", "blocks_0_type_as"),
        ("class_dit", "transformer_blocks_0_norm1_add_1"),
        ("stable_audio", "transformer_blocks_0_norm1"),  # takes the timestep as a token: no modulation
    ],
)
def test_modulated_is_what_the_first_attention_projects(name: str, node: str):
    assert probes(name)["modulated"].values == (node,)
    first = found(name).anatomy.trunk[0].name
    assert probes(name)[f"modulated:{first}"].values == (node,)


@pytest.mark.parametrize(
    ("name", "node"),
    [("flux", "time_text_embed_add"), ("wan", "unflatten"), ("pixart", "adaln_single_linear"), ("sdxl_unet", "add")],
)
def test_the_timestep_is_what_blocks_read_of_it(name: str, node: str):
    assert probes(name)["timestep"].values == (node,)


def test_blocks_and_their_children_have_inputs():
    named = probes("flux")
    assert len(named["input:transformer_blocks.1"].values) == 2  # picture and text
    assert len(named["input:transformer_blocks.1.attn"].values) == 2
    assert named["input:transformer_blocks.0"].values == named["stack_input"].values  # the text is not yet mixed in
    assert named["modulated:single_transformer_blocks.0"].values == ("single_transformer_blocks_0_norm_add_1",)
    paths = {site.name.partition(":")[2] for site in found("flux").sites if site.role in ("attention", "feedforward")}
    assert {name.partition(":")[2] for name in named if name.startswith("input:")} >= paths


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_the_picture_comes_before_the_text(name: str):
    """A gate looks at the first value: FBCache and DBCache at what the first blocks add to the picture."""
    flow, named = found(name).anatomy.flow, find_probes(found(name).anatomy, ["blocks[:2]"])
    for probe in ("first_block", "blocks[:2]", "input:transformer_blocks.1", "input:transformer_blocks.1.attn"):
        picture, text = (flow.spec(node).shape[1] for node in flow.named(named[probe].values))
        assert picture == flow.spec(flow.named(named["stack_input"].values)[0]).shape[1]
        assert text != picture


def test_the_clock_may_be_given():
    anatomy = found("flux").anatomy
    assert find_probes(anatomy, clock="timestep")["timestep"] == probes("flux")["timestep"]
    with pytest.raises(ValueError, match="no input is named 'sigma'"):
        find_probes(anatomy, clock="sigma")


def test_an_unknown_probe_is_refused():
    with pytest.raises(ValueError, match="no probe is named 'residual'; there are latent"):
        find_probes(found("dit").anatomy, ["residual"])
