"""The shape of the source: imports point one way, no model is named, files stay small."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Package name -> folder with the real files (the links inside diffcache/ are left out).
PACKAGES = {"diffcache": ROOT / "diffcache", "diffcache.passes": ROOT / "passes", "diffcache.kernels": ROOT / "kernels"}

# Low to high. A module may import from its own layer and from those below it. A package stands for all it holds.
LAYERS = [
    {"cells", "documents"},
    {"guidance"},
    {"schedule", "token_reads"},
    {"kernels"},
    {"gram", "published_tables", "published_coefficients"},
    {
        "ops",
        "direct",
        "token_rows",
        "token_scores",
        "predictors",
        "host_reads",
        "budget",
        "liveness",
        "progress",
        "report",
        "when",
        "direct_search",
    },
    {"gates", "gap_costs", "profile_record", "planning_tables", "planners", "forecasting"},
    {"searching", "recipes"},
    {"tracing"},
    {"graphs", "cost", "call_pattern", "guided_calls", "fingerprint"},
    {"flow"},
    {"axes", "timestep"},
    {"attention_kinds"},
    {"blocks"},
    {"cuts"},
    {"anatomy"},
    {"ranges", "residual_blocks"},
    {"sites"},
    {"probes"},
    {"token_ops", "token_indexing", "token_axes", "token_region"},
    {"finding"},
    {"batch"},
    {"memory", "segments"},
    {"guidance_rules"},
    {"passes"},
    {"pipeline"},
    {"lower"},
    {"options"},
    {"token_programs"},
    {"programs"},
    {"probe_history", "token_choice"},
    {"deciding"},
    {"streams"},
    {"caller", "generations"},
    {"halves"},
    {"branches"},
    {"each_sample"},
    {"runtime"},
    {"profiling"},
    {"integrations", "trajectories"},
    {"saving", "targets"},
    {"measuring"},
    {"planning"},
    {"judging"},
    {"compiler"},
    {"__init__", "cli", "__main__"},
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}

MAX_LINES = 400
BANNED_STEMS = {"utils", "util", "helpers", "helper", "common", "manager", "misc"}
MODEL_NAME = re.compile(r"\b(Flux|SD3|Wan|PixArt|QwenImage|HunyuanVideo|CogVideoX|LTXVideo|UNet2D)\w*Model\b")


def source_files() -> Iterator[tuple[str, Path]]:
    """Every source file of the product with its import name."""
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            if package == "diffcache" and parts[0] in ("passes", "kernels"):
                continue  # reached through a link; listed under its own folder
            yield ".".join((package, *parts)), path


def layer_name(module: str) -> str:
    """The entry of LAYERS a module belongs to: `diffcache.tracing.record` -> `tracing`."""
    _, _, rest = module.partition(".")
    return rest.split(".")[0] or "__init__"


def module_exists(module: str) -> bool:
    return any(name == module or name.startswith(module + ".") for name, _ in source_files())


def own_imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and full module name of every import of the product, wherever in the file it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module == "diffcache":
            # `from diffcache import ops` imports the module ops; `from diffcache import compile` the package.
            candidates = [f"diffcache.{alias.name}" for alias in node.names]
            names = [name if module_exists(name) else "diffcache" for name in candidates]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        else:
            continue
        yield from ((node.lineno, name) for name in names if name.split(".")[0] == "diffcache")


def upward_imports(module: str, source: str) -> list[str]:
    """Complaints about imports that point up, one line each."""
    own = layer_name(module)
    return [
        f"line {line}: {own} imports {target}, which lies above it"
        for line, target in own_imports(ast.parse(source))
        if RANK[layer_name(target)] > RANK[own]
    ]


def test_every_module_has_a_layer():
    unplaced = [str(path.relative_to(ROOT)) for name, path in source_files() if layer_name(name) not in RANK]
    assert not unplaced, f"give these a place in LAYERS: {unplaced}"


def test_imports_point_one_way():
    complaints = [
        f"{path.relative_to(ROOT)}, {complaint}"
        for name, path in source_files()
        for complaint in upward_imports(name, path.read_text())
    ]
    assert not complaints, "\n".join(complaints)


@pytest.mark.parametrize(
    ("module", "source", "complaints"),
    [
        ("diffcache.schedule", "import json\nfrom diffcache.ops import extrapolate", 1),
        ("diffcache.passes.dce", "def f():\n    import diffcache.runtime", 1),
        ("diffcache.kernels.forecast", "from diffcache import compile", 1),
        ("diffcache.runtime", "from diffcache.lower import lower\nfrom diffcache.passes.dce import dce", 0),
    ],
)
def test_upward_imports_are_seen(module: str, source: str, complaints: int):
    assert len(upward_imports(module, source)) == complaints


def test_relative_imports_are_absent():
    relative = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for _, path in source_files()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.level > 0
    ]
    assert not relative


def test_schedule_reads_without_torch():
    path = ROOT / "diffcache" / "schedule.py"
    if not path.exists():
        pytest.skip("no diffcache/schedule.py yet")
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").split(".")[0])
    assert "torch" not in imported


def test_no_model_is_named():
    named = [
        f"{path.relative_to(ROOT)}:{number}: {match.group()}"
        for _, path in source_files()
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if (match := MODEL_NAME.search(line))
    ]
    assert not named, "\n".join(named)


def test_files_stay_small():
    long = {
        str(path.relative_to(ROOT)): lines
        for _, path in source_files()
        if (lines := len(path.read_text().splitlines())) > MAX_LINES
    }
    assert not long, f"over {MAX_LINES} lines: {long}"


def test_file_names_say_what_is_inside():
    vague = [str(path.relative_to(ROOT)) for _, path in source_files() if path.stem in BANNED_STEMS]
    assert not vague


def test_folders_are_linked():
    assert not (ROOT / "kernels" / "__init__.py").exists(), (
        "it would shadow the package `kernels` that diffusers imports"
    )
    for name in ("passes", "kernels"):
        link = ROOT / "diffcache" / name
        assert link.is_symlink(), f"{link} must be a link to ../{name}"
        assert link.resolve() == ROOT / name
