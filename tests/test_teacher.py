"Traces: styles, requests, and the offline teacher."
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from valuecot.data.conflictscope import load_folder
from valuecot.data.world import generate
from valuecot.teacher import rules, styles, templates
from valuecot.teacher.audit import audit, quoted
from valuecot.teacher.controls import controls, derive
from valuecot.teacher.rules import write_trace
from valuecot.teacher.styles import Style, assemble, disassemble
from valuecot.types import Prompt, Trace

REAL = Path(__file__).parents[2] / "shared" / "data" / "conflictscope"
PHASES = ("Explore 'a b'.\n\nMore.", "Weigh it.", "Do it.")


def seen(prompt, trace, words=None):
    return [f.detail for f in audit([prompt], [trace], words)]


def length(trace):
    return len(" ".join(trace.phases).split())


# ---- styles


def test_disassemble_undoes_assemble():
    for name, phases in (("annealing", PHASES), ("standard", ("One text.\n\nIn two paragraphs.",))):
        assert disassemble(name, assemble(name, phases)) == phases


def test_annealing_looks_as_section_3_1_says():
    assert assemble("annealing", ("a", "b", "c")) == "Phase 1 (High Temp): a\n\nPhase 2 (Cooling): b\n\nPhase 3 (Low Temp): c"


@pytest.mark.parametrize(
    "text", ["", "  ", "free text", "Phase 1 (High Temp): a\n\nPhase 2 (Cooling): b", "Phase 1 (High Temp): a\n\nPhase 3 (Low Temp): c\n\nPhase 2 (Cooling): b"]
)
def test_other_forms_are_not_annealing(text):
    assert disassemble("annealing", text) is None


def test_blank_phases_are_no_phases():
    assert disassemble("annealing", "Phase 1 (High Temp): \n\nPhase 2 (Cooling): b\n\nPhase 3 (Low Temp): c") is None
    assert disassemble("standard", " \n") is None


def test_repeated_phases_are_not_annealing():
    assert disassemble("annealing", assemble("annealing", PHASES) + "\n\nPhase 3 (Low Temp): again") is None


def test_phases_that_could_not_be_read_back_are_refused():
    with pytest.raises(ValueError, match="marked with a header"):
        assemble("annealing", ("Phase 2 (Cooling): early", "b", "c"))
    with pytest.raises(ValueError, match="'cool' is blank"):
        assemble("annealing", ("a", " ", "c"))
    with pytest.raises(ValueError, match="has 1 phases"):
        assemble("standard", ("a", "b"))


@pytest.mark.parametrize("name, near", [("anealing", "annealing"), ("Standard", "standard"), ("stanard", "standard")])
def test_unknown_styles_name_the_nearest(name, near):
    for call in (lambda: assemble(name, ("a",)), lambda: disassemble(name, "a"), lambda: templates.request(name, "a")):
        with pytest.raises(ValueError, match=f"Did you mean '{near}'"):
            call()


def test_an_entry_is_enough_for_a_new_style(monkeypatch):
    monkeypatch.setitem(styles.STYLES, "backwards", Style("backwards", ("converge", "cool", "explore"), ("Act", "Weigh", "Look")))
    prompt = generate(1, seed=0)[0]
    trace = write_trace(prompt, "backwards", 60, seed=0)
    assert trace.reasoning.startswith("Act: ") and seen(prompt, trace, 60) == []


def test_the_rules_teacher_names_roles_that_it_cannot_write(monkeypatch):
    monkeypatch.setitem(styles.STYLES, "dream", Style("dream", ("dream",), ("",)))
    with pytest.raises(ValueError, match="cannot write dream"):
        write_trace(generate(1, seed=0)[0], "dream", 60, seed=0)


# ---- requests


@pytest.mark.parametrize("name", ["standard", "annealing"])
def test_requests_carry_prompt_length_and_schema(name):
    odd = 'Print {words}, {prompt}, {x} and \\1 "so".'
    text = templates.request(name, odd, words=130)
    assert text.count(odd) == 1 and "130 words" in text and "at most three words" in text and "0.8B" in text
    assert "words in all" not in templates.request(name, odd)
    answer = json.loads(text.split("Its answer:\n")[1].split("\nThe user's message:")[0])
    assert set(answer["values"]) == {"value_1", "value_2"}
    keys = {"standard": {"values", "response"}, "annealing": {"values", "annealing_cot", "final_model_response"}}
    assert set(answer) == keys[name]


def test_templates_from_a_folder(tmp_path):
    (tmp_path / "annealing.txt").write_text("{prompt}\nUse {words} words.\n")
    mine = templates.read_templates(tmp_path)
    assert templates.request("annealing", "Hi", 50, mine) == "Hi\nUse 50 words.\n"
    assert templates.request("annealing", "Hi", None, mine) == "Hi\n"
    assert mine["standard"] == templates.STANDARD


