"""Sites by name, depth, kind and level: what a recipe can ask for on any denoiser."""

from __future__ import annotations

import pytest
import torch

from diffcache.profiling import Calibration, calibrate
from diffcache.ranges import deep_name, prefix_name, range_name
from diffcache.sites import Site, find_sites, named_site
from tests import generation
from tests.denoisers import FAMILIES
from tests.test_sites import REQUESTS, found


def site(name: str, wanted: str) -> Site:
    case = found(name)
    return named_site(case.anatomy, wanted, case.sites)


# -- depth and kind ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("dit", ["self"] * 4),
        ("flux", ["joint"] * 5),
        ("sd3", ["joint"] * 4),
        ("aura", ["joint"] * 5),
        ("pixart", ["self", "cross"] * 3),
        ("wan", ["self", "cross"] * 3),
        ("stable_audio", ["self", "cross"] * 3),  # one token that holds the timestep is no text
        ("latte", ["spatial", "cross", "temporal"] * 3),
        ("square_latte", ["spatial", "cross", "temporal"] * 3),
        ("allegro", ["self", "cross"] * 3),
        ("cogvideo", ["joint"] * 3),
    ],
)
def test_what_attention_looks_at(name: str, kinds: list[str]):
    attentions = sorted(found(name).by_role("attention"), key=lambda site: (site.depth, site.path))
    assert [site.kind for site in attentions] == kinds


def test_video_unet_has_spatial_cross_and_temporal_attention():
    by_kind: dict[str, set[str]] = {}
    for attention in found("motion_unet").by_role("attention"):
        by_kind.setdefault(attention.kind, set()).add("motion" if "motion" in attention.path else attention.path[-5:])
    assert by_kind == {"spatial": {"attn1"}, "cross": {"attn2"}, "temporal": {"motion"}}


def test_depth_counts_on_through_both_stacks():
    case = found("flux")
    assert [site.depth for site in sorted(case.by_role("block"), key=lambda site: site.depth)] == [0, 1, 2, 3, 4]
    assert {site.blocks for site in case.sites} == {5}
    assert case.named("block:single_transformer_blocks.0").depth == 2
    assert case.named("attn:single_transformer_blocks.2.attn").depth == 4
    assert case.named("ff:transformer_blocks.1.ff").depth == 1


def test_depth_counts_spatial_and_temporal_blocks_in_turn():
    assert [site("latte", f"block:{path}").depth for path in ("transformer_blocks.1", "temporal_transformer_blocks.1")
            ] == [2, 3]  # fmt: skip


def test_stack_sites_begin_at_a_depth():
    case = found("flux")
    assert [case.by_role(role)[0].depth for role in ("stack0", "stack", "stack2")] == [0, 1, 2]


# -- the U of a U-Net -------------------------------------------------------------------------------------------------


def test_blocks_of_a_unet_know_their_level_and_side():
    case = found("sdxl_unet")
    assert {site.depth for site in case.by_role("block")} == {-1}
    where = {site.name: (site.level, site.side) for site in case.by_role("block")}
    assert where["block:down_blocks.0.resnets.0"] == (0, "down")
    assert where["block:down_blocks.1.attentions.0"] == (1, "down")
    assert where["block:mid_block.resnets.1"] == (2, "mid")
    assert where["block:up_blocks.0.resnets.0"] == (2, "up")
    assert where["block:up_blocks.2.resnets.2"] == (0, "up")


def test_residual_blocks_on_the_way_up_are_anchored_on_their_shortcut():
    case = found("sdxl_unet")
    resnets = [site for site in case.by_role("block") if ".resnets." in site.name]
    assert len(resnets) == 2 * 3 + 2 + 3 * 3
    assert all(site.residual for site in resnets)
    for index in range(3):
        up = case.named(f"block:up_blocks.1.resnets.{index}")
        assert up.anchors == (f"up_blocks_1_resnets_{index}_conv_shortcut",)


def test_attention_is_found_inside_a_unets_transformer_blocks():
    attentions = found("sdxl_unet").by_role("attention")
    assert {site.kind for site in attentions} == {"self", "cross"}
    assert len(attentions) == 2 * (2 * 1 + 2 * 2 + 1 * 2 + 3 * 2 + 3 * 1)


def test_deep_features_are_counted_as_deepcache_counts_branches():
    case = found("sdxl_unet")
    assert len(case.anatomy.skips) == 9
    around = [skip.around[0].name for skip in case.anatomy.skips]
    assert around[:4] == [
        "conv_in",
        "down_blocks_0_resnets_0_div",
        "down_blocks_0_resnets_1_div",
        "down_blocks_0_downsamplers_0_conv",
    ]
    (deepest,) = case.by_role("deepest")
    assert deepest.depth == 0
    assert [site.depth for site in case.by_role("deep")] == [1, 2, 3, 4, 5, 6]
    assert site("sdxl_unet", deep_name(0)).values == deepest.values
    assert site("sdxl_unet", "deep[-1]").values == ("mid_block_resnets_1_div",)


