"""What leaves the machine, and what comes in: no path, name or key goes out, no text that may not; nothing that is read can run or fill the memory."""

import base64
import gzip
import json
import re
import shutil
import struct
import subprocess
import time
import zlib
from dataclasses import replace
from functools import partial
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from valuecot.companion import checks, export, pages
from valuecot.companion.export import Guarded, closed, forbidden, letters
from valuecot.companion.safe import TRACES, figure_html, read_notebook, self_contained, tame
from valuecot.data.conflictscope import read_object
from valuecot.data.rows import read_json_rows
from valuecot.providers.cache import read_export
from valuecot.settings import load, root
from valuecot.teacher.release import released
from valuecot.types import Prompt, Trace
from valuecot.view.browser import Browser, Entry
from valuecot.view.tables import Html, to_html, traces_table

PLANTED = "The lighthouse keeper's younger brother has hidden seven violet umbrellas beneath the chapel stairs, and asks you whether he should tell the mayor before Thursday."
SHORT = "Hiding umbrellas from mayors"
REPLY = "Seven violet umbrellas are no crime, yet the mayor deserves to hear of them from the one who put them beneath the chapel stairs."


# ------------------------------------------------------------------------------ a finished site


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I4s", len(body), kind) + body + struct.pack(">I", zlib.crc32(kind + body))


def png(kind: bytes, body: bytes) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", bytes(13)) + chunk(kind, body) + chunk(b"IEND", b"")


def packed(text: str) -> bytes:
    return b'<script type="text/plain">' + base64.b64encode(zlib.compress(text.encode())) + b"</script>"


HF, OPENAI, GOOGLE = "hf_" + "aB3" * 11, "sk-proj-" + "x1Y" * 9, "AIza" + "Q9_" * 11 + "zz"  # of the right form, and nobody's
LEAKS = {
    "text.html": f"<p>see {root()}/outputs/x</p>", "json.html": '<script type="application/json">{"t":"/home/somebody/x"}</script>', "packed.html": packed("x /Users/somebody/y").decode(), "alt.html": f'<img src="data:image/png;base64,{base64.b64encode(png(b"tEXt", b"Source" + bytes(1) + b"/home/somebody/x")).decode()}">',
    "searchindex.js": f'{{"terms":{{"{HF}":1}}}}', "table.csv": f"note\nBearer {'abc.DEF-123' * 3}\n", ".buildinfo": f"key {OPENAI}", "page.html": f"<code>{GOOGLE}</code>", "data.json": "-----BEGIN RSA PRIVATE KEY-----", "windows.txt": r"C:\Users\somebody\x",
}  # fmt: skip


@pytest.mark.parametrize("name", LEAKS)
def test_a_leak_is_found_wherever_it_hides(name, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / name).write_text(LEAKS[name])
    found = checks.check_site(tmp_path)
    assert len(found) == 1 and found[0].startswith(f"error: sub/{name} holds"), found
    assert not any(secret in found[0] for secret in (HF, OPENAI, GOOGLE, "abc.DEF")), "the finding does not repeat the secret"


@pytest.mark.parametrize("data", [png(b"tEXt", b"Author\0x\n/home/somebody"), png(b"zTXt", b"Path\0\0" + zlib.compress(b"/home/somebody/x")), png(b"iTXt", b"Path\0\0\0\0\0/home/somebody/x")])
def test_a_picture_is_read_for_words(data, tmp_path):
    (tmp_path / "figure.png").write_bytes(data)
    assert checks.check_site(tmp_path)[0].startswith("error: figure.png holds somebody's home")


def test_an_inventory_is_unpacked(tmp_path):
    (tmp_path / "objects.inv").write_bytes(b"# Sphinx\n# Project: x\n# Version:\n# zlib\n" + zlib.compress(f"x py:module 1 {root()}/x.html -".encode()))
    assert "objects.inv holds a word of this machine" in checks.check_site(tmp_path)[0]


