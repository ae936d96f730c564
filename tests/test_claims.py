"""Claims and their verdicts, the lineage of numbers, and what marks them stale."""

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from valuecot.companion.claims import Claim, Effect, at_least, at_most, effect_of, log_ratio, printed_difference, reason, together, verdicts, word
from valuecot.companion.geometry_claims import GEOMETRY
from valuecot.companion.ledger import CLAIMS, claim_section, counts, ledger, ledger_table, read_back, told, verdict_table
from valuecot.companion.lineage import Hashes, complete_runs, lineage, stale_among
from valuecot.companion.pages import Links, Page, run_card
from valuecot.companion.safe import clean, figure_html
from valuecot.companion.steerable_claims import STEERABLE
from valuecot.settings import load
from valuecot.stats import crossed
from valuecot.store import digest, hash_folder, read_json, write_json
from valuecot.view.tables import to_html

PAPER = load("paper")
CLEAR = Effect("qwen", 0.9, 0.7, 1.1, "log ratio of λ₁", "3 seeds, 3 subsets", "seeds and subsets", 0.001, 3)


# ---- the rule


@pytest.mark.parametrize(
    ("effect", "p", "wanted"),
    [
        (CLEAR, 0.001, "supported"),
        (CLEAR, 0.2, "undecided"),  # lost to Holm
        (replace(CLEAR, seeds=1), 0.001, "undecided"),  # one training
        (replace(CLEAR, value=0.0, low=-0.02, high=0.03), 0.9, "not supported"),  # smaller than the margin for sure
        (replace(CLEAR, value=-0.5, low=-0.6, high=-0.4), 0.001, "not supported"),  # the other way
        (replace(CLEAR, value=0.0, low=-0.5, high=0.5), 0.9, "undecided"),
        (replace(CLEAR, value=math.nan), math.nan, "not testable"),
        (replace(CLEAR, low=math.nan, high=math.nan), math.nan, "undecided"),
        (replace(CLEAR, seeds=0, pvalue=math.nan), math.nan, "supported"),  # printed, no p: its interval decides
    ],
)
def test_one_rule_decides(effect, p, wanted):
    assert word(effect, 0.05, p, 2) == wanted


def test_a_claim_about_several_things_must_hold_for_each():
    assert together(["supported", "not supported", "undecided"]) == "not supported"
    assert together(["supported", "undecided"]) == "undecided"
    assert together(["supported", "not testable"]) == "supported"
    assert together(["not testable"]) == "not testable" == together([])


def claim(family="curvature", **other) -> Claim:
    return Claim("G99", family, "says", "quote", "where", "statistic", "test", 0.05, "runs", lambda runs, settings: [], **other)


def test_holm_is_over_the_family_and_over_nothing_else():
    weak = replace(CLEAR, pvalue=0.03)
    alone = verdicts([claim()], [[weak]], "runs")[0]
    among = verdicts([claim(), claim()], [[weak], [replace(weak, pvalue=0.9)]], "runs")[0]
    apart = verdicts([claim(), claim("behaviour")], [[weak], [replace(weak, pvalue=0.9)]], "runs")[0]
    assert (alone.word, among.word, apart.word) == ("supported", "undecided", "supported")
    assert among.adjusted[0] == pytest.approx(0.06)


def test_trainings_that_are_too_few_neither_decide_nor_cost_others():
    single = replace(CLEAR, seeds=1, pvalue=1e-9)
    first, second = verdicts([claim(), claim()], [[single], [replace(CLEAR, pvalue=0.04)]], "runs")
    assert first.word == "undecided" and "1 training of each arm, 2 needed" in first.why
    assert second.word == "supported"  # a p that counts for nothing is no part of the family


def test_nothing_measured_says_what_it_needs():
    (found,) = verdicts([claim()], [[]], "runs")
    assert (found.word, found.why) == ("not testable", "needs runs")


# ---- arithmetic


