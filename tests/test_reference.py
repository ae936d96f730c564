"""The reference by source alone, and the concept notebooks as pages: what is planted is text, what is kept is used."""

import ast
import json
import re
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from valuecot.companion import concepts, reference
from valuecot.companion.pages import run_sphinx
from valuecot.flow import plan
from valuecot.settings import load, root

PLANTED = [
    "<script>alert('planted')</script>",
    "<img src=http://evil.example/x.png>",
    "{raw}`html <b id=planted>`",
    "`x <http://evil.example>`_ |sub| .. raw:: html",
    "{{ planted }} {% include 'x' %}",
    "$planted$ $$planted$$",
    "[planted](javascript:alert(1)) ![p](http://evil.example/y.png)",
    "```{raw} html",
    ":::{raw} html",
]
ODD = f'''
__all__ = ["LIMIT", "Box", "given"]
LIMIT = 3  # {PLANTED[0]} :::::: ``````


class Box:
    """{PLANTED[2]} {PLANTED[5]}

    {PLANTED[7]}
    <b id=planted>
    ```
    {PLANTED[8]}
    {PLANTED[6]}"""

    size: int = 1  # {PLANTED[1]}
    "a string that is no docstring"

    @property
    def half(self) -> float:  # {PLANTED[4]}
        "{PLANTED[3]}"
        return self.size / 2

    def __matmul__(self, v): ...  # {PLANTED[0]}

    def _own(self):
        "hidden words"


def given(
    x: int,  # {PLANTED[0]} ``` :::
    *,
    y: str = "{PLANTED[1]}",
) -> int:  # {PLANTED[6]}
    return x
'''


def all_names():
    "(module, name) that a page must hold, by the interpreter's own reading of `__all__`."
    for path in sorted((root() / "valuecot").rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
                yield ".".join(path.relative_to(root()).with_suffix("").parts).removesuffix(".__init__"), ast.literal_eval(node.value)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    sources = tmp_path_factory.mktemp("reference")
    return sources, reference.write_reference(sources)


def objects(text):
    "Names of a page's directives, with their modules."
    return re.findall(r"(?m)^:+\{py:(?:function|class|data)\} (\w+)\n:module: ([\w.]+)$", text)


def test_every_public_name_is_on_its_page_exactly_once(written):
    sources, docnames = written
    pages = {name: (sources / f"{name}.md").read_text() for name in docnames}
    assert docnames[:4] == ["reference/index", "reference/curvature", "reference/stats", "reference/judge"]
    faces = 0
    for module, names in all_names():
        own = objects(pages[f"reference/{module.split('.')[1]}"])
        for name in names:
            if module.count(".") == 1 and (root() / module.replace(".", "/")).is_dir():  # a face: defined below, or linked
                faces += 1
                assert sum(n == name for n, _ in own) >= 1 or re.search(rf"\{{py:obj\}}`~[\w.]+\.{name}`", pages[f"reference/{module.split('.')[1]}"]), (module, name)
            else:
                assert own.count((name, module)) == 1, (module, name)
    assert faces > 50
    assert sum(len(objects(text)) for text in pages.values()) == sum(len(set(names)) for module, names in all_names() if not (root() / module.replace(".", "/")).is_dir())


def test_the_face_comes_first_in_its_own_order(written):
    from valuecot import curvature

    text = (written[0] / "reference/curvature.md").read_text()
    names = [name for name, _ in objects(text)][: len(curvature.__all__)]
    assert names == list(dict.fromkeys(curvature.__all__))
    assert "H: LinearOperator,  # LossHessian" in text and "### " not in text


def test_a_signature_is_what_python_reads(written):
    "The code shown for a function, given a body, has the parameters that inspect sees."
    import inspect

    from valuecot.stats import means

    module = reference.read_module(Path(means.__file__), "valuecot.stats.means")
    for entry in module.entries:
        if entry.kind == "function":
            node = ast.parse(entry.code + "\n    pass").body[0]
            assert [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)] == list(inspect.signature(getattr(means, entry.name)).parameters)


def odd_module(folder, text=ODD):
    (folder / "odd.py").write_text(text)
    return reference.read_module(folder / "odd.py", "valuecot.odd.odd")


