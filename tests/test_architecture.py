"""The house: imports never go up a floor nor in circles, and importing the package is cheap."""

from __future__ import annotations

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "qkernels"

# Longest prefix counts.
FLOORS = {
    "qkernels.scheme": 0,
    "qkernels.tables": 0,
    "qkernels.files": 0,
    "qkernels.source": 0,
    "qkernels.packing": 1,
    "qkernels.reference": 1,
    "qkernels.reference_int8": 1,
    "qkernels.tuning": 1,
    "qkernels.fit": 2,
    "qkernels.checks": 2,
    "qkernels.kernels": 2,
    "qkernels.dispatch": 3,
    "qkernels.dispatch_int8": 3,
    "qkernels.ops": 3,
    "qkernels.ops_experts": 3,
    "qkernels.ops_int8": 3,
    "qkernels.activations": 4,
    "qkernels.tensor": 4,
    "qkernels.nn": 5,
    "qkernels.experts": 5,
    "qkernels.replace": 5,
    "qkernels.pretrained": 5,
    "qkernels.siblings": 5,
    "qkernels.merge": 5,
    "qkernels.formats": 5,
    "qkernels.quality": 5,
    "qkernels.calibrate": 5,
    "qkernels.selection": 5,
    "qkernels.summary": 5,
    "qkernels.planning": 6,
    "qkernels.model": 6,
    "qkernels.checkpoint": 6,
    "qkernels.convert": 6,
    "qkernels.parallel": 6,
    "qkernels.plots": 7,
    "qkernels.tune": 7,
    "qkernels.demo": 7,
    "qkernels.reporting": 7,
    "qkernels.integrations": 7,
    "qkernels.loading": 7,
    "qkernels.cli": 7,
    "qkernels": 8,  # __init__ hands out what users need
}
MODULES = sorted(path.relative_to(ROOT) for path in PACKAGE.rglob("*.py"))


def _name(path: pathlib.Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _floor(module: str) -> int:
    found = [prefix for prefix in FLOORS if module == prefix or module.startswith(f"{prefix}.")]
    best = max(found, key=len)
    assert best != "qkernels" or module == "qkernels", f"{module} is on no floor: add it to FLOORS and to the README"
    return FLOORS[best]


def _imports(path: pathlib.Path, everywhere: bool = True) -> set[str]:
    """Modules that a file imports; those inside functions too, unless told otherwise."""
    tree = ast.parse((ROOT / path).read_text())
    nodes = ast.walk(tree) if everywhere else iter(tree.body)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                file = ROOT / submodule.replace(".", "/")
                known = file.with_suffix(".py").exists() or file.is_dir()
                found.add(submodule if known else str(node.module))
    return found


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_never_go_up(path: pathlib.Path) -> None:
    module = _name(path)
    for imported in _imports(path):
        if imported.startswith("qkernels"):
            above, below = _floor(module), _floor(imported)
            assert below <= above, f"{module} (floor {above}) imports {imported} (floor {below})"


def test_there_are_no_cycles() -> None:
    graph = {_name(path): {i for i in _imports(path) if i.startswith("qkernels.")} for path in MODULES}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f"cycle: {' -> '.join([*trail, module])}"
        if module not in done:
            for imported in graph.get(module, ()):
                visit(imported, (*trail, module))
            done.add(module)

    for module in graph:
        if module != "qkernels":
            visit(module, ())


def test_only_kernels_import_triton() -> None:
    for path in MODULES:
        if path.parts[1] != "kernels":
            assert not any(name.split(".")[0] == "triton" for name in _imports(path)), path


def test_tests_of_truth_know_nothing_of_the_package() -> None:
    for name in ("truth.py", "bounds.py"):
        assert not any(i.startswith("qkernels") for i in _imports(pathlib.Path("tests", name)))


def test_files_and_functions_are_short() -> None:
    for path in MODULES:
        source = (ROOT / path).read_text()
        assert source.count("\n") <= 420, f"{path} is long: look for the second idea in it"
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno is not None
                length = node.end_lineno - node.lineno
                assert length <= 125, f"{path}: {node.name} has {length} lines"


def test_the_readme_shows_these_floors() -> None:
    readme = (ROOT / "README.md").read_text()
    for module, floor in FLOORS.items():
        if module != "qkernels":
            lines = [line for line in readme.splitlines() if line.startswith(f"{floor}  ")]
            named = any(module.removeprefix("qkernels.") in line for line in lines)
            assert named, f"README's floor {floor} does not name {module}"


def test_importing_touches_no_heavy_package() -> None:
    heavy = ("triton", "transformers", "matplotlib", "tqdm", "rich", "safetensors", "gguf")
    code = (
        "import sys, torch; before = set(sys.modules); import qkernels; "
        f"print([m for m in {heavy!r} if m in sys.modules and m not in before], torch.cuda.is_initialized())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[] False"


def test_the_top_level_holds_what_it_should() -> None:
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=False).stdout.split()
    if not tracked:
        pytest.skip("not a git checkout")
    top = {path.split("/")[0] for path in tracked if not path.startswith(".")}
    assert top == {
        "pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "constraints.txt",
        "qkernels", "tests", "benchmarks", "notebooks",
    }  # fmt: skip