def test_log_ratio_is_that_of_many_draws():
    draws = np.random.default_rng(0).normal([4083.87, 1345.65], [156.53, 15.60], (200_000, 2))
    effect = log_ratio((4083.87, 156.53, 3), (1345.65, 15.60, 3), 0.003, 1e9, "qwen")
    spread = np.log(draws[:, 0] / draws[:, 1])
    assert effect.value == pytest.approx(spread.mean(), abs=2e-3)
    assert (effect.high - effect.low) / 2 / 1.96 == pytest.approx(spread.std(), rel=0.02)


def test_printed_differences_are_two_proportions():
    from statsmodels.stats.proportion import confint_proportions_2indep, proportions_ztest

    effect = printed_difference(81.1, 77.1, 22000, "x")
    low, high = confint_proportions_2indep(0.811 * 22000, 22000, 0.771 * 22000, 22000, compare="diff", method="wald")
    assert (effect.low, effect.high) == pytest.approx((100 * low, 100 * high))
    assert effect.pvalue == pytest.approx(proportions_ztest([0.811 * 22000, 0.771 * 22000], [22000, 22000])[1], rel=0.02)


def test_smallness_is_what_is_left_below_a_bound():
    effect = at_most(printed_difference(10.05, 7.75, 2000, "x"), 3.0)
    assert effect.value == pytest.approx(0.7) and effect.low < 0 < effect.high
    assert math.isnan(effect.pvalue)  # a test of no difference says nothing about smallness


def test_ratios_are_told_as_ratios_and_digits_follow_the_interval():
    assert told(replace(CLEAR, value=math.log(3.0347), low=math.log(2.81), high=math.log(3.26))) == "× 3.0 (2.8 to 3.3)"
    assert told(replace(CLEAR, value=math.log(6.2), low=math.log(0.18), high=math.log(302))) == "× 6.2 (0.18 to 302)", "a ratio is never 0"
    assert told(replace(CLEAR, unit="points", value=4.0, low=3.21, high=4.77)) == "4.0 (3.2 to 4.8) points"
    assert told(replace(CLEAR, value=math.nan)) == "–"


def test_an_interval_over_seeds_and_units_holds_at_its_level():
    random, inside, runs = np.random.default_rng(1), 0, 400
    for _ in range(runs):
        table = 0.4 + random.normal(0, 0.3, (3, 1)) + random.normal(0, 0.2, (1, 6)) + random.normal(0, 0.1, (3, 6))
        found = crossed(table)
        inside += found.low <= 0.4 <= found.high
    assert inside / runs > 0.93  # 0.95 or above, within the error of 400 draws


# ---- the papers' own numbers


def test_the_papers_own_tables():
    by_id = {line.claim.id: line.paper for line in ledger({}, PAPER)}
    assert by_id["G2"].effects[0].pvalue == pytest.approx(0.085, abs=5e-4)
    assert by_id["G4"].effects[0].pvalue == pytest.approx(0.006, abs=5e-4)
    assert [math.exp(by_id[i].effects[0].value) for i in ("G1", "G2", "G3", "G4")] == pytest.approx([3.03, 1.105, 3.58, 1.041], abs=0.005)
    assert by_id["G2"].word == "undecided" and by_id["G1"].word == "supported"
    assert by_id["S2"].word == "undecided"  # 0.8 points on OpinionQA with Qwen
    assert by_id["S7"].effects[0].value == pytest.approx(17.8)


def test_every_claim_is_whole():
    assert len({c.id for c in CLAIMS}) == len(CLAIMS) >= 25
    arms = {name.removeprefix("arm.") for name in PAPER.sections if name.startswith("arm.")}
    for c in CLAIMS:
        assert all((c.says, c.quote, c.where, c.statistic, c.test, c.needs)), c.id
        assert len(c.quote.split()) <= 12, f"{c.id}: a few words of the paper, not its sentence"
        assert set(c.controls) <= arms, c.id
    assert {c.study for c in GEOMETRY} == {"geometry"} and {c.study for c in STEERABLE} == {"steerable"}


# ---- runs that cannot be read