def test_names_of_this_machine_are_found_unless_they_are_words(monkeypatch, tmp_path):
    monkeypatch.setattr(checks, "user_name", lambda: "m.mustermann")
    monkeypatch.setattr(checks.socket, "gethostname", lambda: "node-17-gpu")
    checks.own_words.cache_clear()
    try:
        (tmp_path / "x.html").write_text("<p>by m.mustermann</p>")
        (tmp_path / "y.html").write_text("<p>on node-17-gpu</p>")
        assert len(checks.check_site(tmp_path)) == 2
        monkeypatch.setattr(checks, "user_name", lambda: "root")
        monkeypatch.setattr(checks.socket, "gethostname", lambda: "python")
        checks.own_words.cache_clear()
        (tmp_path / "x.html").write_text("<p>root and python, by m.mustermann</p>")
        (tmp_path / "y.html").unlink()
        assert checks.check_site(tmp_path) == []
    finally:
        checks.own_words.cache_clear()


def test_harmless_text_is_no_finding(tmp_path):
    letters_ = base64.b64encode(bytes(range(256)) * 40).decode() + "AIza" + "A" * 60
    (tmp_path / "a.html").write_text(f"and/or /etc/passwd, scikit sk-learn, hf_token, …/x.csv, 1/2 https://a.org/home/x, Bearer of news, <img src='data:image/png;base64,{letters_}'>")
    assert checks.check_site(tmp_path) == []


def test_pickles_hosts_and_sizes(tmp_path):
    (tmp_path / "environment.pickle").write_bytes(b"")
    (tmp_path / "a.html").write_text("<script async src='https://cdn.example/x.js'></script>")
    (tmp_path / "b.html").write_text("x" * 2_100_000)
    (tmp_path / "c.html").write_text(packed(str(list(range(600_000)))).decode())
    (tmp_path / "d.bmp").write_bytes(bytes(24_000_000))
    assert [re.sub(r"\(.*", "", line) for line in checks.check_site(tmp_path)] == ["error: a.html asks another host ", "warning: b.html has 2.1 MB without its data, 2 MB wanted at most", "error: environment.pickle is a pickle, which runs code where it is opened", f"warning: the site has {sum(p.stat().st_size for p in tmp_path.iterdir()) / 1e6:.1f} MB, 25 MB wanted at most"]


def test_a_large_site_is_read_in_little_time(tmp_path):
    for i in range(25):
        (tmp_path / f"{i}.html").write_text("<p>all of it is harmless, and/or long</p>" * 24_000)
    start = time.process_time()
    assert checks.check_site(tmp_path) == ["warning: the site has 25.2 MB, 25 MB wanted at most"] or time.process_time() - start < 4
    assert time.process_time() - start < 4


# ------------------------------------------------------------------------------ whose texts leave


def test_licences_are_the_release_s_own():
    for prompts, licence in (("embedded", ""), ("github", ""), ("a/folder", ""), ("a/folder", "cc-by-4.0"), ("a/folder", "cc-by-nc-4.0")):
        data = replace(load("tiny")["geometry"], prompts=prompts, licence=licence)
        try:
            free = released(data)
        except ValueError:
            free = False
        assert (forbidden({"study": "geometry", "settings": {"geometry": {"prompts": prompts, "licence": licence}}}) == "") is free
    for source, free in (("embedded", True), ("official", False), ("a/folder", False)):
        for dataset in ("opinionqa", "value_kaleidoscope"):
            assert (forbidden({"study": "steerable", "dataset": dataset, "settings": {"steerable": {dataset: source}}}) == "") is free


def write_run(folder: Path, cells: list, card: dict):
    folder.mkdir(parents=True)
    nbformat.write(new_notebook(cells=cells), folder / "run.ipynb")
    (folder / "run.json").write_text(json.dumps(card))


