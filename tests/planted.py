"""A profile in which every place that text can come from holds text that would like to be code.

Planted code calls `planted("name")`, which tests/browser.py writes down; hosts are under evil.example, which its trap answers."""

import json
from pathlib import Path

import nbformat
import pandas as pd
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from valuecot.types import Prompt, Trace
from valuecot.view.browser import PAGES, Browser, Entry
from valuecot.view.dots import dots
from valuecot.view.tables import Html, to_html, to_markdown, traces_table

SECRET = "root:x:0:0"  # how /etc/passwd starts


def run(name: str) -> str:
    return f"planted('{name}')"


def script(name: str) -> str:
    return f"<script>{run(name)}</script>"


def image(name: str) -> str:
    return f'<img src="http://evil.example/{name}.png" onerror="{run(name)}">'


PLANTS = [  # markup, Markdown, reStructuredText, templates, formulas
    script("script"), image("image"), f'<svg onload="{run("svg")}"><a xlink:href="javascript:{run("xlink")}">x</a></svg>', f"<svg/onload={run('slash')}>",
    f'<a href="javascript:{run("a")}">a</a>', f'<a href="java\tscript:{run("tab")}">b</a>', f'<a href="&#106;avascript:{run("entity")}">c</a>', f'<a href="data:text/html,{script("data")}">d</a>',
    f"[e](javascript:{run('md')})", "[f](file:///etc/passwd)", "[g](../../../../../../../../etc/passwd)", "[h](/etc/passwd)", "<path:../../../../../../../../etc/passwd>", "![i](http://evil.example/md.png)", "![j](../../../../../../../../etc/passwd)", "![k][r]\n\n[r]: http://evil.example/reference.png",
    "{{ config }} {{ 7 * 7 }} {% include '/etc/passwd' %} ${7*7} <%= 7*7 %>",
    "```{include} /etc/passwd\n```", "```{include} ../../../../../../../../etc/passwd\n```", "```{literalinclude} ../../../../../../../../etc/passwd\n```", "```{raw} html\n:file: /etc/passwd\n```", "```{csv-table}\n:file: /etc/passwd\n```",
    f"```{{eval-rst}}\n.. raw:: html\n\n   {script('rst')}\n```", f"```{{raw}} html\n{script('raw')}\n```", f":::{{raw}} html\n{script('colon')}\n:::", f"> ```{{raw}} html\n> {script('quoted')}\n> ```", f"- ```{{raw}} html\n  {script('item')}\n  ```", f"~~~{{raw}} html\n{script('tilde')}\n~~~", f"``` {{raw}} html\n{script('blank')}\n```",
    f"```{{code-cell}} ipython3\n{run('cell')}\n```", "```{image} http://evil.example/directive.png\n```", "```{figure} /etc/passwd\n```", "```{iframe} http://evil.example/\n```", "```{button-link} javascript:planted('button-link')\n```",
    "{download}`../../../../../../../../etc/passwd`", "{download}`x </etc/passwd>`", "{raw}`html`", "{eval}`1`", ":download:`/etc/passwd`", f".. raw:: html\n\n   {script('bare rst')}", ".. include:: /etc/passwd", "|substitution|_", "`text <javascript:planted('rst link')>`_",
    rf"$\href{{javascript:{run('tex')}}}{{x}}$", rf"$$\href{{javascript:{run('display')}}}{{x}}$$", rf"\(\href{{javascript:{run('paren')}}}{{x}}\)", r"$\require{html}\style{background:url(http://evil.example/tex.png)}{x}\unicode{x3c}$", r"$\text{</span><script>planted('tex text')</script>}$",
    "<meta http-equiv=refresh content='0;url=http://evil.example/refresh'>", "<base href='http://evil.example/'>", "<link rel=stylesheet href='http://evil.example/x.css'>", "<link rel=preconnect href='https://evil.example'>", "<style>@import 'http://evil.example/s.css'; * {background: url(http://evil.example/s.png)}</style>",
    f"<iframe srcdoc=\"{script('srcdoc')}\"></iframe><iframe src='http://evil.example/frame'></iframe>", "<object data='http://evil.example/object'></object><embed src='http://evil.example/embed'>", f"<form action='http://evil.example/form'><button formaction=\"javascript:{run('form')}\">send</button><input autofocus onfocus={run('focus')}></form>",
    f"<details open ontoggle={run('toggle')}>x</details>", f"<video src=x onerror={run('video')}></video>", f"<button onclick={run('click')}>press</button>", "<div style='background:url(http://evil.example/bg.png)'>x</div>", "<table background='http://evil.example/table.png'><tr><td>x</td></tr></table>",
    f"</script>{script('closed')}", f"</textarea></style></title>{image('closed')}", f"<!--><img src=x onerror={run('comment')}>-->", f"<noscript><p title=\"</noscript><img src=x onerror={run('noscript')}>\"></noscript>", f"<math><mtext></form><form><mglyph><style></math><img src=x onerror={run('mxss')}>",
    f"&lt;script&gt;{run('escaped')}&lt;/script&gt;", "]]>\u2028\u2029\x00<![CDATA[x]]>", "a | b | `c` *d* __e__ # f", "=cmd|' /C calc'!A0",
]  # fmt: skip
TEXTS = [f"SEEN{i:02d} {plant}" for i, plant in enumerate(PLANTS)]
ALL = "\n\n".join(TEXTS)
SHORT = f"{script('short')}{image('short')}`{{raw}}`[x](javascript:{run('short')})$x${{{{ 7*7 }}}}"  # where a name is wanted
NAME = "<img src=x onerror=planted('name')>"  # of a folder: no slash


