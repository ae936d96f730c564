"""The companion in a real browser: nothing planted runs, nothing is fetched, and everybody can read it."""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from browser import Browser, axe
from planted import PLANTS, SECRET, planted_profile

from valuecot.companion import pages
from valuecot.companion.checks import check_site

ACTIVE = """[...document.querySelectorAll('*')].flatMap(e => [...e.attributes]
    .filter(a => (/^on/i.test(a.name) && /planted/.test(a.value)) || /^[\\s\\x00-\\x20]*(javascript|vbscript|data:text)/i.test(a.value)).map(a => `${e.tagName} ${a.name}=${a.value}`))
    .concat([...document.querySelectorAll('iframe, object, embed, base, meta[http-equiv=refresh], form[action*=evil], link[href*=evil], [style*=evil]')].map(e => e.outerHTML.slice(0, 200)))"""


def pages_of(site: Path) -> list[Path]:
    return sorted(p for p in site.rglob("*.html") if "_static" not in p.relative_to(site).parts)


@pytest.fixture(scope="module")
def browser():
    with Browser() as opened:
        opened.size(1280)
        yield opened


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return pages.build(planted_profile(tmp_path_factory.mktemp("planted")), None, "companion.notebooks=no").parent


# ------------------------------------------------------------------------------ the harness itself


def test_the_harness_sees_what_a_page_does(browser, tmp_path):
    page = tmp_path / "page.html"
    page.write_text("<link rel=preconnect href=https://evil.example><a href=\"javascript:planted('a')\">x</a><img src=http://evil.example/x.png onerror=\"planted('img')\"><iframe srcdoc=\"<script>planted('frame')</script>\"></iframe><script>alert(3); nowhere()</script>")
    browser.open(page)
    browser.js("document.querySelector('a').click()")
    browser.settle()
    assert {"a", "img", "frame", "dialog: 3"} <= set(browser.ran) and len(browser.js(ACTIVE)) == 4
    assert "http://evil.example/x.png" in browser.outside and any("GET http://evil.example/x.png" in call for call in browser.outside) and any("CONNECT evil.example" in call for call in browser.outside)
    assert any("nowhere is not defined" in e for e in browser.errors)
    browser.open(page.with_name("page.html"))
    assert "dialog: 3" in browser.ran and "a" not in browser.ran, "each page starts with a clean record"


# ------------------------------------------------------------------------------ planted text


def test_no_planted_text_runs_loads_or_includes(planted, browser):
    seen = set()
    for page in pages_of(planted):
        browser.open(page)
        browser.scroll()
        for entry in range(browser.js("document.querySelectorAll('.vc-browser').length")):
            for _ in range(6):
                browser.js(f"document.querySelectorAll('.vc-browser')[{entry}].querySelector('.vc-on').click()")
        browser.js("document.querySelectorAll('article a').forEach(a => { const to = a.href?.baseVal ?? a.href; if (!/^(file|https?|mailto):/.test(new URL(to || 'x:', location).protocol)) a.dispatchEvent(new MouseEvent('click', {bubbles: true})); })")
        browser.js("document.querySelectorAll('.js-plotly-plot').forEach(p => { p.querySelectorAll('.point, .annotation, .legendtoggle').forEach(e => ['mouseover', 'mousemove', 'click'].forEach(k => e.dispatchEvent(new MouseEvent(k, {bubbles: true})))); })")
        browser.settle()
        name = page.relative_to(planted).as_posix()
        assert browser.ran == [], name
        assert browser.outside == [], name
        assert browser.js(ACTIVE) == [], name
        assert browser.js("location.href").split("#")[0] == page.resolve().as_uri(), name
        seen |= set(browser.js("document.body.textContent.match(/SEEN\\d\\d/g) || []"))
    assert seen == {f"SEEN{i:02d}" for i in range(len(PLANTS))}, "all of it is there, as text"


def test_planted_text_is_shown_as_it_was_written(planted, browser):
    browser.open(planted / "runs/geometry/report.html")
    text = browser.js("document.body.textContent")
    for words in ("<script>planted('script')</script>", '<img src="http://evil.example/image.png"', "{{ config }} {{ 7 * 7 }} {% include", "```{eval-rst}", ":::{raw} html", "{download}`../..", r"\href{javascript:planted('tex')}", "</script><script>planted('closed')</script>", "</textarea></style></title>"):
        assert words in text, words