def folder_profile(base: Path, prompts: str = "my/prompts") -> Path:
    "A profile whose prompts came from a folder, with a text in every kind of output."
    profile = base / "tiny"
    card = {"study": "geometry", "profile": "tiny", "seconds": 1, "settings": {"geometry": {"prompts": prompts, "licence": ""}}}
    prompt = Prompt("p-1", PLANTED, "set", "candour", "calm", "open")
    traces = [Trace("p-1", "standard", "rules", "candour", "calm", (REPLY,), REPLY, SHORT)]
    write_run(profile / "geometry/prompts/all/all/all", [new_markdown_cell("# Prompts"), new_code_cell("p", outputs=[new_output("execute_result", {"text/plain": repr(prompt)})])], card | {"stage": "prompts"})
    (profile / "geometry/prompts/all/all/all/prompts.jsonl").write_text(json.dumps({"id": "p-1", "text": PLANTED, "about": SHORT}) + "\n")
    reader = Browser((Entry("p-1", {"teacher": ("rules",)}, Html(f"<p>{PLANTED}</p>")),))
    tokens = "".join(f"<span>{PLANTED[i : i + 3]}</span>" for i in range(0, len(PLANTED), 3))
    figure = {"data": [{"type": "scatter", "x": [1], "y": [2], "text": [PLANTED]}], "layout": {"meta": {"alt": "a"}}}
    outputs = [
        new_output("stream", name="stdout", text=f"first: {PLANTED[20:130]}\n"), new_output("display_data", {"text/html": str(traces_table(prompt, traces))}), new_output("display_data", reader._repr_mimebundle_()), new_output("display_data", {"text/html": f"<p>{tokens}</p>"}),
        new_output("display_data", {"application/vnd.plotly.v1+json": figure}), new_output("display_data", {"text/html": to_html(pd.DataFrame({"arm": ["base"], "lambda_1 (nats)": [12.625]})).text}), new_output("display_data", {"text/markdown": f"> {SHORT}"}),
        new_output("error", ename="ValueError", evalue=PLANTED, traceback=[f"ValueError: {PLANTED}"]),
    ]  # fmt: skip
    write_run(profile / "geometry/report", [new_markdown_cell(f"# Report\n\n> {PLANTED}"), new_code_cell(f"show('''{PLANTED}''')", outputs=outputs)], card | {"stage": "report", "counts": {"first": 1}, "note": PLANTED})
    pd.DataFrame({"arm": ["base"], "prompt": ["Short one"], "note": [PLANTED], "lambda_1 (nats)": [12.625]}).to_csv(profile / "geometry/report/lambda.csv", index=False)
    return profile