def leave(place: Path, name: str, inputs: tuple[str, ...] = (), **files: str) -> Path:
    folder = place / name
    folder.mkdir(parents=True, exist_ok=True)
    for file, text in files.items():
        (folder / file.replace("_json", ".json").replace("_csv", ".csv")).write_text(text)
    keys = {i.split("/", 1)[1]: digest(read_json(place / i / "run.json")["key"]) for i in inputs}
    write_json(folder / "run.json", {"profile": "tiny", "study": name.split("/")[0], "key": {"code": name}, "inputs": keys, "files": hash_folder(folder, skip=("run.json",))})
    return folder


def spectrum(*values: float) -> str:
    return json.dumps([{"instrument": "valuecot", "subset": i, "lambda_1": v, "lambda_min": -0.01 * v} for i, v in enumerate(values)])


def planted(place: Path, base: float, standard: float, seeds: int = 3) -> None:
    random = np.random.default_rng(0)
    for seed in range(seeds):
        for arm, level in (("base", base), ("standard", standard)):
            leave(place, f"geometry/spectrum/qwen/{arm}/seed{seed}", spectrum_json=spectrum(*(level * math.exp(x) for x in random.normal(0, 0.05, 3))))


def test_a_planted_effect_is_found_and_a_null_is_not(tmp_path):
    planted(tmp_path / "tiny", 30.0, 10.0)
    (found,) = [line.runs for line in ledger(lineage(tmp_path / "tiny"), PAPER) if line.claim.id == "G1"]
    assert found.word == "supported" and math.exp(found.effects[0].value) == pytest.approx(3, rel=0.2)
    assert len(found.effects[0].runs) == 6
    planted(tmp_path / "null", 10.0, 10.0)
    (found,) = [line.runs for line in ledger(lineage(tmp_path / "null"), PAPER) if line.claim.id == "G1"]
    assert found.word in ("undecided", "not supported")


@pytest.mark.parametrize("damage", ["", "{", "[]", '[{"subset": 0}]'])
def test_a_damaged_run_costs_its_claim_and_not_the_page(tmp_path, damage):
    planted(tmp_path / "tiny", 30.0, 10.0)
    (tmp_path / "tiny/geometry/spectrum/qwen/base/seed1/spectrum.json").write_text(damage)
    lines = {line.claim.id: line for line in ledger(lineage(tmp_path / "tiny"), PAPER)}
    assert lines["G1"].runs.word in ("not testable", "supported")  # an empty list leaves two seeds that can be read
    assert lines["G10"].runs.why.startswith("needs ")
    assert "<table" in verdict_table(list(lines.values()))


# ---- lineage


@pytest.fixture
def place(tmp_path):
    where = tmp_path / "tiny"
    for name, inputs in (("geometry/prompts/all/all/all", ()), ("geometry/traces/all/all/all", ("geometry/prompts/all/all/all",)), ("steerable/prompts/all/all/all", ())):
        leave(where, name, inputs, value_csv="1\n")
    for arm in ("base", "standard"):
        leave(where, f"geometry/spectrum/llama/{arm}/seed0", ("geometry/traces/all/all/all",), spectrum_json=spectrum(10.0, 11.0))
    leave(where, "geometry/range/llama/all/seed0", ("geometry/spectrum/llama/base/seed0", "geometry/spectrum/llama/standard/seed0"), value_csv="1\n")
    return where


def stale(place: Path) -> set[str]:
    return {name for name, made in lineage(place).items() if made.stale}


def test_changing_one_file_marks_exactly_what_depends_on_it(place):
    assert stale(place) == set()
    (place / "geometry/spectrum/llama/base/seed0/spectrum.json").write_text(spectrum(10.0, 12.0))
    assert stale(place) == {"geometry/spectrum/llama/base/seed0", "geometry/range/llama/all/seed0"}
    (place / "geometry/prompts/all/all/all/value.csv").write_text("2\n")
    assert stale(place) == {name for name in complete_runs(place) if name.startswith("geometry/")}


def test_an_input_that_was_run_again_or_is_gone(place):
    card = read_json(place / "geometry/traces/all/all/all/run.json")
    write_json(place / "geometry/traces/all/all/all/run.json", card | {"key": {"code": "new"}})
    assert stale(place) == {n for n in complete_runs(place) if "spectrum" in n or "range" in n}
    shutil.rmtree(place / "geometry/traces")
    states = lineage(place)
    assert "is gone" in states["geometry/spectrum/llama/base/seed0"].stale
    assert stale_among(("geometry/traces/all/all/all",), states) == "geometry/traces/all/all/all is gone"