def display(kind: str, value: object, **more) -> nbformat.NotebookNode:
    return new_output("display_data", {kind: value, **more})


def plot() -> dict:
    "A figure whose every word is planted, and which would load more than its data."
    words = f"{script('plot')}{image('plot')}<a href=\"javascript:{run('plot link')}\">x</a><a href='http://evil.example/'>y</a>"
    trace = {"type": "scatter", "x": [1, 2], "y": [1, 2], "name": words, "text": [words, words], "hovertext": [words, words], "hovertemplate": words, "mode": "markers+text", "customdata": [words, words]}
    maps = [{"type": "scattergeo", "lon": [1], "lat": [1]}, {"type": "choropleth", "locations": ["FRA"], "z": [1]}, {"type": "scattermapbox", "lon": [1], "lat": [1]}, {"type": "image", "source": "http://evil.example/trace.png"}]
    note = {"text": words, "x": 1, "y": 1, "hovertext": words, "captureevents": True, "clicktoshow": "onoff"}
    layout = {"title": {"text": rf"$\href{{javascript:{run('plot tex')}}}{{x}}$ {words}"}, "xaxis": {"title": {"text": words}, "ticktext": [words], "tickvals": [1]}, "annotations": [note], "height": 300, "meta": {"alt": words, "caption": ALL}, "margin": {"b": 50}}
    layout |= {"images": [{"source": "http://evil.example/layout.png", "x": 0, "y": 1, "sizex": 1, "sizey": 1}], "mapbox": {"style": "http://evil.example/style.json"}, "font": {"family": "x; background:url(http://evil.example/font.png)"}}
    layout |= {"updatemenus": [{"buttons": [{"label": words, "method": "relayout", "args": [{"title.text": words}]}]}], "legend": {"title": {"text": words}}}
    return {"data": [trace, *maps], "layout": layout, "config": {"plotlyServerURL": "http://evil.example/", "showLink": True}}