def test_a_class_shows_fields_properties_and_operators_but_nothing_private(tmp_path):
    module = odd_module(tmp_path)
    box = module.entries[1]
    assert module.question == "" and [e.name for e in module.entries] == ["LIMIT", "Box", "given"]
    assert [(p.name, p.kind) for p in box.parts] == [("half", "property"), ("__matmul__", "method")]
    assert f"    size: int = 1  # {PLANTED[1]}" in box.code and "no docstring" not in box.code
    assert box.parts[1].code == f"def __matmul__(self, v): ...  # {PLANTED[0]}"
    assert "_own" not in str(box)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "A planted module and a failing notebook, through Sphinx."
    folder = tmp_path_factory.mktemp("built")
    module = odd_module(folder)
    sources = folder / "sources"
    (sources / "reference").mkdir(parents=True)
    (sources / "conf.py").write_text((root() / "docs/conf.py").read_text())
    (sources / "refs.bib").write_text("")
    (sources / "_static").mkdir()
    for name in ("print.css", "figures.js"):
        (sources / "_static" / name).write_text((root() / "docs/_static" / name).read_text())
    (sources / "_static" / "browser.js").write_text("")
    (sources / "reference" / "odd.md").write_text(reference.package_page("odd", {module.name: module}))
    (sources / "index.md").write_text("# Index\n\n```{toctree}\nreference/odd\n```\n")
    run_sphinx(sources, folder / "site")
    return folder / "site"


def test_planted_markup_is_text_on_the_page(built):
    page = (built / "reference/odd.html").read_text()
    article = page[page.index("<article") : page.index("</article>")]
    assert "<script>alert" not in article and "<b id=" not in article and "<img" not in article
    assert not re.findall(r'(?:href|src)="[^"]*(?:evil|javascript)', page)
    assert 'class="math' not in article and "MathJax" not in article
    words = re.sub(r"<[^>]+>", "", article)
    for text in ("&lt;script&gt;alert(", "{raw}html &lt;b id=planted&gt;", "{{ planted }}", "$$planted$$", "[planted](javascript:alert(1))", ":::{raw} html"):
        assert text in words.replace("’", "'").replace("&#39;", "'").replace("&quot;", '"'), text
    assert "hidden words" not in words


def test_names_are_anchors_and_the_search_knows_them(built):
    page = (built / "reference/odd.html").read_text()
    for name in ("LIMIT", "Box", "Box.half", "Box.__matmul__", "given"):
        assert page.count(f'id="valuecot.odd.odd.{name}"') == 1, name
    index = json.loads((built / "searchindex.js").read_text().removeprefix("Search.setIndex(").removesuffix(")"))
    assert {row[4] or name for name in index["objects"] for row in index["objects"][name]} and "valuecot.odd.odd" in index["objects"]
    assert "given" in {row[4] if isinstance(row[4], str) and row[4] else "" for row in index["objects"]["valuecot.odd.odd"]} | set(map(str, index["objects"]["valuecot.odd.odd"]))


def test_a_name_that_is_promised_and_missing_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="gone.*make export"):
        odd_module(tmp_path, "__all__ = ['gone']\n")


def test_reading_the_package_imports_nothing():
    import subprocess

    code = "import sys; import valuecot.companion.reference as r; r.read_package(); sys.exit('torch' in sys.modules or 'valuecot.curvature' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=root()).returncode == 0


# ---- concept notebooks


@pytest.fixture
def project(tmp_path, monkeypatch):
    "A project of one module and three notebooks."
    (tmp_path / "settings.ini").write_text("")
    (tmp_path / "valuecot").mkdir()
    (tmp_path / "valuecot/__init__.py").write_text("")
    (tmp_path / "nbs/maths").mkdir(parents=True)
    monkeypatch.setenv("VALUECOT_ROOT", str(tmp_path))
    monkeypatch.setenv("VALUECOT_OUTPUTS", str(tmp_path / "outputs"))
    monkeypatch.setenv("OPENAI_API_KEY", "sk-planted")
    counter = tmp_path / "executed.txt"
    count = f"with open({str(counter)!r}, 'a') as file: print('x', file=file)"
    write(tmp_path, "10_sums", ["#| default_exp maths.sums", "#| export\nimport os", count, "2 + 2  # a comment", "'OPENAI_API_KEY' in os.environ"])
    write(tmp_path, "12_broken", ["1 + 1", "raise ValueError('<b>planted</b> reason')", "'never'"])
    write(tmp_path, "14_stage", ["stage = Stage('x', levels=())"])
    plan.forget()
    yield tmp_path, lambda: counter.read_text().count("x") if counter.exists() else 0
    plan.forget()


def write(base, name, sources, words="# Title of it\n\n> Its question?\n\nOld words."):
    nbformat.write(new_notebook(cells=[new_code_cell(sources[0]), new_markdown_cell(words), *map(new_code_cell, sources[1:])]), base / f"nbs/maths/{name}.ipynb")


def pages_of(base, wanted=()):
    plan.forget()
    names = concepts.write_concepts(base / "sources", wanted)
    return {n: (base / "sources" / f"{n}.ipynb") for n in names if n.startswith("concepts/maths/") and not n.endswith("index")}