def test_no_file_of_the_machine_is_in_the_site(planted):
    if SECRET not in Path("/etc/passwd").read_text():
        pytest.skip("this machine has another /etc/passwd")
    assert [p for p in planted.rglob("*") if p.is_file() and SECRET.encode() in p.read_bytes()] == []
    assert not (planted / "_downloads").exists() or {p.suffix for p in (planted / "_downloads").rglob("*") if p.is_file()} == {".csv"}


def test_searching_for_markup_finds_text(planted, browser):
    for words in ("planted", "<img src=x onerror=planted('query')>"):
        browser.open(f"{(planted / 'search.html').resolve().as_uri()}?q={words}", quiet=0.8)
        assert browser.ran == [] and browser.outside == [] and browser.js(ACTIVE) == []
    browser.open(f"{(planted / 'search.html').resolve().as_uri()}?q=grpo", quiet=0.8)
    assert browser.js("document.querySelectorAll('#search-results li').length") > 0 and browser.ran == []


# ------------------------------------------------------------------------------ everybody can read it

BASICS = r"""
(() => {
  const told = [], say = (what, e) => told.push(what + ': ' + e.outerHTML.slice(0, 160)), all = s => [...document.querySelectorAll(s)];
  const shown = e => { const s = getComputedStyle(e); return e.getClientRects().length && s.visibility !== 'hidden' && s.opacity !== '0'; };
  const name = e => (e.getAttribute('aria-label') || e.textContent || e.title || '').trim() || [...e.querySelectorAll('img[alt]')].map(i => i.alt).join('');
  if (!document.documentElement.lang) told.push('the page has no language');
  if (all('h1').length !== 1) told.push(`${all('h1').length} titles`);
  all('img:not([alt])').forEach(e => say('no alternative text', e));
  all('input:not([type=hidden]), select, textarea').forEach(e => { if (shown(e) && !e.labels?.length && !e.getAttribute('aria-label') && !e.title) say('no label', e); });
  all('a[href], button, summary').forEach(e => { if (shown(e) && !name(e)) say('no name', e); });
  all('article th').forEach(e => { if (e.textContent.trim() && !['col', 'row', 'colgroup', 'rowgroup'].includes(e.scope)) say('a table heading of nothing', e); });
  const ids = all('[id]').map(e => e.id), twice = ids.filter((x, i) => ids.indexOf(x) !== i);
  if (twice.length) told.push(`ids twice: ${[...new Set(twice)]}`);
  const parse = c => { const n = (c.match(/[\d.]+/g) || []).map(Number); return [n[0], n[1], n[2], n[3] ?? 1]; };
  const over = (top, below) => [0, 1, 2].map(i => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
  const light = c => c.slice(0, 3).map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4).reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = e => { const layers = []; for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor); if (c[3]) layers.push(c); if (c[3] === 1) break; }
    return layers.reverse().reduce((below, top) => over(top, below), document.documentElement.dataset.theme === 'dark' ? [20, 24, 28, 1] : [255, 255, 255, 1]); };
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), poor = new Set();
  for (let n; (n = walk.nextNode());) {
    const e = n.parentElement;
    if (!n.data.trim() || !shown(e) || e.closest('svg, script, style, [disabled], .js-plotly-plot')) continue;
    const s = getComputedStyle(e), below = ground(e), a = light(over(parse(s.color), below)), b = light(below), ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const large = parseFloat(s.fontSize) >= 24 || (parseFloat(s.fontSize) >= 18.6 && s.fontWeight >= 700);
    if (ratio < (large ? 3 : 4.5) - 0.01) poor.add(`contrast ${ratio.toFixed(2)}: ${e.tagName}.${e.className} ${n.data.trim().slice(0, 40)}`);
  }
  return told.concat([...poor].slice(0, 10));
})()
"""
AXE = "axe.run(document, {preload: false, resultTypes: ['violations']}).then(r => r.violations.filter(v => ['serious', 'critical'].includes(v.impact)).map(v => `${v.id}: ` + v.nodes.slice(0, 3).map(n => n.target.join(' ')).join(' | ')))"


@pytest.fixture(scope="module")
def site(outputs):
    return outputs / "test" / "companion"


def chosen(site: Path) -> list[Path]:
    "One page of each sort: the stages repeat their form."
    sorts = {}
    for page in pages_of(site):
        parts = page.relative_to(site).parts
        sorts.setdefault(parts[:3] if parts[0] == "runs" else parts, page)
        if page.name == "index.html":
            sorts[(*parts[:3], "index")] = page
    keep = ("index.html", "references.html", "search.html", "report.html")
    some = {("runs", "geometry", stage) for stage in ("audit", "arms", "spectrum", "grpo")} | {("runs", "steerable", stage) for stage in ("faithfulness", "prompts")}
    return [page for sort, page in {page: (sort, page) for sort, page in sorts.items()}.values() if page.relative_to(site).as_posix() in keep or page.name == "report.html" or sort[:3] in some]


