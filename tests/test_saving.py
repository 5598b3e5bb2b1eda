"""Saving and loading: the same bits after a round trip, nothing but JSON and safetensors, clear refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import diffcache
from diffcache import recipes
from diffcache.profile_record import Profile
from tests.generation import ITEMS, Request, TextDiT, compiled, make, sample
from tests.pipelines import digits_pipeline, images
from tests.plain_denoisers import CounterDiT
from tests.test_compile import DIGITS, TwoStage, draw

MANIFEST = "diffcache.json"
ITEM = {"prompt": "a slanted two"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compiled bare module's folder; tests copy what they damage."""
    folder = tmp_path_factory.mktemp("saved") / "new" / "folder"
    compiled().save(folder)
    return folder


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_a_module_gives_the_same_bits_after_loading(tmp_path: Path) -> None:
    fast = compiled()
    fast.save(tmp_path)
    for model in (fast.denoiser, make(), fast):  # the same object, a copy of it, the compiled one
        again = diffcache.load(model, tmp_path)
        assert torch.equal(sample(again, Request(seed=9)), sample(fast, Request(seed=9)))
        assert again.schedule == fast.schedule
        assert again.report == fast.report
        assert again.pattern == fast.pattern
        assert not isinstance(again.denoiser, diffcache.CachedDenoiser)
    again.save(tmp_path / "twice")
    assert (tmp_path / "twice" / MANIFEST).read_text() == (tmp_path / MANIFEST).read_text()


def test_a_pipeline_gives_the_same_bits_after_loading(tmp_path: Path) -> None:
    fast = diffcache.compile(digits_pipeline(), DIGITS, recipe=recipes.uniform(interval=2), verbose=False)
    fast.save(tmp_path)
    again = diffcache.load(digits_pipeline(), tmp_path)
    assert type(again) is type(fast)
    assert torch.equal(images(again, ITEM, 1), images(fast, ITEM, 1))
    assert str(again.schedule) == str(fast.schedule)
    assert str(again.report) == str(fast.report)
    bare = diffcache.load(digits_pipeline().transformer, tmp_path)
    assert bare.schedule == fast.schedule


def test_two_denoisers_give_the_same_bits_after_loading(tmp_path: Path) -> None:
    fast = diffcache.compile(TwoStage(), [{"prompt": 1}], recipe=recipes.uniform(interval=2), verbose=False)
    fast.save(tmp_path)
    again = diffcache.load(TwoStage(), tmp_path)
    assert torch.equal(again(7), fast(7))
    assert set(again.schedule) == {"high", "low"}
    with pytest.raises(ValueError, match="holds 2 denoisers"):
        diffcache.load(make(), tmp_path)


def test_a_searched_schedule_and_its_profile(tmp_path: Path) -> None:
    fast = diffcache.compile(make(), list(ITEMS), sample=sample, verbose=False)
    fast.save(tmp_path)
    again = diffcache.load(make(), tmp_path)
    assert torch.equal(sample(again, Request(seed=9)), sample(fast, Request(seed=9)))
    assert isinstance(again.profile, Profile)
    # the stored profile is enough for another budget
    other = diffcache.search(again.profile, diffcache.Speedup(1.5))
    assert other[0].flops_fraction <= 1 / 1.5


def test_exact_and_uncached_models_load(tmp_path: Path) -> None:
    exact = compiled_exact()
    exact.save(tmp_path / "exact")
    again = diffcache.load(make(), tmp_path / "exact")
    assert torch.equal(sample(again, Request(seed=9)), sample(make(), Request(seed=9)))
    with pytest.warns(UserWarning, match="runs uncached"):
        fast = diffcache.compile(CounterDiT().eval(), list(ITEMS), sample=draw, on_uncapturable="eager", verbose=False)
    fast.save(tmp_path / "uncached")
    again = diffcache.load(fast.denoiser, tmp_path / "uncached")
    for model in (fast, again):
        fast.denoiser.calls = 0
        last = draw(model, Request())
    fast.denoiser.calls = 0
    assert torch.equal(draw(fast.denoiser, Request()), last)


def compiled_exact() -> Any:
    return diffcache.compile(make(), list(ITEMS), sample=sample, budget=diffcache.Exact(), verbose=False)


def test_leaf_modules_are_remembered(tmp_path: Path) -> None:
    fast = compiled(leaf_modules=["blocks.0", "blocks.1", "blocks.2"])
    assert fast.report is not None
    assert fast.report.nodes < 40
    fast.save(tmp_path)
    again = diffcache.load(make(), tmp_path)
    assert torch.equal(sample(again, Request(seed=9)), sample(fast, Request(seed=9)))
    assert str(again.captured) == str(fast.captured)


def test_only_json_and_safetensors(saved: Path) -> None:
    assert sorted(file.name for file in saved.iterdir()) == [
        "denoiser.profile.safetensors",
        "denoiser.schedule.json",
        MANIFEST,
    ]
    for file in saved.glob("*.json"):
        json.loads(file.read_text())
    with safe_open(saved / "denoiser.profile.safetensors", framework="np") as file:
        assert list(file.keys())
    weights = sum(p.numel() * 4 for p in make().parameters())
    assert sum(file.stat().st_size for file in saved.iterdir()) < weights + 100_000, "weights stay with the model"