def test_the_output_less_the_latent():
    for name in ("flux", "wan", "sdxl_unet"):
        transform = site(name, "output-latent")
        assert transform.residual
        assert transform.anchors == (found(name).anatomy.flow.latent.name,)
        assert transform.values == found(name).by_role("output")[0].values
    with pytest.raises(ValueError, match=r"needs a result of the latent's shape and dtype; got .*8.* and .*4"):
        site("pixart", "output-latent")  # which returns a variance beside the noise


def test_the_encoder_is_the_middle_and_every_skip():
    encoder = site("sdxl_unet", "encoder")
    assert encoder.values[0] == "mid_block_resnets_1_div"
    assert encoder.values[1:] == tuple(skip.around[0].name for skip in found("sdxl_unet").anatomy.skips)
    assert not encoder.residual
    deepest = found("sdxl_unet").by_role("deepest")[0]
    assert 0 < encoder.flops_saved < deepest.flops_saved


def test_long_skips_of_a_transformer_count_too():
    assert [skip.around[0].name for skip in found("skip_dit").anatomy.skips] == ["blocks_0_add_5", "blocks_1_add_5"]


@pytest.mark.parametrize("name", ["dit", "flux", "sd3", "pixart", "wan", "aura", "latte", "cogvideo", "random"])
def test_two_streams_or_two_pieces_are_no_skip(name: str):
    assert not found(name).anatomy.skips
    assert {site.side for site in found(name).sites} == {""}


# -- runs of blocks ---------------------------------------------------------------------------------------------------


def test_names_read_as_slices():
    assert [range_name(8, -2), range_name(0, 1), range_name(1), range_name(0)] == [
        "blocks[8:-2]",
        "blocks[:1]",
        "blocks[1:]",
        "blocks[:]",
    ]
    assert prefix_name(3) == "prefix[3]"


@pytest.mark.parametrize(
    "name", ["dit", "class_dit", "flux", "sd3", "pixart", "wan", "stable_audio", "aura", "allegro"]
)
def test_the_whole_run_is_the_stack_site(name: str):
    for role, wanted in (("stack0", "blocks[:]"), ("stack", "blocks[1:]")):
        (stack,) = found(name).by_role(role)
        run = site(name, wanted)
        assert (run.values, run.anchors, run.flops_saved) == (stack.values, stack.anchors, stack.flops_saved)
        assert run.role == "range"


@pytest.mark.parametrize("name", ["dit", "class_dit", "flux", "sd3", "pixart", "wan", "stable_audio"])
def test_one_block_is_the_block_site(name: str):
    for block in found(name).by_role("block"):
        run = site(name, range_name(block.depth, block.depth + 1))
        assert set(zip(run.values, run.anchors, strict=True)) == set(zip(block.values, block.anchors, strict=True))
        assert run.depth == block.depth


@pytest.mark.parametrize(("name", "wanted"), [("dit", "blocks[1:-1]"), ("flux", "blocks[1:4]"), ("sd3", "blocks[:3]")])
def test_a_run_saves_what_its_blocks_save(name: str, wanted: str):
    run = site(name, wanted)
    first = run.depth
    blocks = {block.depth: block.flops_saved for block in found(name).by_role("block")}
    last = blocks[max(blocks)]
    inner = {"blocks[1:-1]": [1, 2], "blocks[1:4]": [1, 2, 3], "blocks[:3]": [0, 1, 2]}[wanted]
    assert first == inner[0]
    assert run.residual
    assert run.flops_saved == pytest.approx(sum(blocks[i] for i in inner), abs=0.02 * last)


def test_a_run_of_joint_blocks_keeps_both_streams():
    run = site("flux", "blocks[1:4]")  # from the double-stream stack into the single-stream one
    assert len(run.values) == len(run.anchors) == 2
    assert run.residual


def test_runs_hold_tokens_in_one_order_at_both_ends():
    for name in ("latte", "square_latte"):  # in the square one frames and places cannot be told by their number
        case = found(name)
        for first in range(6):
            for last in range(first + 1, 7):
                run = site(name, range_name(first, last))
                nodes = case.anatomy.flow.by_name
                (value,), (anchor,) = run.values, run.anchors
                held = [[{n for names, _ in axis for n in names} for axis in case.anatomy.axes[nodes[name]]]
                        for name in (value, anchor)]  # fmt: skip
                assert held[0] == held[1], run.name


