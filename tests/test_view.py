"""Figures and tables: one scale for all arms, nothing cut in silence, text that stays text."""

import io
import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import matplotlib.image
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import torch

from valuecot.geometry import report
from valuecot.settings import load
from valuecot.stats import mean_se, wilson
from valuecot.types import Arm, Landscape, Prompt, Rollout, Trace
from valuecot.view import browser, curves, landscapes, lengths, tables, theme

T = torch.linspace(-0.05, 0.05, 15)
EIGENVALUES = {"Base": (800.0, 300.0), "Standard": (260.0, 90.0), "Annealing": (230.0, 100.0)}


def valley(l1, l2, tilt=0.0, center=2.5):
    rise = 0.5 * (l1 * T[:, None] ** 2 + l2 * T[None] ** 2) + tilt * T[:, None]
    return Landscape(T, T, center + rise, center)


@pytest.fixture
def arms():
    return {label: valley(*pair, tilt=4.0 if label == "Base" else 0.0) for label, pair in EIGENVALUES.items()}


def pixels(figure):
    return matplotlib.image.imread(io.BytesIO(figure.png(60)), format="png")


# ------------------------------------------------------------------------------ theme


def test_arm_colours_are_stable_across_processes():
    code = "from valuecot.view.theme import arm_color; print(arm_color('some-control'), arm_color('base'))"
    out = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout for _ in range(2)]
    assert out[0] == out[1] == f"{theme.arm_color('some-control')} {theme.arm_color('base')}\n"


def test_arms_of_one_study_have_their_own_colours():
    for names in (("base", "base-think", "standard", "annealing"), ("zero-shot", "sft", "human-cot", "synthetic-cot", "rlvr")):
        assert len({theme.arm_color(n) for n in names}) == len(names)
    arm = Arm("base", "My label", "", "grpo", False, "standard", "response")
    assert theme.arm_color(arm) == theme.arm_color("base") and theme.arm_label(arm) == "My label"
    assert re.fullmatch("#[0-9a-f]{6}", theme.arm_color("anything at all"))


def test_grey_is_readable_on_light_and_dark():
    def luminance(color):
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        return sum(w * (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4) for w, c in zip((0.2126, 0.7152, 0.0722), parts, strict=True))

    for page in ("#ffffff", "#121212"):
        low, high = sorted((luminance(theme.NEUTRAL), luminance(page)))
        assert (high + 0.05) / (low + 0.05) >= 4.0


def test_theme_imports_no_plotly():
    code = "import sys, valuecot.view.landscapes, valuecot.view.curves, valuecot.view.tables; assert 'plotly' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# ------------------------------------------------------------------------------ landscapes


@pytest.mark.parametrize("draw", [landscapes.surfaces, landscapes.contours])
@pytest.mark.parametrize("zoom", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 8])
def test_any_number_of_arms_is_valid_plotly(draw, zoom, count):
    planes = {f"arm {i}": valley(100 * (i + 1), 50, tilt=i) for i in range(count)}
    figure = draw(planes, {"arm 0": (1.0, 0.5)}, "Title", zoom=zoom)
    made = go.Figure(figure.plotly)
    kind = "surface" if draw is landscapes.surfaces else "contour"
    assert len({t.scene if kind == "surface" else t.xaxis for t in made.data if t.type == kind}) == count
    headings = [a.text for a in made.layout.annotations]
    assert all(any(f"<b>{label}</b>" in h for h in headings) for label in planes)
    json.dumps(figure.plotly, allow_nan=False)


def test_panels_do_not_overlap():
    for count in range(1, 9):
        places = landscapes.domains(count)
        assert all(0 <= v <= 1 for p in places for side in p.values() for v in side)
        for i, a in enumerate(places):
            for b in places[:i]:
                assert a["x"][1] <= b["x"][0] or b["x"][1] <= a["x"][0] or a["y"][1] <= b["y"][0] or b["y"][1] <= a["y"][0]