def test_an_input_that_came_out_otherwise_counts_although_its_key_is_the_same(place):
    name = "geometry/spectrum/llama/base/seed0"
    card, traces = read_json(place / name / "run.json"), read_json(place / "geometry/traces/all/all/all/run.json")
    write_json(place / name / "run.json", card | {"input_files": {"traces/all/all/all": digest(traces["files"])}})
    assert stale(place) == set()
    (place / "geometry/traces/all/all/all/value.csv").write_text("3\n")
    write_json(place / "geometry/traces/all/all/all/run.json", traces | {"files": hash_folder(place / "geometry/traces/all/all/all", skip=("run.json",))})
    assert stale(place) == {name, "geometry/range/llama/all/seed0"}  # the others recorded no hash


def test_restoring_a_file_restores_its_numbers(place):
    file = place / "geometry/prompts/all/all/all/value.csv"
    file.write_text("2\n")
    assert stale(place)
    file.write_text("1\n")
    assert not stale(place)


def test_half_a_run_is_no_run_and_a_damaged_memory_costs_time_alone(place):
    (place / "geometry/range/llama/all/seed0/run.json").write_text('{"profile": "ti')
    assert "geometry/range/llama/all/seed0" not in complete_runs(place)
    lineage(place)
    (place / ".hashes.json").write_text("[1, 2")
    assert stale(place) == set()


def test_hashes_are_taken_once(place, monkeypatch):
    lineage(place)
    asked = []
    monkeypatch.setattr("valuecot.companion.lineage.hash_file", lambda path: asked.append(path) or "x")
    lineage(place)
    assert asked == []
    file = place / "geometry/prompts/all/all/all/value.csv"
    file.write_text("longer\n")
    lineage(place)
    assert asked == [file]
    assert Hashes(place / ".hashes.json").known


# ---- on a page


def test_rows_figures_and_links_of_stale_runs_are_marked():
    good, bad = (Page(Path("x"), ("geometry", "spectrum", "llama", arm, "seed0"), False, stale=why) for arm, why in (("base", ""), ("standard", "its file spectrum.json was edited")))
    report = Page(Path("x"), ("geometry", "report"), False)
    link = Links(report, [good, bad, report])
    import pandas as pd

    table = to_html(pd.DataFrame({"arm": ["base", "standard"], "λ₁": [1, 2]}), runs=[["spectrum/llama/base/seed0"], ["spectrum/llama/standard/seed0"]])
    rows = clean(table.text, link).split("<tr")[2:]
    assert ["vc-stale-mark" in row for row in rows] == [False, True] and "spectrum.json was edited" in rows[1]
    assert "vc-stale-mark" in clean('<a href="run:spectrum/llama/standard/seed0">run</a>', link)
    figure = {"application/vnd.plotly.v1+json": {"data": [], "layout": {"meta": {"alt": "a", "caption": "c", "runs": ["spectrum/llama/standard/seed0"]}}}}
    assert "vc-stale-mark" in figure_html(figure, "", link) and 'href="spectrum/llama/standard/seed0.html"' in figure_html(figure, "", link)
    figure["application/vnd.plotly.v1+json"]["layout"]["meta"]["runs"] = ["spectrum/llama/base/seed0"]
    assert "vc-stale-mark" not in figure_html(figure, "", link)
    assert "would come out otherwise today" in run_card(bad, [bad]) and "otherwise" not in run_card(good, [good])


def test_an_interval_without_width_decides_nothing_and_says_so():
    flat = replace(CLEAR, value=-70.0, low=-70.0, high=-70.0, note="never reached")
    assert all(map(math.isnan, (flat.low, flat.high, flat.pvalue)))  # no p of it weighs in a family
    assert word(flat, 0.0, math.nan) == "undecided"
    assert reason(CLAIMS[0], "undecided", [flat]) == "nothing says how far it moves: never reached · no spread among seeds and subsets"