@pytest.mark.parametrize(
    ("name", "wanted", "says"),
    [
        ("dit", "blocks[2:2]", "holds none of the 4 blocks"),
        ("dit", "blocks[1:9]", "reaches past the 4 blocks"),
        ("dit", "prefix[4]", "none of the 4 blocks"),
        ("dit", "deep[0]", "no skip connections"),
        ("dit", "encoder", "has none"),
        ("dit", "block", "no site is named 'block'; there are output"),
        ("sdxl_unet", "blocks[1:]", "ask for deep.branch. or encoder"),
        ("sdxl_unet", "deep[9]", "9 skip connections"),
        ("aura", "blocks[1:-1]", r"ask for blocks\[1:5\] or blocks\[1:2\] or blocks\[2:4\]"),
        ("inplace", "blocks[1:3]", "written in place"),
    ],
)
def test_what_there_is_none_of_is_refused(name: str, wanted: str, says: str):
    with pytest.raises(ValueError, match=says):
        site(name, wanted)


def test_a_run_over_two_stacks_takes_the_stream_that_goes_on():
    (value,) = site("aura", "blocks[1:]").values
    assert site("aura", "blocks[1:]").residual
    assert value == found("aura").by_role("stack")[0].values[0]
    assert site("aura", "blocks[2:4]").residual  # within the second stack, on its concatenated stream


def test_a_prefix_has_no_anchor_and_ends_all_before_it():
    case = found("flux")
    prefix = site("flux", "prefix[2]")
    assert prefix.anchors == (None, None)
    assert prefix.values == case.named("block:single_transformer_blocks.0").values
    assert prefix.flops_saved > sum(b.flops_saved for b in case.by_role("block") if b.depth <= 2)


def test_wanted_sites_are_among_those_found():
    case = found("dit")
    variant_sites = find_sites(case.graph, case.anatomy.flow.calls, case.cost, wanted=["blocks[1:-1]", "output"])
    assert [s.name for s in variant_sites].count("blocks[1:-1]") == 1
    assert len(variant_sites) == len(case.sites) + 1
    with pytest.raises(ValueError, match="no site is named 'blocks'"):
        find_sites(case.graph, case.anatomy.flow.calls, case.cost, wanted=["blocks"])


@pytest.mark.parametrize("name", ["dit", "flux", "sd3", "pixart", "wan", "stable_audio", "sdxl_unet", "aura"])
def test_names_mean_the_same_at_another_size(name: str):
    scales = FAMILIES[name].scales if name in FAMILIES else (1,)
    here, there = found(name), found(name, batch=1, scale=scales[-1])
    assert [s.name for s in here.requested] == [s.name for s in there.requested]
    for name_ in [s.name for s in here.requested] + [
        s.name for s in here.sites if s.role in ("attention", "feedforward")
    ]:
        one, other = (named_site(case.anatomy, name_, case.sites) for case in (here, there))
        assert (one.values, one.anchors) == (other.values, other.anchors)
        assert (one.depth, one.blocks, one.kind, one.level, one.side) == (
            other.depth,
            other.blocks,
            other.kind,
            other.level,
            other.side,
        )


# -- at work ----------------------------------------------------------------------------------------------------------


def test_calibration_measures_the_sites_it_is_asked_for():
    wanted = ("blocks[1:2]", "prefix[0]", "blocks[:-1]")
    calibration = _calibrated(wanted)
    profiled = {site.name for site in calibration.profile.sites}
    assert profiled >= set(wanted)
    assert calibration.sites["blocks[1:2]"].residual
    assert not calibration.sites["prefix[0]"].residual
    with pytest.raises(ValueError, match="reaches past the 3 blocks"):
        _calibrated(("blocks[:4]",))


def test_a_site_made_on_request_is_forecast():
    calibration = _calibrated(("blocks[1:2]",))
    site = calibration.sites["blocks[1:2]"]
    schedule = generation.schedule_of(calibration, {site.name: "CCrCrCrC"})
    denoiser = calibration.cached(schedule)
    request = generation.ITEMS[0]
    with generation.Quiet():
        got = generation.sample(denoiser, request)
    assert denoiser.steps_forecast == 3
    assert not torch.equal(got.flatten(), calibration.references[0])


def _calibrated(wanted: tuple[str, ...]) -> Calibration:
    return calibrate(
        generation.make(),
        lambda denoiser, index: generation.sample(denoiser, generation.ITEMS[index]).flatten(),
        2,
        sensitivity_prompts=0,
        wanted=wanted,
    )


def test_requests_are_met_somewhere():
    met = {s.name for name in ("dit", "flux", "sdxl_unet") for s in found(name).requested}
    assert met == set(REQUESTS)