def test_bad_template_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder .*geometry.traces.templates"):
        templates.read_templates(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"no \*\.txt"):
        templates.read_templates(tmp_path)
    (tmp_path / "anneal.txt").write_text("{prompt}")
    with pytest.raises(ValueError, match="Did you mean 'annealing'"):
        templates.read_templates(tmp_path)
    (tmp_path / "anneal.txt").rename(tmp_path / "standard.txt").write_text("no place")
    with pytest.raises(ValueError, match=r"standard\.txt has no \{prompt\}"):
        templates.read_templates(tmp_path)


# ---- the rules teacher


def check_pair(prompt, words, seed=0):
    pair = [write_trace(prompt, name, words, seed) for name in ("standard", "annealing")]
    for trace in pair:
        assert seen(prompt, trace, words) == [], (prompt, trace)
    a, b = map(length, pair)
    assert abs(a - b) <= 0.1 * max(a, b)
    assert pair[0].response == pair[1].response and pair[0].teacher == pair[1].teacher == "rules"
    return pair


@pytest.mark.parametrize("words", [40, 55, 70, 100, 130, 150])
def test_traces_of_the_embedded_prompts_hold_to_appendix_d(words):
    for prompt in generate(240, seed=words):
        standard, annealing = check_pair(prompt, words)
        assert quoted(standard.reasoning, prompt.text) & quoted(annealing.reasoning, prompt.text)


@pytest.mark.skipif(not REAL.is_dir(), reason="ConflictScope's files are not beside the repository")
def test_every_real_prompt_gets_valid_traces_of_matched_length():
    prompts = load_folder(REAL)
    for i, prompt in enumerate(prompts):
        check_pair(prompt, (40, 70, 130, 150)[i % 4])
    assert len(prompts) == 2313


ODD = [
    "My sister's 'diary' isn't mine.\nShe said 'don't read it', but it's open on May 3.",
    "a b c d",
    "and or\nbut if\n\nwe\tdo",
    'Call me "Bo" {d1} {x} \\g<1> & <think> now </think> please',
    "word " * 300,
    "Größe Änderung für Müller über Straße 12, bitte schön",
]


@pytest.mark.parametrize("text", ODD)
def test_odd_texts_do_not_break_a_trace(text):
    prompt = Prompt("x", text, "mine", "care", "privacy", "cc")
    for name in styles.ASKED:
        found = seen(prompt, write_trace(prompt, name, 60, seed=0), 60)
        assert found == [] or (text.startswith("word") and "details" in found[0])  # one word repeated has one detail


def test_a_prompt_too_short_to_quote_is_refused():
    with pytest.raises(ValueError, match="need 4 words to quote 2 details"):
        write_trace(Prompt("x", "Help me", "mine", "care", "privacy", "cc"), "standard", 60, 0)


def test_values_that_the_teacher_does_not_know():
    prompt = replace(generate(1, seed=0)[0], value_1="inner_peace", value_2="being a very good sport indeed")
    trace = write_trace(prompt, "annealing", 80, seed=0)
    assert (trace.value_1, trace.value_2) == ("inner peace", "being a very") and seen(prompt, trace, 80) == []


def test_traces_are_seeded_and_varied():
    prompts = generate(100, seed=0)
    first = [write_trace(p, "annealing", 70, seed=0).reasoning for p in prompts]
    assert first == [write_trace(p, "annealing", 70, seed=0).reasoning for p in prompts]
    assert first != [write_trace(p, "annealing", 70, seed=1).reasoning for p in prompts]
    assert len(set(first)) == 100


def test_a_recorded_trace_stays_the_same():
    prompt = Prompt("a-1", "May I read my sister's diary? She has been quiet since May 3.", "home", "care", "privacy", "open")
    trace = write_trace(prompt, "annealing", 40, seed=0)
    assert trace.reasoning == RECORDED


RECORDED = """Phase 1 (High Temp): The user writes 'May 3' and 'my sister's diary'. Here care and privacy are in conflict.

Phase 2 (Cooling): So privacy counts more than care here. We can make up for care later on.

Phase 3 (Low Temp): I will keep private things private and respect care."""


@pytest.mark.parametrize("words", [39, 151, 0])
def test_lengths_that_cannot_be_served(words):
    with pytest.raises(ValueError, match="writes 40 to 150 words"):
        write_trace(generate(1, seed=0)[0], "standard", words, 0)


def broken(trace, **change):
    phases = change.pop("phases", trace.phases)
    return replace(trace, phases=phases, reasoning=change.pop("reasoning", assemble(trace.style, phases)), **change)