def test_surfaces_share_one_range_and_one_colour_bar(arms):
    figure = landscapes.surfaces(arms, EIGENVALUES)
    spec = go.Figure(figure.plotly).layout
    ranges = {tuple(getattr(spec, s).zaxis.range) for s in ("scene", "scene2", "scene3")}
    assert ranges == {(spec.coloraxis.cmin, spec.coloraxis.cmax)}
    assert all(t.coloraxis == "coloraxis" for t in go.Figure(figure.plotly).data if t.type == "surface")
    top = max(float((a.loss - a.center).max()) for a in arms.values())
    assert spec.coloraxis.cmax == pytest.approx(top)
    drawn = figure.draw()
    assert {tuple(np.round(a.get_zlim(), 5)) for a in drawn.axes if hasattr(a, "get_zlim")} == {tuple(np.round(next(iter(ranges)), 5))}


def test_contours_share_one_set_of_levels(arms):
    figure = landscapes.contours(arms, EIGENVALUES)
    steps = {tuple(sorted(t["contours"].items())) for t in figure.plotly["data"] if t.get("hovertemplate")}
    assert len(steps) == 1
    low, high = landscapes.common_range([landscapes.rise(a) for a in arms.values()])
    edges = landscapes.levels(low, high)
    assert edges[0] <= low and edges[-1] >= high and np.allclose(np.diff(edges), edges[1] - edges[0])
    sets = [c.levels for axes in figure.draw().axes for c in axes.collections if hasattr(c, "levels") and len(c.levels) > 1]
    assert len(sets) >= 3 and all(np.allclose(s, edges) or set(np.round(s, 9)) <= set(np.round(edges, 9)) for s in sets)


def test_zoom_has_ranges_of_its_own_and_says_so(arms):
    figure = landscapes.surfaces(arms, EIGENVALUES, zoom=True)
    tops = {t["cmax"] for t in figure.plotly["data"] if t["type"] == "surface"}
    assert len(tops) == 3 and "ZOOM" in figure.caption
    assert sum("own range" in a["text"] for a in figure.plotly["layout"]["annotations"]) == 3


def test_alpha_runs_along_x():
    plane = Landscape(T, T[:7], (T[:, None] * 3 + 0 * T[None, :7]) + 1.0, 1.0)
    surface = landscapes.surfaces({"tilted": plane}, {}).plotly["data"][0]
    assert len(surface["z"]) == 7 and len(surface["z"][0]) == 15
    assert surface["z"][0][-1] == pytest.approx(0.15, rel=1e-4)
    assert surface["z"][0] == surface["z"][-1]


def test_range_holds_theta_and_negative_values(arms):
    low, high = landscapes.common_range([landscapes.rise(a) for a in arms.values()])
    assert low < 0 < high  # the tilted arm falls below theta
    assert landscapes.common_range([np.array([[1.0, 2.0]])])[0] == 0.0
    assert landscapes.common_range([np.zeros((2, 2))])[1] > 0


def test_cut_is_said_and_can_be_turned_off(arms):
    steep = {**arms, "Cliff": valley(80_000, 10)}
    top = float((steep["Cliff"].loss - steep["Cliff"].center).max())
    cut = landscapes.surfaces(steep, {})
    assert "Cliff is cut at" in cut.caption and f"{top:.3g}" in cut.caption
    assert cut.plotly["layout"]["coloraxis"]["cmax"] < top
    whole = landscapes.surfaces(steep, {}, ceiling=math.inf)
    assert "cut" not in whole.caption and whole.plotly["layout"]["coloraxis"]["cmax"] == pytest.approx(top)
    assert "cut" not in landscapes.surfaces(arms, {}).caption


def test_blank_cells_are_gaps_and_counted(arms):
    loss = arms["Standard"].loss.clone()
    loss[-2:, 0], loss[0, 0] = torch.nan, torch.inf
    torn = {**arms, "Standard": replace(arms["Standard"], loss=loss)}
    for draw in (landscapes.surfaces, landscapes.contours):
        figure = draw(torn, {})
        assert "Standard: 3 of 225 cells" in figure.caption
        assert any(None in row for t in figure.plotly["data"] if t["type"] in ("surface", "contour") for row in t["z"])
        assert pixels(figure)[..., 3].any()