class Wider(TextDiT):
    def __init__(self) -> None:
        super().__init__(dim=32)


class Deeper(TextDiT):
    def __init__(self) -> None:
        super().__init__(depth=4)


@pytest.mark.parametrize("other", [Wider, Deeper])
def test_another_model_is_refused(saved: Path, other: type[TextDiT]) -> None:
    with pytest.raises(ValueError, match=rf"made for another model.*{other.__name__}.*strict=False"):
        diffcache.load(other(), saved)


def test_strict_false_goes_by_the_names_of_sites(saved: Path) -> None:
    wider = diffcache.load(make(Wider), saved, strict=False)
    result, reference = sample(wider, Request(seed=9)), sample(make(Wider), Request(seed=9))
    assert wider.steps_forecast > 0
    assert 0 < (result - reference).norm() < 0.2 * reference.norm()
    deeper = diffcache.load(make(Deeper), saved, strict=False)
    with pytest.warns(UserWarning, match=r"sites \['stack.*blocks.2'\] are not in the graph of this call"):
        result = sample(deeper, Request(seed=9))
    assert torch.equal(result, sample(make(Deeper), Request(seed=9)))


class OtherGraph(TextDiT):
    """The modules of a TextDiT in another program."""

    def forward(self, x: torch.Tensor, t: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x, t, prompt).tanh()


def test_the_same_modules_in_another_program_are_noticed(saved: Path) -> None:
    OtherGraph.__qualname__ = "TextDiT"
    loaded = diffcache.load(make(OtherGraph), saved)
    with pytest.warns(UserWarning, match="graph of this call is not the one .*calibrated"):
        sample(loaded, Request(seed=9))


def test_a_pipeline_without_the_component_is_refused(saved: Path) -> None:
    with pytest.raises(ValueError, match="for component 'denoiser', which this DigitsPipeline lacks"):
        diffcache.load(digits_pipeline(), saved)
    with pytest.raises(ValueError, match=r"expected a diffusers pipeline or a torch\.nn\.Module, got str"):
        diffcache.load("flux", saved)
    with pytest.raises(ValueError, match="unknown backend 'tensorrt'"):
        diffcache.load(make(), saved, backend="tensorrt")


def rewrite(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        manifest = json.loads((folder / MANIFEST).read_text())
        (folder / MANIFEST).write_text(json.dumps({**manifest, **changes}))

    return change


def without(key: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        manifest = json.loads((folder / MANIFEST).read_text())
        del manifest["denoisers"]["denoiser"][key]
        (folder / MANIFEST).write_text(json.dumps(manifest))

    return change


def cut(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])

    return change


def noise(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(bytes(range(256))) and None


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


SCHEDULE, PROFILE = "denoiser.schedule.json", "denoiser.profile.safetensors"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove(MANIFEST), rf"holds no compiled model: {MANIFEST} is missing; pass the folder"),
        (remove(SCHEDULE), rf"is incomplete: .*{SCHEDULE} is missing"),
        (remove(PROFILE), rf"is incomplete: .*{PROFILE} is missing"),
        (cut(MANIFEST), rf"{MANIFEST} is damaged"),
        (cut(SCHEDULE), rf"{SCHEDULE}.* is not JSON"),
        (cut(PROFILE), rf"{PROFILE}.* no safetensors file"),
        (noise(MANIFEST), rf"{MANIFEST} is damaged"),
        (noise(SCHEDULE), rf"{SCHEDULE} is damaged"),
        (noise(PROFILE), rf"{PROFILE}.* no safetensors file"),
        (rewrite(version=99), r"version 99, this diffcache reads up to 1; upgrade"),
        (rewrite(version=None), rf"{MANIFEST} is damaged"),
        (rewrite(format="onnx"), r"not written by diffcache \(format 'onnx'\)"),
        (rewrite(denoisers=[]), "not written by diffcache|is damaged"),
        (rewrite(denoisers={}), "is damaged"),
        (rewrite(denoisers={"denoiser": 3}), "is damaged"),
        (without("modules"), "is damaged"),
        (without("pattern"), "is damaged"),
    ],
    ids=lambda value: None if isinstance(value, str) else "",
)
def test_damaged_folders(copied: Path, damage: Callable[[Path], None], message: str) -> None:
    diffcache.load(make(), copied)
    damage(copied)
    with pytest.raises(ValueError, match=rf"(?s){message}"):
        diffcache.load(make(), copied)


def test_a_newer_schedule_is_refused(copied: Path) -> None:
    document = json.loads((copied / SCHEDULE).read_text())
    (copied / SCHEDULE).write_text(json.dumps({**document, "version": 7}))
    with pytest.raises(ValueError, match=rf"(?s){SCHEDULE}.*version 7"):
        diffcache.load(make(), copied)


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no compiled model"):
        diffcache.load(make(), tmp_path / "nowhere")