def ours() -> list:
    "What our own views make of planted text."
    prompt, phases = Prompt("p<b>1", ALL, SHORT, SHORT, SHORT, "open"), (ALL, SHORT, "It is 'SEEN00'.")
    traces = [Trace(prompt.id, "standard", SHORT, SHORT, SHORT, (ALL,), ALL, ALL), Trace(prompt.id, "annealing", "rules", "a", "b", phases, "", SHORT)]
    table = pd.DataFrame({SHORT: TEXTS, "n": range(len(TEXTS))})
    points = pd.DataFrame([{"label": SHORT, "arm": "sft", "model": "llama", "ring": False, "open": False, "value": 0.5, "low": 0.4, "high": 0.6}])
    lines = pd.DataFrame([{"label": SHORT, "value": 0.3, "low": 0.2, "high": 0.4}])
    reader = Browser(tuple(Entry(f"{i} {text}", {SHORT: (SHORT, text)}, Html(f"<p>{text}</p>" + to_html(table[:2]).text)) for i, text in enumerate(TEXTS[:6])))
    drawn = json.loads(json.dumps(dots(points, lines, SHORT, ALL)._repr_mimebundle_()))
    return [display("text/html", str(traces_table(prompt, traces))), display("text/html", to_html(table, ALL).text), display("text/markdown", to_markdown(table)), new_output("display_data", reader._repr_mimebundle_()), new_output("display_data", drawn)]


def foreign() -> list:
    "Outputs that none of our views made."
    rows = [{"title": ALL, "marks": [[SHORT, [SHORT, ALL]]], "body": ALL}, {"title": SHORT, "marks": [], "body": ALL}]
    outputs = [new_output("stream", name="stdout", text=ALL), new_output("error", ename=SHORT, evalue=ALL, traceback=[ALL, SHORT]), new_output("execute_result", {"text/plain": ALL}), display("application/vnd.plotly.v1+json", plot()), display(PAGES, rows)]
    outputs += [display(kind, ALL) for kind in ("text/html", "text/markdown", "text/latex", "image/svg+xml", "application/javascript", "application/json", "application/vnd.jupyter.widget-view+json", "text/x-planted")]
    return outputs


def one_by_one() -> list:
    "A plant may hide those after it, so each also comes alone."
    return [display(kind, text) for kind in ("text/html", "text/markdown") for text in TEXTS]


def card(stage: str) -> dict:
    values = {"stage": SHORT, "study": SHORT, "profile": SHORT, "model": SHORT, "arm": SHORT, "seed": SHORT, "key": ALL, "revision": SHORT, "dirty": True, "device": SHORT, "dtype": SHORT, "seconds": 1.5}
    return values | {SHORT: {SHORT: [ALL, {SHORT: ALL}]}, "parameters": {SHORT: ALL}, "settings": {f"geometry.{SHORT}": ALL}, "counts": {SHORT: 3, "text": ALL}, "inputs": {f"grpo/{SHORT}": "abc", "../../../../etc/passwd": "abc"}, "packages": {SHORT: SHORT}}


def planted_profile(base: Path) -> Path:
    "outputs/<profile> with one run of each sort of page."
    profile = base / "tiny"
    texts = [new_markdown_cell(text) for text in TEXTS]
    head = [new_markdown_cell(f"---\nmyst:\n  enable_extensions: [substitution, html_image]\n---\n# {SHORT}\n\n> {ALL}")]
    code, alone = new_code_cell(f"# {ALL}\nx = 1", outputs=foreign()), new_code_cell("alone()", outputs=one_by_one())
    bodies = {"report": [*texts, new_markdown_cell("## Run"), code, new_code_cell("ours()", outputs=ours())], "faithfulness": [alone]}
    folders = [f"geometry/grpo/{NAME}/{NAME}/seed{NAME}", "geometry/report", f"{NAME}/{NAME}/llama-{NAME}", "steerable/faithfulness/llama/sft/seed0"]
    for folder in folders:
        place = profile / folder
        place.mkdir(parents=True)
        nbformat.write(new_notebook(cells=[*head, *bodies.get(folder.split("/")[1], [code])]), place / "run.ipynb")
        (place / "run.json").write_text(json.dumps(card(folder.split("/")[1])))
        pd.DataFrame({SHORT: TEXTS}).to_csv(place / "texts.csv", index=False)
    pd.DataFrame({SHORT: TEXTS}).to_csv(profile / "geometry/report" / f"{NAME}.csv", index=False)
    failed = profile / "geometry/sft/llama/base/seed0"
    failed.mkdir(parents=True)
    nbformat.write(new_notebook(cells=[new_code_cell("1/0", outputs=foreign())]), failed / "failed.ipynb")
    return profile