def test_an_arm_without_any_finite_loss_leaves_the_others(arms):
    dead = {**arms, "Dead": replace(arms["Base"], loss=torch.full_like(arms["Base"].loss, torch.nan))}
    for draw in (landscapes.surfaces, landscapes.contours):
        for zoom in (False, True):
            figure = draw(dead, {}, zoom=zoom)
            assert "Dead: 225 of 225" in figure.caption
            figure.png(50)
    with pytest.raises(ValueError, match="finite"):
        landscapes.surfaces({"Dead": dead["Dead"]}, {})


def test_what_cannot_be_drawn_is_refused(arms):
    with pytest.raises(ValueError, match="no landscape"):
        landscapes.surfaces({}, {})
    with pytest.raises(ValueError, match="Nobody"):
        landscapes.contours(arms, {"Nobody": (1, 2)})
    with pytest.raises(ValueError, match="reductions"):
        landscapes.contours({**arms, "x": replace(arms["Base"], reduction="example")}, {})


def test_planes_of_different_size_are_said(arms):
    wide = {**arms, "Wide": replace(arms["Base"], alphas=2 * T)}
    assert "planes differ in size" in landscapes.contours(wide, {}).caption


@pytest.mark.parametrize("draw", [landscapes.surfaces, landscapes.contours])
def test_a_preview_is_called_one(draw, arms):
    wanted = {**arms, "Base": replace(arms["Base"], note="Chebyshev preview.")}
    assert "Base: Chebyshev preview. " in draw(wanted, {}).caption + " "
    assert "preview" not in draw(arms, {}).caption


@pytest.mark.parametrize("draw", [landscapes.surfaces, landscapes.contours])
def test_png_is_transparent_and_not_blank(draw, arms, tmp_path):
    figure = draw(arms, EIGENVALUES, "Title", "A caption")
    image = matplotlib.image.imread(figure.save_png(tmp_path / "x.png"))
    assert image[0, 0, 3] == 0  # the page shows through
    inked = image[image[..., 3] > 0.9][:, :3]
    assert len(inked) > 2000 and inked.std(axis=0).min() > 0.05


def test_bundle_carries_description_and_caption(arms):
    bundle = landscapes.surfaces(arms, EIGENVALUES, "T", "Seed 0")._repr_mimebundle_()
    spec = bundle["application/vnd.plotly.v1+json"]
    assert "Base" in spec["layout"]["meta"]["alt"] and spec["layout"]["meta"]["caption"].startswith("Seed 0.")
    assert [a["name"] for a in spec["layout"]["annotations"] if "name" in a] == ["caption"]
    json.dumps(bundle, allow_nan=False)
    go.Figure(spec)


# ------------------------------------------------------------------------------ curves


def history(seeds=(0,), models=("llama",), band=False):
    rows = []
    for model in models:
        for arm, slope in {"base": 1.0, "annealing": 2.0}.items():
            for seed in seeds:
                for step in range(20):
                    for metric in ("reward", "kl"):
                        value = slope * step + seed
                        rows.append((model, arm, seed, "grpo", step, metric, value, value - 1 if band else np.nan, value + 1 if band else np.nan))
    return pd.DataFrame(rows, columns=[*curves.COLUMNS, "low", "high"])


def test_curves_one_line_per_arm_and_panel():
    figure = curves.training_curves(history(models=("llama", "qwen")))
    made = go.Figure(figure.plotly)
    assert len(made.data) == 2 * 2 * 2
    assert {t.line.color for t in made.data} == {theme.arm_color("base"), theme.arm_color("annealing")}
    assert sum(bool(t.showlegend) for t in made.data) == 2
    assert {a.text for a in made.layout.annotations} == {"llama · GRPO", "qwen · GRPO"}
    assert pixels(figure)[..., 3].any()


def test_curves_bands_are_named():
    with pytest.raises(ValueError, match="interval"):
        curves.training_curves(history(band=True))
    figure = curves.training_curves(history(band=True), interval="95 % CI over completions")
    assert "95 % CI over completions" in figure.caption
    assert sum(t.get("fill") == "toself" for t in figure.plotly["data"]) == 4


