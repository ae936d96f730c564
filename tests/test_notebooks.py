"""Rules that every notebook keeps, checked without running it."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from valuecot.flow.fingerprints import stale_exports
from valuecot.flow.plan import declaration

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
STAGES = [p for p in NOTEBOOKS if p.parent.name in {"stages", "geometry", "steerable"}]
name = lambda p: str(p.relative_to(ROOT / "nbs"))


def cells(path, kind="code"):
    return [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == kind]


def source(cell) -> str:
    return "".join(cell["source"])


def test_the_package_is_in_step_with_the_notebooks():
    assert stale_exports() == []


def test_the_package_defines_every_name_that_it_uses():
    "A name that only a cell without export brings in works in the notebook, and nowhere else."
    said = subprocess.run([sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821,F822", "--output-format", "concise", "valuecot"], cwd=ROOT, capture_output=True, text=True)
    assert said.returncode == 0, said.stdout


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_no_outputs_and_no_stray_metadata(path):
    for cell in cells(path):
        assert not cell["outputs"] and cell["execution_count"] is None, "strip the outputs: nbdev-clean"
        assert set(cell["metadata"]) <= {"tags"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_imports_stand_alone_and_are_explicit(path):
    for cell in cells(path):
        body = ast.parse(source(cell)).body
        imports = [isinstance(n, ast.Import | ast.ImportFrom) or "TYPE_CHECKING" in ast.unparse(n).split(":")[0] for n in body]
        assert all(imports) or not any(imports), f"split the imports from the code in\n{source(cell)[:200]}"
        assert "import *" not in source(cell)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_starts_with_a_title_and_a_question(path):
    first = source(cells(path, "markdown")[0])
    assert first.startswith("# ") and "\n> " in first, "a notebook opens with `# Title` and `> its question`"


@pytest.mark.parametrize("path", STAGES, ids=name)
def test_a_stage_has_one_parameters_cell_and_declares_itself(path):
    tagged = [c for c in cells(path) if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1, "papermill would run with the defaults: nbdev-clean drops tags unless allowed_cell_metadata_keys lists them"
    stage = declaration(path)
    assert stage is not None
    parameters = {n.target.id for n in ast.parse(source(tagged[0])).body if isinstance(n, ast.AnnAssign)}
    assert parameters == {"profile", "out", "overrides", *stage.levels, *stage.by_hand, *(["study"] if path.parent.name == "stages" else [])}


@pytest.mark.parametrize("path", STAGES, ids=name)
def test_papermill_reads_every_parameter(path):
    import papermill

    found = papermill.inspect_notebook(str(path))
    assert {"profile", "out", "overrides"} <= set(found) and found["profile"]["default"] == '"tiny"'


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_exported_functions_are_documented(path):
    for cell in cells(path):
        if source(cell).startswith("#| export\n"):
            for node in ast.parse(source(cell)).body:
                if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                    assert ast.get_docstring(node), f"{node.name} has no docstring"
