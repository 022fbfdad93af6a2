"""The house: the top level imports downwards, retina/ never imports it, there is no cycle, importing runs nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
# each may import those before it; a student's teachers are runs, which evaluate loads
TOP = {"model": set(), "tasks": {"model"}, "data": {"model", "tasks"}, "train": {"model", "tasks", "data", "evaluate"},
       "evaluate": {"model", "tasks", "data"}, "visualize": {"model", "tasks", "data", "evaluate"},
       "baselines": {"model", "tasks", "data", "train", "evaluate", "visualize"}}
PACKAGES = {"torch", "torchvision", "numpy", "PIL", "tqdm"}
MODULES = {p.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__"): p
           for p in [*ROOT.glob("*.py"), *ROOT.glob("retina/**/*.py")]}


def imported(path: Path) -> set[str]:
    """Modules that are imported when the module is, wherever in it; not those for annotations alone."""
    tree = ast.parse(path.read_text())
    for node in [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]:
        node.body = []
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {n for n in inner if n in MODULES} or {node.module}
    return names


def test_the_top_level_is_what_a_person_reads():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split("\n")
    if not any(tracked):
        pytest.skip("no git checkout")
    assert {f.split("/")[0] for f in tracked if f} == {
        *(f"{m}.py" for m in TOP), "retina", "tests", "docs", "findings", "README.md", "REPORT.md", "LICENSE",
        "requirements.txt", ".ci", ".gitignore"}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_downwards(module):
    names = imported(MODULES[module])
    own = {n for n in names if n.split(".")[0] in {*TOP, "retina"}}
    assert {n for n in own if n in TOP} <= (TOP[module] if module in TOP else set())
    assert {n.split(".")[0] for n in names - own} <= PACKAGES | set(sys.stdlib_module_names)


def test_there_is_no_cycle():
    left = {m: {n for n in imported(p) if n in MODULES and n != m} for m, p in MODULES.items()}
    while free := [m for m, needs in left.items() if not needs & left.keys()]:
        for m in free:
            del left[m]
    assert not left


def test_importing_runs_nothing(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {', '.join(MODULES)}"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr, list(tmp_path.iterdir())) == (0, "", "", [])


@pytest.mark.parametrize("room", sorted(p.parent.name for p in ROOT.glob("retina/*/__init__.py")))
def test_each_room_says_what_it_is_for_and_leaves_out(room):
    assert "Leaves out:" in ast.get_docstring(ast.parse((ROOT / "retina" / room / "__init__.py").read_text()))