def test_curves_of_several_seeds_show_mean_se_and_points():
    figure = curves.training_curves(history(seeds=(0, 1, 2)))
    assert "SE over seeds (k = 3)" in figure.caption
    mean = next(t for t in figure.plotly["data"] if t.get("showlegend"))
    assert mean["y"][0] == pytest.approx(1.0)  # of 0, 1, 2
    band = next(t for t in figure.plotly["data"] if t.get("fill"))
    assert band["y"][0] - mean["y"][0] == pytest.approx(1 / math.sqrt(3), rel=1e-4)
    assert any(t["mode"] == "markers" and len(t["x"]) == 60 for t in figure.plotly["data"])


def test_curves_refuse_what_they_cannot_draw():
    with pytest.raises(ValueError, match="seed"):
        curves.training_curves(history().drop(columns="seed"))
    with pytest.raises(ValueError, match="no rows"):
        curves.training_curves(history().iloc[:0])


def test_curves_survive_missing_values():
    rows = history()
    rows.loc[rows.index[3], "value"] = np.nan
    json.dumps(curves.training_curves(rows.drop(columns=["low", "high"])).plotly, allow_nan=False)


# ------------------------------------------------------------------------------ tables


@pytest.mark.parametrize(
    "mean, se, text",
    [
        (1.2345, 0.0412, "1.23 ± 0.04"),
        (4083.87, 156.53, "4080 ± 160"),
        (0.5, 0.0, "0.5 ± 0"),
        (-0.0312, 0.0042, "-0.031 ± 0.004"),
        (1.0, 0.096, "1.0 ± 0.1"),
        (12.0, 0.199, "12.0 ± 0.2"),
        (1.5, None, "1.5 ± –"),
        (1.5, math.nan, "1.5 ± –"),
        (None, 1.0, "–"),
        (math.nan, None, "–"),
        (3e-9, 2e-10, "(3.0 ± 0.2)e-9"),
        (0.0, 0.3, "0.0 ± 0.3"),
        (5.0, 120.0, "0 ± 120"),
        (np.float64(2.0), np.float32(0.5), "2.0 ± 0.5"),
    ],
)
def test_digits_follow_the_standard_error(mean, se, text):
    assert tables.with_se(mean, se) == text


def test_eigenvalue_table_names_each_variation():
    settings = load("test")
    cells = [(m, arm, seed, i, subset) for m in ("qwen", "llama") for arm in ("base", "standard", "annealing") for seed in (0, 1) for i in ("valuecot", "pyhessian") for subset in (0, 1, 2)]
    rows = pd.DataFrame(cells, columns=["model", "arm", "seed", "instrument", "subset"])
    rows["lambda_1"] = 100.0 + 10 * rows.subset + 50 * rows.seed + 1000 * (rows.model == "llama")
    rows = rows.assign(lambda_2=10.0, lambda_min=-1.0, residual_min=2e-3, residual_1=1e-4 * (1 + rows.subset), residual_2=1e-5, matvecs=20, warnings="", scored_tokens=300, loss=2.0, gradient_norm=0.1)
    line = report.eigenvalue_table(rows, "qwen", settings).iloc[0]
    assert (line["lambda_1 (nats)"], line["subsets"], line["seeds"]) == (135.0, 3, 2)
    assert line["lambda_1 SE over subsets (nats)"] == pytest.approx(10 / math.sqrt(3))
    assert line["lambda_1 SE over seeds (nats)"] == pytest.approx(25.0)
    assert line["worst residual"] == pytest.approx(3e-4)
    single = report.eigenvalue_table(rows[rows.seed == 0], "qwen", settings)
    assert math.isnan(single["lambda_1 SE over seeds (nats)"].iloc[0])
    page = str(report.shown(single, prompts=5))
    assert "110 ± 6" in page and "disjoint subsets of 5 held-out prompts" in page and "3 subsets of 100" in page


