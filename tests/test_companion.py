"""The companion, built once from a fake profile and read back."""

import base64
import json
import re
import zlib
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pytest
import torch
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from valuecot.companion import pages, safe
from valuecot.settings import root
from valuecot.types import Landscape, Prompt, Trace
from valuecot.view.browser import SCRIPT, Browser, Entry
from valuecot.view.landscapes import contours, surfaces
from valuecot.view.tables import Html, traces_table

ARMS = {"base": (800.0, 300.0), "standard": (260.0, 90.0), "annealing": (230.0, 100.0)}
HOSTILE = "<script>alert('planted')</script><img src=http://evil.example/x.png>"


def bundle(figure):
    return new_output("display_data", json.loads(json.dumps(figure._repr_mimebundle_())))


def html_output(text):
    return new_output("display_data", {"text/html": text, "text/plain": "…"})


def valley(l1, l2, tilt=0.0):
    t = torch.linspace(-0.05, 0.05, 17)
    return Landscape(t, t, 2.5 + 0.5 * (l1 * t[:, None] ** 2 + l2 * t[None] ** 2) + tilt * t[:, None], 2.5)


def write_run(folder: Path, cells, name="run.ipynb", card=None):
    folder.mkdir(parents=True)
    nbformat.write(new_notebook(cells=cells), folder / name)
    if card is not None:
        (folder / "run.json").write_text(json.dumps(card))


def stage_cells(stage):
    return [
        new_code_cell("#| default_exp x.y"),
        new_markdown_cell(f"# {stage.title()}\n\n> Is $\\lambda_1$ small {{cite}}`yao2019pyhessian`?"),
        new_code_cell("#| export\nimport torch"),
        new_code_cell("profile: str = 'tiny'\nsecret_default = 41", metadata={"tags": ["parameters"]}),
        new_code_cell("secret_injected = 42", metadata={"tags": ["injected-parameters"]}),
        new_code_cell("#| hide\nassert 'hidden cell'"),
        new_markdown_cell("$$\\Delta L(\\alpha,\\beta)=L(\\theta+\\alpha v_1+\\beta v_2)-L(\\theta)$$"),
        new_code_cell("#| export\ndef exported_function(): pass"),
        new_code_cell(
            "run_stage()",
            outputs=[
                new_output("stream", name="stderr", text="stderr words\n"),
                new_output("stream", name="stdout", text=f"wrote {root()}/outputs/tiny/x.csv and /home/someone/y.csv {HOSTILE}\n"),
                new_output("execute_result", {"text/plain": f"Spectrum({HOSTILE})"}),
                new_output("display_data", {"text/markdown": f"| said | |\n|---|---|\n| {HOSTILE} ![x](http://evil.example/y.png) | **b** |"}),
            ],
        ),
    ]