def test_a_claim_about_a_bound_is_told_by_its_number_and_judged_by_the_distance(tmp_path):
    number = replace(CLEAR, value=0.25, low=0.2, high=0.3, unit="ratio", pvalue=math.nan)
    for bounded, side, verdict in ((at_most(number, 0.35), "below 0.35", "supported"), (at_most(number, 0.1), "below 0.1", "not supported"), (at_least(number, 0.1), "above 0.1", "supported"), (at_least(number, 0.4), "above 0.4", "not supported")):
        assert bounded.measured == pytest.approx((0.25, 0.2, 0.3)) and word(bounded, 0.0, math.nan, 2) == verdict
        assert told(bounded) == f"0.25 (0.20 to 0.30) ratio, claimed {side}"
        line = replace(ledger({}, PAPER)[0], runs=verdicts([CLAIMS[0]], [[bounded]], "runs")[0])
        ledger_table([line]).to_csv(tmp_path / "claims.csv", index=False)
        row = next(r for r in pd.read_csv(tmp_path / "claims.csv", keep_default_na=False, na_values=[""]).to_dict("records") if r["source"] == "runs")
        assert (row["effect"], row["low_95"], row["high_95"]) == pytest.approx((0.25, 0.2, 0.3)), "numbers are of their unit"
        assert told(read_back(row)) == told(bounded)
    assert told(read_back({k: v for k, v in row.items() if k not in ("bound", "side")})) == "0.25 (0.20 to 0.30) ratio", "an older record"


def test_rounding_is_no_spread():
    effect = effect_of(crossed([[0.2 - 0.1]] * 3, unit="subsets"), "qwen", "share", "subsets", ())
    assert effect.n == "3 seeds, 1 subset" and math.isnan(effect.low) and math.isnan(effect.pvalue) and word(effect, 0.0, math.nan, 2) == "undecided"


def test_claims_are_text_on_a_page_and_rows_in_a_table():
    lines = ledger({}, PAPER)
    hostile = replace(lines[0].claim, says="</td><script>alert(1)</script>", quote="<img src=x onerror=alert(1)>")
    line = replace(lines[0], claim=hostile)
    shown = verdict_table([line]) + claim_section(line, lambda name: None).partition("```{raw}")[2]
    assert "<script" not in shown and "<img" not in shown
    table = ledger_table(lines)
    assert set(table["claim"]) == {c.id for c in CLAIMS}
    assert set(table["verdict"]) <= {"supported", "not supported", "undecided", "not testable"}
    assert sum(counts(lines, "runs").values()) == len(CLAIMS)


def test_the_first_page_is_the_ledger(outputs):
    site = outputs / "test" / "companion"
    page = (site / "index.html").read_text()
    assert "Do these claims hold?" in page and page.index("vc-ledger") < page.index("All runs")
    assert (site / "claims.html").exists() and 'id="g1"' in (site / "claims.html").read_text()
    assert list((site / "_downloads").rglob("claims.csv"))
    for name in ("index.html", "claims.html"):
        leads = set(re.findall(r'href="([^"#:]+\.html)', (site / name).read_text()))
        assert any("runs/geometry/spectrum" in lead for lead in leads) and not [lead for lead in leads if not (site / lead).exists()], name


# ---- a record for git


def test_what_is_kept_is_whole_and_of_one_state(place, tmp_path, capsys):
    from valuecot.companion.ledger import keep, main

    files = keep(place, tmp_path / "kept", PAPER)
    assert {f.name for f in files} == {"claims.csv", "cards.jsonl"}
    cards = [json.loads(line) for line in (tmp_path / "kept" / "cards.jsonl").read_text().splitlines()]
    assert len(cards) == len(complete_runs(place)) and all("key" in card for card in cards)
    (place / "geometry/prompts/all/all/all/value.csv").write_text("2\n")
    with pytest.raises(ValueError, match="value.csv was edited"):
        keep(place, tmp_path / "kept", PAPER)
    with pytest.raises(FileNotFoundError, match="make study"):
        keep(tmp_path / "nothing", tmp_path / "kept", PAPER)
    assert main(["tiny"]) == 2 and "usage" in capsys.readouterr().err