def test_the_error_over_prompts_is_not_that_over_seeds():
    "Three seeds that wrote the same are no more prompts; an arm that does not think has no rate."
    one = [{"model": "llama", "arm": arm, "teacher": "a", "prompt_id": f"p{i}", "well_formed": i < 3, "reward": None if i == 4 else float(i), "words": 10 * i} for arm in ("base", "annealing") for i in range(5)]
    once, thrice = (report.by_teacher(pd.DataFrame([row | {"seed": seed} for row in one for seed in range(n)]), {"annealing"}) for n in (1, 3))
    same = [c for c in once.columns if c not in ("samples", "scored")]
    pd.testing.assert_frame_equal(once[same], thrice[same])
    base, annealing = thrice.to_dict("records")
    assert base["well_formed"] is None or math.isnan(base["well_formed"])
    assert annealing["well_formed"] == pytest.approx(0.6) and (annealing["well_formed_low_95"], annealing["well_formed_high_95"]) == pytest.approx(wilson(3, 5))
    assert (annealing["prompts"], annealing["samples"], annealing["scored"]) == (5, 15, 12)
    assert annealing["reward_se"] == pytest.approx(mean_se([0.0, 1.0, 2.0, 3.0], "prompts").se) and annealing["words_se"] == pytest.approx(mean_se([0.0, 10.0, 20.0, 30.0, 40.0], "prompts").se)
    shown = tables.measured(thrice, reward="reward", words="words")
    assert shown["well formed (95 %)"][0] == "–" and shown["well formed (95 %)"][1].startswith("0.60 (") and shown["words ± SE"][0] == "20 ± 7"


HOSTILE = "<script>alert(1)</script> | **b** `c` $5 and $6 [x](javascript:1) {cite}`k`\nnext"


def test_cells_are_text_in_html_and_markdown():
    table = pd.DataFrame({HOSTILE: [HOSTILE, None, math.nan]})
    page, source = str(tables.to_html(table, caption=HOSTILE)), tables.to_markdown(table)
    assert "<script" not in page + source and "mathjax_ignore" in page
    assert page.count("–") == source.count("–") == 2
    markdown_it = pytest.importorskip("markdown_it")
    rendered = markdown_it.MarkdownIt("commonmark").enable("table").render(source)
    assert not re.search(r"<(script|strong|code|a)\b", rendered)
    assert rendered.count("<td>") == 3
    assert "$" not in re.sub(r"\\\$", "", source)


def traces(text):
    hot = ("You say 'so quiet'.", "Care first.", text)
    return [
        Trace("a", "standard", "rules", "v", "w", (text,), "The “so quiet” sister; 'nobody said this'.", "Ask."),
        Trace("a", "annealing", "rules", "v", "w", hot, "\n\n".join(hot), text),
    ]


def test_traces_are_side_by_side_with_phases_and_true_quotations():
    page = str(tables.traces_table(Prompt("a", "She is so quiet.", "s", "care", "privacy", ""), traces("plain")))
    assert page.index("standard (rules)") < page.index("annealing (rules)")
    assert [page.index(h) for h in ("Phase 1", "Phase 2", "Phase 3")] == sorted(page.index(h) for h in ("Phase 1", "Phase 2", "Phase 3"))
    assert re.findall("<mark>(.*?)</mark>", page) == ["so quiet", "so quiet"]


def test_traces_escape_everything():
    prompt = Prompt("a", HOSTILE, "s", HOSTILE, HOSTILE, "")
    page = str(tables.traces_table(prompt, {HOSTILE: traces(HOSTILE)[1], "rollout": Rollout("a", "", HOSTILE, None, None, None, 1, True, False)}))
    assert "<script" not in page and "&lt;script&gt;" in page
    with pytest.raises(ValueError, match="no trace"):
        tables.traces_table(prompt, [])


def test_quotations():
    def found(text, prompt):
        return [text[a:b] for a, b in tables.quoted_details(text, prompt)]

    assert found("it's 'a 10W spec', don't", "the a 10W spec") == ["a 10W spec"]
    assert found("'don't want it' is said", "I don't want it now") == ["don't want it"]
    assert found('"up to" and ‘urgent,’ too', "urgent up to 5") == ["up to", "urgent"]
    assert found("'absent'", "present") == [] and found("'" * 50, "x") == []