def test_what_was_executed_is_kept_until_the_code_changes(project):
    base, executed = project
    page = nbformat.read(pages_of(base, ["maths/10_sums"])["concepts/maths/10_sums"], 4)
    assert executed() == 1 and "".join(o.data["text/plain"] for c in page.cells if c.cell_type == "code" for o in c.outputs) == "4False"
    pages_of(base, ["maths/10_sums"])
    assert executed() == 1, "the second time nothing runs"
    sources = [c.source for c in nbformat.read(base / "nbs/maths/10_sums.ipynb", 4).cells if c.cell_type == "code"]
    sources[3] = "2 + 2  # another comment"
    write(base, "10_sums", sources, "# Title of it\n\n> Its question?\n\nNew words.")
    page = pages_of(base, ["maths/10_sums"])["concepts/maths/10_sums"].read_text()
    assert executed() == 1 and "New words" in page and "another comment" in page and "Old words" not in page and '"4"' in page
    sources[3] = "2 + 3"
    write(base, "10_sums", sources)
    page = pages_of(base, ["all"])["concepts/maths/10_sums"].read_text()
    assert executed() == 2 and '"5"' in page
    assert len(list((base / "outputs/cache/concepts/maths/10_sums").iterdir())) == 1, "the earlier copy is gone"


def test_cells_that_move_between_cells_are_executed_anew(project):
    base, executed = project
    sources = ["#| default_exp maths.sums", "#| export\nimport os", "1\n2", "3"]
    write(base, "10_sums", sources)
    before = concepts.key(base / "nbs/maths/10_sums.ipynb")
    write(base, "10_sums", [*sources[:2], "1", "2\n3"])
    plan.forget()
    assert concepts.key(base / "nbs/maths/10_sums.ipynb") != before


def test_without_being_chosen_a_page_says_how_to_fill_it(project):
    base, executed = project
    pages = pages_of(base)
    text = pages["concepts/maths/10_sums"].read_text()
    assert executed() == 0 and set(pages) == {"concepts/maths/10_sums", "concepts/maths/12_broken"}, "a stage has runs, not a page here"
    assert "make companion CONCEPTS=maths/10_sums" in text and "Old words" in text
    assert "| [Title of it](10_sums.ipynb) | Its question? | not executed |" in (base / "sources/concepts/maths/index.md").read_text()


def test_a_failing_notebook_is_shown_as_failed_and_stops_nothing(project, capsys):
    base, executed = project
    assert concepts.main(["all"]) == 0
    said = capsys.readouterr().err
    assert "maths/12_broken  ValueError" in said and "maths/10_sums  done" in said
    page = nbformat.read(pages_of(base)["concepts/maths/12_broken"], 4)
    outputs = [[o.output_type for o in c.outputs] for c in page.cells if c.cell_type == "code"]
    assert outputs[-2:] == [["error"], []], "the cell that raised, and what did not run"
    note = next(c.source for c in page.cells if "Failed" in c.source)
    assert "ValueError" in note and "<b>" not in note
    assert executed() == 1


def test_a_notebook_that_dies_or_never_ends_is_a_failure_with_its_reason(project):
    base, _ = project
    write(base, "12_broken", ["1", "print('before')", "import os; os._exit(3)"])
    made = concepts.execute(base / "nbs/maths/12_broken.ipynb")
    assert "status 3" in made.metadata["valuecot"]["failed"] and made.cells[2].outputs[0].text == "before\n"
    write(base, "12_broken", ["1", "import time", "time.sleep(60)"])
    assert "TimeoutError: not done after 2 s" in concepts.execute(base / "nbs/maths/12_broken.ipynb", limit=2).metadata["valuecot"]["failed"]


def test_a_notebook_that_is_no_python_fails_alone(project):
    base, _ = project
    write(base, "12_broken", ["1 +", "2"])
    made = pages_of(base, ["maths"])
    assert "SyntaxError" in made["concepts/maths/12_broken"].read_text() and '"4"' in made["concepts/maths/10_sums"].read_text()


def test_unknown_names_say_what_there_is(project, capsys):
    with pytest.raises(KeyError, match="did you mean 'maths'"):
        concepts.chosen(["math"])
    assert concepts.chosen([]) == [] and [p.stem for p in concepts.chosen(["all"])] == ["10_sums", "12_broken"]
    assert concepts.main(["maths/99"]) == 2 and "companion.concepts" in capsys.readouterr().err


def test_the_settings_name_notebooks_that_exist():
    wanted = {profile: load(profile)["companion"].concepts for profile in ("tiny", "small", "paper", "test")}
    assert concepts.chosen({word for words in wanted.values() for word in words}) and wanted["tiny"] and not wanted["test"]
