"""The import graph is the one in the design: no cycles, nothing hidden, only the five packages."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DATA = {"synthetic", "records", "eyes"}  # they know fields of a photograph, never networks
ALLOWED = {"files": set(), "model": set(), "metrics": set(), "tasks": {"model", "metrics"}, "synthetic": set(),
           "records": {"synthetic", "files"}, "eyes": {"records", "files"}, "augment": set(),
           "data": DATA | {"augment", "files"}, "intervals": set(), "parallel": {"files"}, "speed": {"model"},
           "routes": {"model", "tasks", "data"},
           "predict": {"model", "tasks", "metrics", "data", "records", "files"},
           "checkpoints": {"files", "model", "records"}}
ALLOWED["scores"] = set(ALLOWED) - {"checkpoints"}
ALLOWED["evaluate"] = set(ALLOWED) - {"checkpoints"}
ALLOWED["flags"] = set(ALLOWED) - {"parallel"}
ALLOWED["train"] = set(ALLOWED)
ALLOWED |= {"tsne": set(), "charts": set()}
ALLOWED["figures"] = {"model", "tasks", "metrics", "data", "predict", "scores", "evaluate", "charts"}
ALLOWED["insides"] = ALLOWED["figures"] | {"figures", "routes", "tsne"}
ALLOWED["visualize"] = set(ALLOWED) - {"train", "flags", "checkpoints", "parallel"}
ALLOWED["comparison"] = {"charts", "data", "evaluate", "files", "intervals", "scores", "tasks"}
ALLOWED["report"] = {"comparison", "intervals", "scores"}
ALLOWED["measured"] = set(ALLOWED) - {"comparison", "report"}
ALLOWED["baselines"] = set(ALLOWED)
PACKAGES = {"torch", "torchvision", "numpy", "PIL", "tqdm"}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("module", sorted(p.stem for p in ROOT.glob("*.py")))
def test_import_graph(module):
    names = imported(ROOT / f"{module}.py")
    assert names & set(ALLOWED) <= ALLOWED[module]
    assert names - set(ALLOWED) <= PACKAGES | set(sys.stdlib_module_names)


def test_imports_run_no_work(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {', '.join(ALLOWED)}"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr, list(tmp_path.iterdir())) == (0, "", "", [])