# ------------------------------------------------------------------------------ texts to page through


def entry(i: int, teacher: str, *seen: str):
    return browser.Entry(f"prompt {i}", {"teacher": (teacher,), "seen": seen}, tables.Html(f"<p>text of {i} &lt;b&gt;</p>"))


ENTRIES = (entry(0, "rules"), entry(1, "gpt", "refusal"), entry(2, "rules", "refusal", "hard words"), entry(3, "rules", "refusal"))
READER = """
const lists = [...document.querySelectorAll("select")], told = [], box = document.querySelector(".vc-browser");
const note = () => told.push([".vc-title", "output", ".vc-entry"].map(s => box.querySelector(s).textContent).join("|"));
const wait = setInterval(() => {
  if (!box.querySelector("output").textContent) return;
  clearInterval(wait);
  note();
  lists[0].value = "rules"; lists[0].dispatchEvent(new Event("change")); note();
  lists[1].value = "refusal"; lists[1].dispatchEvent(new Event("change")); note();
  box.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight"})); note();
  box.querySelector(".vc-on").click(); note();
  lists[0].value = "gpt"; lists[1].value = "hard words"; lists[1].dispatchEvent(new Event("change")); note();
  document.body.textContent = "TOLD" + JSON.stringify(told) + "END";
}, 20);
"""


def test_a_reader_filters_and_turns_pages(tmp_path):
    if not shutil.which("chromium"):
        pytest.skip("chromium is not installed")
    page = tmp_path / "page.html"
    html = browser.Browser(ENTRIES)._repr_mimebundle_()["text/html"]
    page.write_text(f"<!doctype html><meta charset=utf-8><body>{html}<script>{READER}</script></body>")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--user-data-dir={tmp_path / 'user'}", "--virtual-time-budget=5000", "--dump-dom"]
    dom = subprocess.run(["chromium", *flags, page.as_uri()], capture_output=True, text=True, timeout=120).stdout
    told = json.loads(re.search("TOLD(.*)END", dom)[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert told == [
        "prompt 0|1 of 4|text of 0 <b>", "prompt 0|1 of 3|text of 0 <b>", "prompt 2|1 of 2|text of 2 <b>",
        "prompt 3|2 of 2|text of 3 <b>", "prompt 3|2 of 2|text of 3 <b>", "Nothing has all of these.|none|",
    ]  # fmt: skip


def test_lists_offer_what_there_is_and_say_how_often():
    html = browser.browser_html(browser.Browser(ENTRIES).rows())
    assert re.findall(r"<option[^>]*>([^<]*)", html) == ["all (4)", "rules (3)", "gpt (1)", "all (4)", "refusal (3)", "hard words (1)"]
    assert html.index("<label>teacher") < html.index("<label>seen") and "text of 0" in html and "text of 1" not in html


def test_three_thousand_texts_fit_into_a_page():
    prompt = Prompt("p", "I promised my son " * 40, "x", "a", "b", "")
    rng = np.random.default_rng(0)
    words = ["w" + str(i) for i in range(4000)]
    many = tuple(browser.Entry(str(i), {"teacher": ("rules",)}, tables.traces_table(prompt, [Trace("p", "standard", "rules", "a", "b", (text := " ".join(rng.choice(words, 150)),), text, "Ask.")])) for i in range(2900))
    assert len(browser.browser_html(browser.Browser(many).rows())) < 4e6


def test_lengths_are_drawn_as_they_are():
    rows = pd.DataFrame([{"teacher": t, "style": s, "words": w} for t in ("one", "two") for s, ws in (("standard", (10, 20, 20, 40)), ("annealing", (10, 20, 20, 40))) for w in ws])
    figure = lengths.lengths_figure(rows, "Lengths", "made up")
    first = figure.plotly["data"][0]
    assert (first["x"], first["y"]) == ([10, 10, 20, 40], [0, 0.25, 0.75, 1.0]) and len(figure.plotly["data"]) == 4
    assert sum(d["showlegend"] for d in figure.plotly["data"]) == 2 and pixels(figure).std() > 0
    go.Figure(figure.plotly)