def test_the_audit_sees_each_violation():
    prompt = generate(1, seed=0)[0]
    trace = write_trace(prompt, "annealing", 70, seed=0)
    explore, cool, converge = trace.phases
    cases = {
        "0 details quoted": broken(trace, phases=tuple(p.replace("'", "") for p in trace.phases)),
        "1 details quoted": broken(trace, phases=tuple(p.replace("'", "") for p in trace.phases[:2]) + (f"It is 'a' case of 'the' {prompt.value_1}: '{' '.join(prompt.text.split()[:3])}'.",)),
        "value name of 4 words": broken(trace, value_1="a b c d"),
        "'courage' is not named": broken(trace, value_2="courage"),
        "sentence of": broken(trace, phases=(explore, cool, converge + " And" + " so" * 21 + ".")),
        "response of 0 words": broken(trace, response=" "),
        "response of 41 words": broken(trace, response="a " * 41),
        "not laid out": broken(trace, reasoning=" ".join(trace.phases)),
        "decides already": broken(trace, phases=(explore + " I will tell her.", cool, converge)),
        "words, 140 asked": trace,
    }
    for message, case in cases.items():
        found = seen(prompt, case, 140 if case is trace else None)
        assert any(message in f for f in found), (message, found)


def test_quotes_must_be_literal():
    assert quoted("He 'owes me $20' and ‘lives here’ and 'made this up'.", "Bo owes me $20. Bo lives here.") == {"owes me $20", "lives here"}


def test_the_order_of_values_does_not_depend_on_how_they_are_given():
    for a in rules.VALUES:
        for b in rules.VALUES:
            assert rules.in_order(a, b) == rules.in_order(b, a)
    assert all(len(v.name.split()) <= 3 for v in rules.VALUES.values())


# ------------------------------------------------------------------------- controls


@pytest.fixture(scope="module")
def pairs():
    return [{s: rules.write_trace(p, s, 60, 0) for s in ("standard", "annealing")} for p in generate(60, seed=0)]


@pytest.mark.parametrize("name", [s.name for s in styles.STYLES.values() if s.of])
def test_a_control_keeps_what_it_says_and_no_more(pairs, name):
    changed = 0
    for sources in pairs:
        trace = derive(name, sources)
        assert trace is not None and trace == derive(name, sources), "made the same way every time"
        source = sources[styles.STYLES[name].of[0]]
        assert disassemble(name, trace.reasoning) == trace.phases and (trace.response, trace.prompt_id, trace.teacher) == (source.response, source.prompt_id, source.teacher)
        ours, theirs = (sorted(" ".join(t.phases).split()) for t in (trace, source))
        if name in ("matched", "final"):
            assert not list((Counter(ours) - Counter(theirs)).elements()), "nothing is invented"
        else:
            assert ours == theirs
        changed += trace.reasoning != source.reasoning
    assert changed > len(pairs) / 2 or name == "matched"  # the rules teacher's pairs have equal lengths already


def test_a_longer_standard_is_shortened_and_a_shorter_one_is_named(pairs):
    prompts = generate(40, seed=3)
    for p in prompts:
        annealing = rules.write_trace(p, "annealing", 60, 0)
        long, short = rules.write_trace(p, "standard", 110, 0), rules.write_trace(p, "standard", 40, 0)
        trace = derive("matched", {"standard": long, "annealing": annealing})
        assert abs(styles.length(trace.phases) - styles.length(annealing.phases)) <= 0.1 * styles.length(annealing.phases)
        assert trace.phases[0].startswith(styles.sentences(long.phases[0])[0]) and trace.phases[0].endswith(styles.sentences(long.phases[0])[-1])
        assert derive("matched", {"standard": short, "annealing": annealing}) is None
    made, lost = controls([short, annealing])
    assert [q.style for q in lost] == ["matched"] and "no matched form" in lost[0].reason and len(made) == 5


def test_a_text_of_two_sentences_has_no_thirds():
    trace = Trace("p", "standard", "somebody", "a", "b", ("One thing. Another.",), "One thing. Another.", "Do it.")
    made, lost = controls([trace])
    assert not made and [q.style for q in lost] == ["headers"]


def test_every_order_but_the_right_one_comes_up(pairs):
    seen = {tuple(sources["annealing"].phases.index(p) for p in derive("shuffled", sources).phases) for sources in pairs}
    assert len(seen) == 5 and (0, 1, 2) not in seen


def test_the_styles_that_an_arm_may_name_are_those_that_are_written():
    from valuecot.teacher.styles import STYLES
    from valuecot.types import TRACE_STYLES

    assert set(TRACE_STYLES) == STYLES.keys()
