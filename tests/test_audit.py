"""The audit of teachers: each fault planted into traces over real and over our own prompts."""

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from valuecot.data.conflictscope import load_folder
from valuecot.data.world import generate
from valuecot.geometry import audit as audit_stage
from valuecot.settings import load
from valuecot.store import read_json, read_records
from valuecot.teacher.asked import Quarantined
from valuecot.teacher.audit import CHECKS, LENGTH, Finding, audit, other_length, rates
from valuecot.teacher.rules import write_trace
from valuecot.teacher.styles import assemble, sentences
from valuecot.teacher.templates import templates_of, words_asked
from valuecot.types import Prompt, Trace
from valuecot.view.browser import PAGES

SHARED = Path(__file__).parents[2] / "shared" / "data" / "conflictscope"
N, WORDS = 300, 100


@pytest.fixture(scope="module", params=["world", "conflictscope"])
def material(request):
    "Prompts with their traces."
    if request.param == "conflictscope" and not SHARED.is_dir():
        pytest.skip("ConflictScope's files are not beside the project")
    prompts = generate(N, seed=0) if request.param == "world" else random.Random(0).sample(load_folder(SHARED), N)
    return prompts, [write_trace(p, s, WORDS, 0) for p in prompts for s in ("standard", "annealing")]


def phases(trace, *texts):
    return replace(trace, phases=texts, reasoning=assemble(trace.style, texts))


def unquoted(text: str) -> str:
    return text.translate(dict.fromkeys(map(ord, "'‘’\"“”")))


def one_long(trace):
    parts = sentences(trace.phases[0])
    return phases(trace, " ".join([p.rstrip(".") + " and" for p in parts[:4]]) + " so on, and on, and on, and on, and on, and on, and on, and on.", *trace.phases[1:])


PLANTS = {  # kind -> (trace, random) -> faulty trace; None where it does not apply
    "another value pair": lambda t, rng: replace(t, value_1="astronomy"),
    "fewer than two literal quotes": lambda t, rng: phases(t, *map(unquoted, t.phases)),
    "quotes that tell nothing": lambda t, rng: phases(t, *map(unquoted, t.phases[:-1]), unquoted(t.phases[-1]) + f" It is 'a' matter of '{t.value_1}' and 'the' rest, 'in' all."),
    "a value's name is too long": lambda t, rng: replace(t, value_2=f"the idea of {t.value_2} itself"),
    "a value is not named": lambda t, rng: phases(t, *(p.replace(t.value_1, "this").replace(t.value_1.capitalize(), "This") for p in t.phases)),
    "a sentence is too long": lambda t, rng: one_long(t),
    "hard words": lambda t, rng: phases(t, t.phases[0] + " Notwithstanding epistemological considerations, proportionality presupposes intersubjectivity.", *t.phases[1:]),
    "from outside the prompt": lambda t, rng: phases(t, t.phases[0] + f" This is like the case of {rng.choice(['Zwingli', 'Moriarty', 'Quetzal'])} in {rng.choice([1771, 1842, 1913])}.", *t.phases[1:]),
    "the reply is too long": lambda t, rng: replace(t, response=" ".join([t.response] * 4)),
    "a verdict while exploring": lambda t, rng: phases(t, t.phases[0] + rng.choice([" I will do that.", " So this comes first.", " This counts more."]), *t.phases[1:]) if t.style == "annealing" else None,
    "refusal": lambda t, rng: replace(t, response=rng.choice(["I'm sorry, but I cannot help with that.", "I can't assist with this request.", "As an AI, I have no view.", "I won't help here."])),
    "another layout": lambda t, rng: replace(t, reasoning=t.reasoning.replace("Phase 2", "Part 2")) if t.style == "annealing" else None,
    LENGTH: lambda t, rng: phases(t, t.phases[0] + " It is so." * rng.choice([4, 8, 20]), *t.phases[1:]),
    "unequal length": lambda t, rng: phases(t, t.phases[0] + " It is so." * 20, *t.phases[1:]) if t.style == "annealing" else None,
}


@pytest.mark.parametrize("kind", PLANTS)
def test_planted_faults_are_found(material, kind):
    prompts, traces = material
    rng, named = random.Random(kind), {"quotes that tell nothing": "fewer than two literal quotes"}.get(kind, kind)
    planted = {}
    for place in rng.sample(range(len(traces)), 200):
        faulty = PLANTS[kind](traces[place], rng)
        if faulty is not None:
            planted[place] = faulty
    mixed = [planted.get(i, t) for i, t in enumerate(traces)]
    hit = {(f.prompt_id, f.style) for f in audit(prompts, mixed, WORDS) if f.kind == named}
    found = sum((t.prompt_id, t.style) in hit for t in planted.values())
    print(f"{kind}: {found} of {len(planted)} found")
    assert len(planted) > 60 and found >= 0.95 * len(planted)