@dataclass(frozen=True)
class Visit:
    "What one look at a page found."

    outside: list[str]  # addresses elsewhere that it asked for
    errors: list[str]
    failed: int  # figures that could not be drawn
    basics: dict[str, list[str]]  # by light and dark
    faults: dict[str, list[str]]  # of axe, serious or worse
    phone: int  # pixels that it is wide at 400
    scrolled: list[int]  # there: place in the order of Tab of each figure that scrolls sideways


@pytest.fixture(scope="module")
def visits(site, browser):
    "Each page opened once, scrolled through so that its figures are drawn: that takes longer than all that is asked of it."
    source, found = axe(), {}
    for page in chosen(site):
        browser.size(1280)
        browser.open(page)
        browser.scroll()
        outside, errors = list(browser.outside), list(browser.errors)
        failed, basics, faults = browser.js("document.querySelectorAll('.vc-figure[data-state=failed]').length"), {}, {}
        for mode in ("light", "dark"):
            browser.dress(mode)
            basics[mode] = browser.js(BASICS)
            if source:
                browser.js(source + ";0")
                faults[mode] = browser.js(AXE)
        browser.size(400, 800, phone=True)
        browser.settle()
        scrolled = browser.js("[...document.querySelectorAll('.vc-figure')].filter(f => f.scrollWidth > f.clientWidth + 1).map(f => f.tabIndex)")
        found[page.relative_to(site).as_posix()] = Visit(outside, errors, failed, basics, faults, browser.js("document.documentElement.scrollWidth"), scrolled)
    browser.size(1280)
    return found


def test_pages_load_nothing_from_elsewhere_and_raise_no_error(visits):
    assert len(visits) >= 10
    for name, page in visits.items():
        assert (page.outside, page.errors, page.failed) == ([], [], 0), name


def test_pages_can_be_read_in_light_and_dark_and_on_a_phone(visits):
    for name, page in visits.items():
        assert page.basics == {"light": [], "dark": []} and page.phone <= 400, name


def test_figures_that_scroll_on_a_phone_are_reached_by_keyboard(visits):
    scrolled = [place for page in visits.values() for place in page.scrolled]
    assert scrolled and set(scrolled) == {0}


def test_an_accessibility_checker_finds_no_serious_fault(visits):
    if not axe():
        pytest.skip("axe-core is not at hand (npm pack axe-core, and name axe.min.js in VALUECOT_AXE)")
    for name, page in visits.items():
        assert page.faults == {"light": [], "dark": []}, name


def test_texts_are_paged_through_by_keyboard(site, browser):
    found = [p for p in pages_of(site) if b'class="vc-browser' in p.read_bytes()]
    assert found
    browser.open(found[0])
    browser.settle(0.5)
    where = "document.querySelector('.vc-browser output').textContent"
    first, at = browser.js(where), "document.activeElement.className || ''"
    for _ in range(400):
        browser.press("Tab")
        if "vc-browser" in browser.js(at):
            break
    assert "vc-browser" in browser.js(at), "Tab reaches it"
    assert browser.js("getComputedStyle(document.activeElement).outlineStyle") != "none", "and the reader sees where it is"
    browser.press("ArrowRight")
    assert re.fullmatch(r"1 of \d+", first) and browser.js(where).startswith("2 of ")
    browser.press("ArrowLeft")
    assert browser.js(where) == first


def test_pages_are_printed_with_their_pictures(site, browser, tmp_path):
    report = site / "runs/geometry/report.html"
    browser.open(report)
    browser.scroll()
    browser.pdf(tmp_path / "report.pdf")
    assert (tmp_path / "report.pdf").read_bytes()[:5] == b"%PDF-" and (tmp_path / "report.pdf").stat().st_size > 100_000
    if folder := os.environ.get("VALUECOT_SCREENSHOTS"):
        for mode, width in (("light", 1280), ("dark", 1280), ("light", 400)):
            browser.size(width, 900, phone=width == 400)
            browser.dress(mode)
            browser.screenshot(Path(folder) / f"report-{mode}-{width}.png")
        (Path(folder) / "report.pdf").write_bytes((tmp_path / "report.pdf").read_bytes())
        browser.size(1280)


def test_the_site_gives_nothing_away_and_is_small(site):
    assert check_site(site) == []
    assert json.loads((site / "searchindex.js").read_text().removeprefix("Search.setIndex(").removesuffix(")"))["docnames"]