def fake_profile(base: Path) -> Path:
    profile = base / "tiny"
    for model in ("llama", "qwen"):
        for arm in ARMS:
            for stage in ("grpo", "spectrum"):
                inputs = {f"grpo/{model}/{arm}/seed0": "abc"} if stage == "spectrum" else {}
                card = dict(stage=stage, study="geometry", profile="tiny", model=model, arm=arm, seed=0, parameters={"profile": "tiny"}, inputs=inputs)
                card |= dict(settings={"geometry.hessian.top_n": 2, "note": HOSTILE}, key="k1", revision="0123456789abcdef", dirty=True, device="cpu")
                card |= dict(dtype="float32", seconds=12.5, counts={"prompts": 24, "parameters": 201_344}, packages={"torch": "2.13"})
                write_run(profile / "geometry" / stage / model / arm / "seed0", stage_cells(stage), card=card)
    error = new_output("error", ename="ValueError", evalue="no rows", traceback=["\x1b[31mValueError\x1b[0m: no rows in /home/someone/x"])
    write_run(profile / "geometry" / "grpo" / "qwen" / "extra" / "seed0", [new_markdown_cell("# GRPO"), new_code_cell("1/0", outputs=[error])], name="failed.ipynb")
    planes = {label: valley(*pair, tilt=4.0 if label == "base" else 0.0) for label, pair in ARMS.items()}
    prompt = Prompt("a-1", "May I read my sister's diary? It costs $5 or $6. " + HOSTILE, "home", "care", "privacy", "open")
    hot = ("It is 'my sister's diary'.", "Care can be shown.", "I will suggest a talk.")
    traces = [Trace("a-1", "standard", "rules", "care", "privacy", ("x",), "The user says 'May I read'.", "Ask her."), Trace("a-1", "annealing", "rules", "care", "privacy", hot, "", HOSTILE)]
    link = "[λ₁ of annealing](run:spectrum/llama/annealing/seed0), [nothing](run:spectrum/llama/none/seed0)"
    cells = [new_markdown_cell("# The geometry of value conflict\n\n> Does CoT flatten it?\n\n" + link)]
    for model in ("llama", "qwen"):
        drawn = [f(planes, ARMS, f"{kind}, {model}", "Profile tiny, n = 24, seed 0.") for f, kind in ((surfaces, "Surfaces"), (contours, "Contours"))]
        cells += [new_markdown_cell(f"## {model}"), new_code_cell("figures()", outputs=[bundle(f) for f in drawn])]
    more = '<table><tr><td><a href="run:spectrum/qwen/base/seed0">run</a></td><td onclick="x()">v</td></tr></table>' + HOSTILE
    texts = Browser((Entry("a-1", {"teacher": ("rules",)}, Html("<p>Ask her.</p>" + HOSTILE)), Entry("a-2", {"teacher": ("gpt",)}, Html("<p>Ask him.</p>" + HOSTILE))))
    cells += [new_markdown_cell("## Texts"), new_code_cell("b", outputs=[new_output("display_data", texts._repr_mimebundle_())])]
    cells += [new_markdown_cell("## Traces"), new_code_cell("t", outputs=[html_output(str(traces_table(prompt, traces))), html_output(more)])]
    write_run(profile / "geometry" / "report", cells, card=dict(stage="report", study="geometry", profile="tiny", seconds=3, revision="0123456789abcdef", dirty=True))
    (profile / "geometry" / "report" / "lambda.csv").write_text("model,lambda_1 (nats)\nllama,1\n")
    return profile


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    profile = fake_profile(tmp_path_factory.mktemp("outputs"))
    index = pages.build(profile, None, "companion.notebooks=no")
    assert index == profile / "companion" / "index.html"
    return index.parent


def read(site, name):
    return (site / name).read_text()


def html_pages(site):
    return {p.relative_to(site).as_posix(): p.read_text() for p in site.rglob("*.html") if "_static" not in p.parts}


class Loads(HTMLParser):
    "What a page makes the browser load, what it links to, and where code could hide."

    def __init__(self, text):
        super().__init__()
        self.loads, self.links, self.handlers, self.scripts = [], [], [], []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.handlers += [k for k in attrs if k.startswith("on")]
        if tag == "a":
            self.links.append(attrs.get("href") or "")
        else:
            self.loads += [attrs[k] for k in ("src", "href", "data", "poster", "srcset", "action") if attrs.get(k)]
        self.loads += re.findall(r"url\(([^)]*)\)", attrs.get("style") or "")
        self.inside = tag == "script"

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.scripts.append(data)


def test_texts_to_page_through_are_cleaned_before_they_are_packed(site):
    text = read(site, "runs/geometry/report.html")
    packed = re.search(r'<script type="text/plain">([^<]*)</script>', text)[1]
    rows = json.loads(zlib.decompress(base64.b64decode(packed)))
    assert [r["title"] for r in rows] == ["a-1", "a-2"] and "Ask him." in rows[1]["body"]
    for row in rows:
        found = Loads(row["body"])
        assert not found.loads and not found.handlers and not found.scripts and "<script" not in row["body"]
    assert (site / "_static" / "browser.js").read_text() == SCRIPT and "browser.js" in text and SCRIPT not in text


def test_every_run_has_a_page(site):
    for page in pages.found(site.parent):
        text = read(site, page.docname + ".html")
        assert page.title.split(" · ")[0].split(":")[0] in text or page.stage == "report"
    assert "<h1>GRPO · llama · annealing · seed 0" in read(site, "runs/geometry/grpo/llama/annealing/seed0.html")


def test_first_lines_say_what_was_run(site):
    body = re.sub(r"<[^>]+>", "", read(site, "index.html").rsplit("<h1>", 1)[1])
    assert body.index("Do these claims hold?") < body.index("not evidence about the papers") < body.index("What was run")
    body = body[body.index("What was run") :][:900]
    for words in ("geometry", "tiny", "llama, qwen", "base, standard, annealing", "13 runs complete, 1 failed", "0123456789 with uncommitted changes"):
        assert words in body, words
    assert "parameters 201,344" in re.sub(r"<[^>]+>", "", read(site, "runs/geometry/grpo/index.html"))