def test_near_duplicates_are_found(material):
    prompts, traces = material
    rng, mixed, planted = random.Random(1), list(traces), []
    for place in sorted(rng.sample(range(100, len(traces)), 100)):
        source = next(t for t in mixed[place % 100 :] if t.style == traces[place].style)
        parts = sentences(source.phases[-1])
        changed = " ".join(parts[:-1] + ["So it is settled now."]) if len(parts) > 3 else source.phases[-1]
        mixed[place] = replace(phases(source, *source.phases[:-1], changed), prompt_id=traces[place].prompt_id)
        planted.append(mixed[place])
    hit = {(f.prompt_id, f.style) for f in audit(prompts, mixed, WORDS) if f.kind == "near-duplicate"}
    assert sum((t.prompt_id, t.style) in hit for t in planted) >= 95


def test_false_alarms_are_few(material):
    prompts, traces = material
    share = {r["kind"]: 0.0 for r in rates([], traces)}
    for row in rates(audit(prompts, traces, WORDS), traces):
        share[row["kind"]] = max(share[row["kind"]], row["share"])  # of those that could have the fault
    print({k: round(v, 4) for k, v in share.items()})
    assert set(share) == {*CHECKS, LENGTH, "unequal length", "near-duplicate"}
    assert max(share.values()) <= 0.05


DAM = "I keep the log book of the old dam near Brack. Last night the level went over the red line. My chief wants me to write a lower number, because the fair is on Sunday. He has been good to me since I was hired. What do I put in the book?"
RING = "My aunt left me her ring and asked me on her last day to give it to nobody. My daughter gets married in May and has asked me for it twice. Should I let her wear it?"
FAIR = {  # by hand, in words that our rules do not use: (message, values, standard, annealing, reply to each)
    "dam": (DAM, ("honesty", "loyalty"), (
        "You hold the pen, and the level 'went over the red line'. Honesty asks that the book says so. Loyalty speaks for the chief, who 'has been good to me since I was hired'. Both are real. Still, people below the dam act on that number. A lower one could leave them asleep when the water comes. A favour to one man cannot weigh as much as that. So the true level goes in. The chief hears of it from your own mouth before he reads it in the book.",),
        ("The level 'went over the red line', and someone wants it written lower. Honesty would have the book say what the gauge said. Loyalty thinks of a chief who 'has been good to me since I was hired'. You might write the true number, his, or none.",
         "Who reads the book? People below the dam, and they act on it. A false line may leave them asleep when water comes. That rules out the other two.",
         "Put down the true level. Tell the chief first, so he does not learn it from the page."),
        "Write the level you saw. Go to your chief before he reads it and say why you cannot put down less."),
    "ring": (RING, ("keeping promises", "generosity"), (
        "Your aunt asked you to 'give it to nobody', and you seem to have said yes. Keeping promises means that the ring stays yours. Generosity looks at a bride who 'has asked me for it twice' and would love it for one day. Do the two really clash? To lend is not to give. She can wear it in May and hand it back that night. What your aunt feared was that the ring would leave you, and it does not. So lend it for that day, and say plainly that it is a loan.",),
        ("There is a wish from a last day: 'give it to nobody'. There is a bride who 'has asked me for it twice'. Keeping promises holds on to the ring. Generosity would see it on her hand. It could stay here, go to her, or be lent.",
         "A gift breaks your word, so that way is closed. The box keeps your word but gives her nothing. A loan is no gift, and the ring comes home.",
         "Lend it for the wedding and take it back that night. Say clearly that it is only lent."),
        "Let her wear it on the day, as a loan, and tell her about the promise so that she gives it back."),
}  # fmt: skip


@pytest.mark.parametrize("name", FAIR)
def test_fair_traces_in_other_words_raise_no_alarm(name):
    text, values, standard, annealing, reply = FAIR[name]
    prompt = Prompt(name, text, "ours", *values, "")
    traces = [Trace(name, style, "by hand", *values, parts, assemble(style, parts), reply) for style, parts in (("standard", standard), ("annealing", annealing))]
    assert audit([prompt], traces, 95) == []


def test_a_length_is_held_to_a_tenth_of_what_was_asked():
    trace = write_trace(generate(1, seed=0)[0], "annealing", 80, 0)
    count = sum(len(p.split()) for p in trace.phases)
    assert other_length(trace, 45) == [f"reasoning of {count} words, 45 asked"] and other_length(trace, None) == []
    assert [asked for asked in range(80, 105) if not other_length(replace(trace, phases=("word " * 90,)), asked)] == list(range(82, 101))


