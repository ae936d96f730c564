"""pytest collects the notebooks: each one runs as written, and against the exported package in the long proofs.

The package is the notebooks' own code (test_notebooks holds it in step, and its names defined), so the second run adds little.

A stage notebook gets the test profile injected after its `parameters` cell, as papermill would, and finds the results of
the stages before it in an outputs folder that the pipeline filled once for the whole session."""

import ast
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import pytest

ROOT = Path(__file__).parent
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests never ask a hub; without this each refusal takes five retries


SHARED = "VALUECOT_TEST_SHARED"  # folder that all worker processes of a session share


def pytest_configure(config):
    "Scratch folders of runs by hand go where the session can delete them."
    if not hasattr(config, "workerinput"):  # the process that starts the workers, or the only one
        os.environ[SHARED] = tempfile.mkdtemp(prefix="valuecot-test-")
        config.add_cleanup(lambda: shutil.rmtree(os.environ[SHARED], ignore_errors=True))
    tempfile.tempdir = tempfile.mkdtemp(prefix="scratch-", dir=os.environ[SHARED])


def study_outputs() -> Path:
    "Outputs of one run of both studies on the test profile, by the real command; made once for all workers."
    shared = Path(os.environ[SHARED])
    folder, said = shared / "outputs", shared / "outputs" / "study.txt"
    with open(shared / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if said.exists():
            return folder
        command = [sys.executable, "-m", "valuecot.flow.study", "run", "--profile", "test", "--study", "all"]
        run = subprocess.run(command, cwd=ROOT, env={**os.environ, "VALUECOT_OUTPUTS": str(folder)}, capture_output=True, text=True)
        if run.returncode:
            logs = "\n".join(f"{p.name}\n{p.read_text()[-2000:]}" for p in sorted((folder / "test" / "log").glob("*.log")))
            pytest.exit(f"the study failed on the test profile:\n{logs}\n{run.stdout[-4000:]}{run.stderr[-4000:]}", returncode=1)
        said.write_text(run.stdout)
    return folder


@pytest.fixture(scope="session")
def outputs():
    "Folder that a whole run of the study on the test profile filled."
    return study_outputs()


def pytest_collect_file(parent, file_path: Path):
    if file_path.suffix == ".ipynb" and file_path.is_relative_to(ROOT / "nbs") and ".ipynb_checkpoints" not in file_path.parts:
        return Notebook.from_parent(parent, path=file_path)


class Notebook(pytest.File):
    def collect(self):
        yield NotebookItem.from_parent(self, name="as written")
        exported = NotebookItem.from_parent(self, name="against the package")
        exported.add_marker("prove")
        yield exported


def as_import(source: str, module: str) -> str:
    "An exported cell with its definitions replaced by imports from `module`."
    keep, names = [], []
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            keep.append(ast.unparse(node))
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names += [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)]
    return "\n".join(keep + ([f"from {module} import {', '.join(names)}"] if names else []))


OVERRIDES = {"22_synthetic": "steerable.design.arms=sft,synthetic-cot"}  # of stages that the test profile does without


class NotebookItem(pytest.Item):
    def runtest(self):
        from execnb.shell import CaptureShell
        from fastcore.xtras import working_directory
        from nbdev.config import get_config
        from nbdev.process import NBProcessor
        from nbdev.test import _skip_cell

        config = get_config(self.path.parent)
        notebook = NBProcessor(self.path, rm_directives=False, process=True).nb
        module = next((c.directives_["default_exp"] for c in notebook.cells if "default_exp" in (getattr(c, "directives_", None) or {})), None)
        if self.name == "against the package":
            for cell in notebook.cells:
                if cell.cell_type == "code" and {"export", "exporti"} & set(cell.directives_ or {}):
                    cell.set_source(as_import(cell.source, f"valuecot.{module}"))
        env = {"IN_TEST": "1"}
        if tagged := next((c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])), None):  # a stage
            env["VALUECOT_OUTPUTS"] = str(study_outputs())
            tagged.set_source(f"{tagged.source}\nprofile, overrides = 'test', {OVERRIDES.get(self.path.stem, '')!r}")
        shell, old = CaptureShell(self.path), {k: os.environ.get(k) for k in env}
        os.environ.update(env)
        try:
            with working_directory(self.path.parent):
                shell.run_all(notebook, exc_stop=True, preproc=_skip_cell(notebook, config.tst_flags.split()), cell_timeout=config.cell_timeout)
        except BaseException as error:
            raise NotebookError(shell.prettytb(fname=self.path) or traceback.format_exc()) from error
        finally:
            for key, value in old.items():
                os.environ.pop(key) if value is None else os.environ.update({key: value})

    def repr_failure(self, excinfo):
        return str(excinfo.value) if isinstance(excinfo.value, NotebookError) else super().repr_failure(excinfo)

    def reportinfo(self):
        return self.path, 0, f"{self.path.relative_to(ROOT)} {self.name}"


class NotebookError(Exception):
    "A cell raised."