def test_small_profiles_say_so_on_every_page(site):
    missing = [name for name, text in html_pages(site).items() if "not evidence about the papers" not in text]
    assert not missing
    assert pages.notice("paper") == "" and "small" in pages.notice("small")


def test_nothing_is_loaded_from_elsewhere(site):
    for name, text in html_pages(site).items():
        outside = [x for x in Loads(text).loads if re.match(r"(https?:)?//", x)]
        assert not outside, (name, outside)
    for css in site.rglob("*.css"):
        assert not re.findall(r"(?:url\(|@import)\s*['\"]?(?:https?:)?//", css.read_text()), css.name


def test_what_a_page_loads_exists(site):
    for name, text in html_pages(site).items():
        for load in Loads(text).loads:
            if not load.startswith(("data:", "#")) and load.strip():
                assert ((site / name).parent / load.split("?")[0].split("#")[0]).resolve().exists(), (name, load)


def test_links_between_pages_resolve(site):
    for name, text in html_pages(site).items():
        for link in Loads(text).links:
            assert not link.startswith(("run:", "javascript:"))
            if link and not link.startswith(("http", "#", "mailto:")):
                assert ((site / name).parent / link.split("#")[0]).resolve().exists(), (name, link)


def test_report_links_reach_the_runs(site):
    text = read(site, "runs/geometry/report.html")
    assert 'href="spectrum/llama/annealing/seed0.html"' in text  # from a Markdown cell
    assert 'href="spectrum/qwen/base/seed0.html"' in text  # from an HTML output
    assert "nothing (not run)" in text
    assert "../../../grpo/llama/base/seed0.html" in read(site, "runs/geometry/spectrum/llama/base/seed0.html")  # inputs on the card


def test_planted_markup_is_shown_and_not_run(site):
    for name, text in html_pages(site).items():
        found = Loads(text)
        assert not [s for s in found.scripts if "planted" in s and "Plotly" not in s], name
        assert "evil.example" not in " ".join(found.loads), name
        theme = {"onclick", "onload", "onerror"}  # the theme's own buttons
        assert "x()" not in text or not set(found.handlers) - theme, name
    report = read(site, "runs/geometry/report.html")
    assert "&lt;script&gt;alert" in report and 'onclick="x()"' not in report
    assert "&lt;script&gt;alert" in read(site, "runs/geometry/spectrum/llama/base/seed0.html")


def test_text_that_is_data_is_no_formula(site):
    table = read(site, "runs/geometry/report.html").split("$5 or $6")[0].rsplit("<table", 1)[1]
    assert "mathjax_ignore" in table


def test_cells_that_readers_do_not_need_are_gone(site):
    text = read(site, "runs/geometry/grpo/llama/base/seed0.html")
    for words in ("secret_default", "secret_injected", "hidden cell", "default_exp", "import torch", "stderr words", "/home/someone", str(root()), "#| export"):
        assert words not in text, words
    assert "exported_function" in re.sub(r"<[^>]+>", "", text)
    assert "outputs/tiny/x.csv" in text and "…/y.csv" in text
    assert re.search(r'<details class="[^"]*hide above-input', text)


def test_run_card_is_complete_and_folded(site):
    card = read(site, "runs/geometry/spectrum/llama/base/seed0.html").split('<details class="vc-card')[1].split("</details>")[0]
    for words in ("12.5 s on cpu", "0123456789", "uncommitted", "geometry.hessian.top_n", "float32", "torch", "k1", "&lt;script&gt;"):
        assert words in card, words
    assert not card.startswith(" open")


def test_failed_runs_are_listed_and_shown(site):
    index, text = read(site, "index.html"), read(site, "runs/geometry/grpo/qwen/extra/seed0.html")
    assert "Failed runs" in index and "runs/geometry/grpo/qwen/extra/seed0.html" in index
    assert "ValueError" in text and "(failed)" in text and "\x1b" not in text


def test_figures_share_one_local_plotly(site):
    assert [p.relative_to(site).as_posix() for p in site.rglob("plotly*.js")] == ["_static/plotly.min.js"]
    report = read(site, "runs/geometry/report.html")
    specs = re.findall(r'<script type="application/json">(.*?)</script>', report)
    assert len(specs) == 4
    for spec in map(json.loads, specs):
        assert spec["data"] and spec["layout"]["meta"]["alt"]
    twins = re.findall(r'<img alt="([^"]+)" src="data:image/(?:png|webp);base64,([^"]+)">', report)
    assert len(twins) == 4 and all(alt and png for alt, png in twins)
    assert "plotly.min.js" not in report  # figures.js loads it when a figure comes near
    assert "@media print" in read(site, "_static/print.css")