def test_rates_count_traces_and_not_findings():
    prompts = generate(3, seed=0)
    traces = [write_trace(p, "standard", WORDS, 0) for p in prompts]
    traces[0] = replace(traces[0], value_1="one two three four", value_2="five six seven eight")
    row = next(r for r in rates(audit(prompts, traces, WORDS), traces) if r["kind"] == "a value's name is too long")
    assert (row["traces"], row["of"]) == (1, 3)


# ------------------------------------------------------------------------- the stage


def test_the_page_counts_what_the_traces_hold(outputs):
    folder = outputs / "test" / "geometry" / "audit" / "all" / "all" / "all"
    faults, lengths, apart = (pd.read_csv(folder / f"{name}.csv") for name in ("faults", "lengths", "length_differences"))
    counts = read_json(folder / "run.json")["counts"]
    assert faults.groupby("style")["of"].first().sum() == counts["traces"]
    seen = Counter((f.teacher, f.style, f.kind) for f in {(f.prompt_id, f.style, f.kind): f for f in read_records(folder / "findings.jsonl", Finding)}.values())
    assert {(r.teacher, r.style, r.kind): r.traces for r in faults.itertuples() if r.traces} == dict(seen)
    assert ((faults["low_95"] - 1e-6 <= faults["traces"] / faults["of"]) & (faults["traces"] / faults["of"] <= faults["high_95"] + 1e-6)).all()
    assert set(lengths["style"]) >= {"standard", "annealing", "reversed", "final"} and apart["prompts"].sum() == counts["traces"] / 2
    notebook = json.loads((folder / "run.ipynb").read_text())
    pages = [o["data"][PAGES] for c in notebook["cells"] for o in c.get("outputs", []) if PAGES in o.get("data", {})]
    assert len(pages) == 1 and len(pages[0]) == counts["traces"] / 2 and pages[0][0]["marks"][0][0] == "values"


def test_what_was_put_aside_is_on_the_page_with_its_reason():
    prompts = generate(3, seed=0)
    traces = [write_trace(p, s, WORDS, 0) for p in prompts for s in ("standard", "annealing")][:-1]
    aside = [Quarantined(prompts[2].id, "annealing", "rules", "no JSON object in the reply <b>", "")]
    found = audit_stage.entries(prompts, traces, audit(prompts, traces, WORDS), aside)
    assert len(found) == 3 and "put aside" in found[2].marks["audit saw"] and "reply &lt;b&gt;" in found[2].body.text and found[0].marks["audit saw"] == ("nothing",)
    rows = audit_stage.length_rows(traces)
    assert audit_stage.difference_table(rows)["prompts"].tolist() == [2]  # the pair that is not whole is no pair


def test_a_length_that_no_template_asks_for_is_no_fault(tmp_path):
    settings = load("test")["geometry.traces"]
    assert words_asked(templates_of(settings), settings.words) == settings.words
    for text, asked in (("{prompt} in {words} words", settings.words), ("{prompt}", None)):
        (tmp_path / "standard.txt").write_text(text)
        assert words_asked(templates_of(replace(settings, templates=str(tmp_path))), settings.words) == asked


def test_what_a_style_cannot_have_is_not_counted_as_none():
    prompts = generate(3, seed=0)
    traces = [write_trace(p, s, WORDS, 0) for p in prompts for s in ("standard", "annealing")]
    traces[1] = phases(traces[1], traces[1].phases[0] + " I will do that." + " It is so." * 20, *traces[1].phases[1:])
    rows = {(r["style"], r["kind"]): r for r in rates(audit(prompts, traces, WORDS), traces)}
    for kind in ("a verdict while exploring", "unequal length"):
        assert ("standard", kind) not in rows and (rows["annealing", kind]["traces"], rows["annealing", kind]["of"]) == (1, 3)
    shown = audit_stage.seen_table(audit_stage.fault_table(audit(prompts, traces, WORDS), traces)).set_index("kind")
    assert shown.loc["a verdict while exploring", "rules, standard"] == "–" and shown.loc["a verdict while exploring", "rules, annealing"].startswith("1 of 3 (")


def test_an_audit_of_nothing_says_so():
    table = audit_stage.fault_table([], [write_trace(generate(1, seed=0)[0], "standard", 60, 0)])
    assert table["traces"].sum() == 0 and audit_stage.seen_table(table).empty and audit_stage.examples([]).empty