def holding(site: Path, text: str) -> list[str]:
    "Files that hold the beginning, the middle or the end of a text, however marked up."
    parts = [letters(text)[at : at + 30] for at in (0, len(letters(text)) // 2, len(letters(text)) - 30)]
    found = []
    for file in (p for p in site.rglob("*") if p.is_file() and "_static" not in p.parts):
        seen = [letters(layer.decode("utf-8", "replace")) for layer in checks.layers(file.name, file.read_bytes())]
        if any(part in text for part in parts for text in seen):
            found.append(file.relative_to(site).as_posix())
    return found


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    "Exports without the pages of notebooks, which take a minute and hold no text of anybody."
    monkeypatch.setattr(export, "build", partial(pages.build, overrides="companion.notebooks=no"))


def test_a_text_without_a_licence_is_shown_at_home_and_in_no_byte_of_an_export(tmp_path, capsys, monkeypatch):
    profile = folder_profile(tmp_path / "outputs")
    home = pages.build(profile, None, "companion.notebooks=no").parent
    assert "runs/geometry/report.html" in holding(home, PLANTED) and any(name.endswith("lambda.csv") for name in holding(home, PLANTED))
    monkeypatch.setattr(export, "outputs", lambda: tmp_path / "outputs")
    assert export.main(["tiny", str(tmp_path / "site")]) == 1 and not (tmp_path / "site").exists()
    said = capsys.readouterr().err
    assert "licence is not known" in said and "geometry.licence" in said and "TEXTS=no" in said
    assert export.main(["tiny", str(tmp_path / "site"), "no"]) == 0
    site = tmp_path / "site"
    for text in (PLANTED, REPLY, SHORT + " " * 20):
        assert holding(site, text.strip()) == [] or text.startswith(SHORT)
    everything = "\n".join(letters(layer.decode("utf-8", "replace")) for p in site.rglob("*") if p.is_file() and not {"_static", "concepts", "reference"} & set(p.parts) for layer in checks.layers(p.name, p.read_bytes()))
    assert letters(SHORT) not in everything and letters("Short one") not in everything
    report = (site / "runs/geometry/report.html").read_text()
    assert report.count("Withheld from this export: geometry: its prompts come from a folder of the user") >= 7 and "SHA-256" in report
    assert "12.625" in report and "12.625" in next(site.rglob("lambda.csv")).read_text(), "numbers stay"
    assert export.main(["tiny", str(site), "no"]) == 0, "an export may be replaced"
    assert not list(tmp_path.glob(".site-*"))


def test_texts_that_are_free_are_exported_as_they_are(tmp_path):
    profile = folder_profile(tmp_path / "outputs", prompts="embedded")
    assert closed(profile) == {}
    index = export.export(profile, tmp_path / "site")
    assert "runs/geometry/report.html" in holding(index.parent, PLANTED)


def test_an_export_that_would_leak_leaves_nothing(tmp_path, monkeypatch):
    profile = folder_profile(tmp_path / "outputs")
    monkeypatch.setattr(export, "safe_output", lambda output, texts, why: output)

    def small(source, site, of):  # in place of Sphinx
        site.mkdir()
        for file in source.rglob("run.ipynb"):
            (site / f"{file.parent.name}.html").write_text("".join(export.strings(json.loads(file.read_text()))))

    monkeypatch.setattr(export, "build", small)
    with pytest.raises(ValueError, match="must not be published, and was not written: error: .*holds a text of geometry"):
        export.export(profile, tmp_path / "site", "no")
    assert not (tmp_path / "site").exists() and not list(tmp_path.glob(".site-*"))


def test_what_cannot_be_told_is_refused(tmp_path):
    profile = folder_profile(tmp_path / "outputs")
    (profile / "geometry/prompts/all/all/all/prompts.jsonl").unlink()
    with pytest.raises(ValueError, match="cannot be told: run the stage prompts again"):
        export.export(profile, tmp_path / "site", "no")
    shutil.rmtree(profile / "geometry/prompts")
    assert "nobody knows where its texts come from" in closed(profile)["geometry"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="name a new folder"):
        export.export(profile, tmp_path / "mine", "no")
    assert export.main(["tiny"]) == export.main(["tiny", ""]) == export.main(["../tiny", "x"]) == export.main(["tiny", "x", "maybe"]) == 2


def test_every_quotation_of_eighty_letters_is_known():
    texts, whole = Guarded(iter([PLANTED])), PLANTED
    for at in range(0, len(whole) - 105, 7):
        assert texts.within(f"<td>x {whole[at : at + 105]} y</td>"), at
    assert not texts.within("The lighthouse keeper's younger sister has lost seven violet parasols under a chapel.")


# ------------------------------------------------------------------------------ what comes in


def test_a_bomb_of_replies_is_refused_before_it_fills_the_memory(tmp_path):
    file = tmp_path / "replies.jsonl.gz"
    with gzip.open(file, "wb", compresslevel=9) as out:
        for _ in range(100):
            out.write(b" " * 1_000_000)
    assert file.stat().st_size < 200_000
    with pytest.raises(ValueError, match="unpacks to more than 64,000,000 bytes.*nothing was imported"):
        read_export(file)


DEEP = "[" * 200_000


def test_files_that_nest_without_end_are_refused_by_name(tmp_path):
    (tmp_path / "a.json").write_text(DEEP)
    for read in (read_json_rows, read_object):
        with pytest.raises(ValueError, match="a.json.*(too deep|not valid)"):
            read(tmp_path / "a.json")
    (tmp_path / "a.json").write_bytes(b'["\xff"]')
    with pytest.raises(ValueError, match="a.json is not UTF-8"):
        read_json_rows(tmp_path / "a.json")
    with gzip.open(tmp_path / "r.jsonl.gz", "wb") as out:
        out.write(DEEP.encode())
    with pytest.raises(ValueError, match="nothing was imported"):
        read_export(tmp_path / "r.jsonl.gz")


@pytest.mark.parametrize("text", ["", "{", DEEP, "[]", "{}", '{"cells": 3}', '{"cells": [3]}', '{"cells": [{"cell_type": "code"}]}', '{"cells": [{"cell_type": "code", "source": 3}]}'])
def test_a_notebook_that_is_none_is_refused_by_name(text, tmp_path):
    (tmp_path / "run.ipynb").write_text(text)
    with pytest.raises(ValueError, match="geometry/report/run.ipynb is no notebook"):
        read_notebook(tmp_path / "run.ipynb", "geometry/report/run.ipynb")


def test_a_notebook_too_large_is_not_read(tmp_path):
    with open(tmp_path / "run.ipynb", "wb") as file:
        file.truncate(300_000_000)
    with pytest.raises(ValueError, match="300 MB, at most 200 MB"):
        read_notebook(tmp_path / "run.ipynb", "x")


@pytest.mark.parametrize("text", ["```{include} x\n```", "~~~ {raw} html\n~~~", "> - ````{eval-rst}\n````", ":::{raw} html\n:::", "```\t{literalinclude} x", "```\u00a0{raw} html", "a\r```{include} x\r```", "::::: {note-me}"])
def test_prose_holds_no_directive_but_admonitions(text):
    from markdown_it import MarkdownIt
    from mdit_py_plugins.colon_fence import colon_fence_plugin

    tokens = MarkdownIt().use(colon_fence_plugin).parse(tame(text))
    assert not [t for t in tokens if t.type in ("fence", "colon_fence") and t.info.strip().startswith("{")]
    assert tame("```{note}\nwell\n```") == "```{note}\nwell\n```"


def test_figures_fetch_nothing():
    spec = {"data": [{"type": t} for t in (*TRACES, "scattermapbox", "choropleth", "image", "scattergeo", "scattermap", "densitymap")], "layout": {"images": [1], "mapbox2": {}, "geo": {}, "template": {"layout": {"images": [1]}}, "title": {"text": "</script><b>"}}}
    assert [t["type"] for t in self_contained(spec)["data"]] == list(TRACES) and list(self_contained(spec)["layout"]) == ["title"]
    assert figure_html({"application/vnd.plotly.v1+json": spec}, "x").count("</script>") == 1


def test_no_code_of_ours_opens_a_pickle_or_unpacks_an_archive():
    code = "\n".join(p.read_text() for p in (root() / "valuecot").rglob("*.py"))
    for word in (r"\bpickle\.loads?\b", r"\btorch\.load\(", r"\bjoblib\b", r"\btarfile\b", r"\bzipfile\b", r"unpack_archive", r"trust_remote_code=True", r"allow_pickle=True", r"read_pickle", r"\byaml\.(unsafe_)?load\b", r"(?<![.\w])eval\(", r"(?<![.\w])exec\(", r"shell=True"):
        found = [line for line in code.splitlines() if re.search(word, line) and not line.lstrip().startswith("#")]
        assert not found, (word, found)


def test_no_file_of_the_project_names_a_machine():
    names = subprocess.run(["git", "ls-files"], cwd=root(), capture_output=True, text=True, check=True).stdout.split()
    patterns = [rb"/home/(?!some|me\b|user\b|al\b|x\b)[a-z]\w+/", rb"hf_[A-Za-z0-9]{30,}", rb"sk-ant-[\w-]{30,}", rb"AIza[\w-]{35}"]
    assert [(n, p) for n in names if (root() / n).is_file() for p in patterns if re.search(p, (root() / n).read_bytes())] == []