def test_images_have_alternative_text(site):
    for name, text in html_pages(site).items():
        assert not re.findall(r"<img(?![^>]*\balt=)[^>]*>", text), name


def test_mathjax_is_local(site):
    text = read(site, "runs/geometry/spectrum/llama/base/seed0.html")
    assert any(load.split("?")[0].endswith("_static/mathjax/tex-mml-chtml.js") for load in Loads(text).loads)
    assert (site / "_static/mathjax/tex-mml-chtml.js").stat().st_size > 500_000
    assert len(list(site.glob("_static/mathjax/output/chtml/fonts/woff-v2/*.woff"))) >= 20
    assert 'class="math notranslate nohighlight"' in text


def test_citations_and_search(site):
    assert "PyHessian" in read(site, "references.html")
    assert "references.html#" in read(site, "runs/geometry/spectrum/llama/base/seed0.html")
    assert (site / "searchindex.js").stat().st_size > 100


def test_size(site):
    assert sum(p.stat().st_size for p in site.rglob("*") if p.is_file()) < 20e6


def test_report_tables_can_be_downloaded(site):
    assert list(site.rglob("lambda.csv"))
    assert "lambda.csv" in read(site, "runs/geometry/report.html")


def test_old_pages_survive_a_failing_build(site, monkeypatch):
    before = read(site, "index.html")

    def broken(*args):
        raise RuntimeError("planted")

    monkeypatch.setattr(pages, "run_sphinx", broken)
    with pytest.raises(RuntimeError, match="planted"):
        pages.build(site.parent, None, "companion.notebooks=no")
    assert read(site, "index.html") == before
    assert not [p for p in site.parent.iterdir() if p.name.startswith(".companion")]


def test_sphinx_failure_is_an_error_with_its_log(tmp_path):
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "conf.py").write_text("extensions = ['no.such.extension']\n")
    with pytest.raises(RuntimeError, match="no.such.extension"):
        pages.run_sphinx(tmp_path / "src", tmp_path / "site")


def test_swap_replaces_a_folder(tmp_path):
    for name in ("new", "site"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text(name)
    pages.swap(tmp_path / "new", tmp_path / "site")
    assert (tmp_path / "site" / "x").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["site"]


def test_missing_or_empty_profile_says_what_to_run(tmp_path, capsys, monkeypatch):
    with pytest.raises(FileNotFoundError, match="make study PROFILE=small"):
        pages.build(tmp_path / "small", None, "companion.notebooks=no")
    (tmp_path / "small").mkdir()
    with pytest.raises(FileNotFoundError, match="no finished run"):
        pages.build(tmp_path / "small", None, "companion.notebooks=no")
    monkeypatch.setattr(pages, "outputs", lambda: tmp_path)
    assert pages.main(["small"]) == 1
    assert "make study" in capsys.readouterr().err
    assert pages.main([]) == 2


def test_broken_card_names_the_run(tmp_path):
    folder = tmp_path / "tiny" / "geometry" / "grpo" / "llama" / "base" / "seed0"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text("{")
    with pytest.raises(ValueError, match="geometry/grpo/llama/base/seed0/run.json"):
        pages.found(tmp_path / "tiny")


@pytest.mark.parametrize(
    "text",
    [
        "<scr<script>ipt>alert(1)</script>",
        "<svg onload=alert(1)><p>x",
        "<a href='jav&#x61;script:alert(1)'>x</a>",
        "<a href=' javascript:alert(1)'>x</a>",
        "<a href='//evil.example'>x</a>",
        "<img src=x onerror=alert(1)>",
        "<img src='data:image/svg+xml,<svg onload=alert(1)>'>",
        "<td style='background:url(http://evil.example)'>x",
        "<td style='background:u\\72l(http://evil.example)'>x",
        "<iframe srcdoc='<script>alert(1)</script>'></iframe>",
        "<!--><script>alert(1)</script>-->",
        "<b title='\"><script>alert(1)</script>'>x</b>",
    ],
)
def test_cleaner_lets_nothing_active_through(text):
    cleaned = safe.clean(text, lambda run: None)
    seen = Loads(cleaned)
    assert not seen.handlers and not seen.scripts
    assert not re.search(r"javascript:|evil|svg", " ".join(seen.loads + seen.links))
    assert "<script" not in cleaned.replace("&lt;script", "")
