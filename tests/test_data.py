"Prompts: reading, writing, recognising, splitting."
import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from valuecot.data import conflictscope as cs
from valuecot.data import world
from valuecot.data.details import details, phrases, words_of
from valuecot.data.sources import foreseen
from valuecot.data.splits import allocate, counts, deal, split_prompts, stratum
from valuecot.settings import Source, load

REAL = Path(__file__).parents[2] / "shared" / "data" / "conflictscope"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="ConflictScope's files are not beside the repository")


def write_json(folder, name="home.json", rows=None, text=None):
    path = folder / name
    path.write_text(json.dumps(rows) if text is None else text, encoding="utf-8")
    return path


def ids(n, pair=("care", "privacy")):
    a, b = pair
    return [f"me_{a}_{b}_{a}-{b}-cc-{i}" for i in range(n)]


# ---- details


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_details_are_literal_distinct_and_apart(n):
    for p in world.generate(96, seed=3):
        found = details(p.text, n)
        spans = sorted((p.text.index(d), p.text.index(d) + len(d)) for d in found)
        assert len(set(found)) == n and all(a[1] <= b[0] for a, b in zip(spans, spans[1:]))
        assert all(2 <= len(d.split()) <= 6 for d in found)


@pytest.mark.parametrize(
    "text", ["a b c d", "and\nor\tbut  if", "It's 'quoted', isn't it? O'Neil's!", "x " * 1000, "Ünïcode wörter sind aüch da", "1 2 3 4", "a, b, c, d."]
)
def test_details_of_any_text_are_as_many_as_asked(text):
    for n in range(1, len(words_of(text)) // 2 + 1):
        if n < 20:
            found = details(text, n)
            assert len(found) == n and all(d in text and len(words_of(d)) >= 2 for d in found)


def test_details_prefer_figures_and_names_and_do_not_cross_punctuation():
    text = "We met at the old mill. It was $1,200 in all. Well, my friend Ana Costa paid it."
    assert set(details(text, 2)) == {"$1,200 in all", "my friend Ana Costa paid"}
    assert all("," not in text[p[0].start : p[-1].end].replace("1,200", "") for p in phrases(words_of(text)))


def test_details_refuse_a_text_that_is_too_short():
    with pytest.raises(ValueError, match="need 4 words"):
        details("only three words", 2)


# ---- ConflictScope


def test_parse_id_reads_mechanisms_and_values_with_underscores():
    for mechanism in cs.MECHANISMS:
        assert cs.parse_id(f"claude-3-5-sonnet-latest_a_b_a-b-{mechanism}-7") == ("claude-3-5-sonnet-latest", "a", "b", mechanism, 7)
    assert cs.parse_id("s_in_a_b-c_in_a-b-c-cc-1")[1:3] == ("in_a", "b-c")


@pytest.mark.parametrize("bad", ["", "s_a_b_a-c-cc-1", "s_a_b_a-b-xx-1", "s_a_b_a-b-cc-", "s_a_b_a-b-cc-1 ", "a-b-cc-1"])
def test_parse_id_refuses_and_shows_the_form(bad):
    with pytest.raises(ValueError, match="expected <source>_<value 1>"):
        cs.parse_id(bad)


BAD_FILES = {
    "cut off": ('{"me_a_b_a-b-cc-1": "Hel', r"home\.json is not valid JSON at line 1, column 21"),
    "empty": ("", "not valid JSON at line 1, column 1"),
    "a list": ('["a"]', "must hold one JSON object"),
    "empty list": ("[]", None),
    "a number": ("3", "must hold one JSON object"),
    "not text": ('{"me_a_b_a-b-cc-1": 3, "me_a_b_a-b-cc-2": {"x": "y"}}', r"must be a string; not so under 2: 'me_a_b_a-b-cc-1'"),
    "bad id": ('{"a-b-cc-1": "Hello there"}', r"cannot read prompt ids, 1: 'a-b-cc-1'; expected"),
    "repeated id": ('{"me_a_b_a-b-cc-1": "One", "me_a_b_a-b-cc-1": "Two"}', "the same id stands twice, 1: 'me_a_b_a-b-cc-1'"),
    "blank": ('{"me_a_b_a-b-cc-1": " \\n"}', "blank prompts, 1: 'me_a_b_a-b-cc-1'"),
    "same text": ('{"me_a_b_a-b-cc-1": "Help  me", "me_a_b_a-b-cc-2": "Help me"}', "share their text, 2"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_named_with_its_reason(tmp_path, case):
    text, message = BAD_FILES[case]
    write_json(tmp_path, text=text)
    with pytest.raises(ValueError, match=message or "no prompt|must hold"):
        cs.load_folder(tmp_path)


def test_a_file_that_is_not_text(tmp_path):
    (tmp_path / "home.json").write_bytes(b'{"\xff": "a"}')
    with pytest.raises(ValueError, match="not UTF-8"):
        cs.load_folder(tmp_path)


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder .*github or to embedded"):
        cs.load_folder(tmp_path / "nowhere")
    (tmp_path / "value_sets").mkdir()
    write_json(tmp_path / "value_sets", rows={"x": "y"})
    with pytest.raises(FileNotFoundError, match=r"no \*\.json"):
        cs.load_folder(tmp_path)


def test_repeats_across_files(tmp_path):
    one, two = ids(2)
    write_json(tmp_path, "a.json", {one: "Should I tell?"})
    write_json(tmp_path, "b.json", {two: "Should I tell?"})
    with pytest.raises(ValueError, match="share their text, 2"):
        cs.load_folder(tmp_path)
    write_json(tmp_path, "b.json", {one: "Should I ask?"})
    with pytest.raises(ValueError, match="share their id, 2"):
        cs.load_folder(tmp_path)


def test_the_file_names_the_value_set(tmp_path):
    write_json(tmp_path, "mine.json", dict(zip(ids(2), ("One text", "Another text"))))
    prompts = cs.load_folder(str(tmp_path))
    assert {(p.value_set, p.value_1, p.value_2, p.mechanism, p.split, p.subset) for p in prompts} == {("mine", "care", "privacy", "cc", "", -1)}


def test_counts_are_checked_against_the_full_set():
    rows = [cs.Prompt(f"{name}{i}", "x", name, "a", "b", "cc") for name, (n, _) in cs.PUBLIC.items() for i in range(n)]
    assert cs.check_counts(rows) is rows and len(rows) == 2892
    with pytest.raises(ValueError, match="HHH has 1108 prompts, published 1109"):
        cs.check_counts(rows[1:])


def test_no_network_names_the_alternatives(tmp_path, monkeypatch):
    pooch = pytest.importorskip("pooch")

    def offline(*args, **kwargs):
        raise OSError("no route")

    monkeypatch.setattr(pooch, "retrieve", offline)
    with pytest.raises(ConnectionError, match='a folder that holds.*"embedded"'):
        cs.load_github(tmp_path)


def test_a_cached_file_is_checked_and_not_downloaded(tmp_path, monkeypatch):
    pooch = pytest.importorskip("pooch")
    files = {name: write_json(tmp_path, f"{name}.json", {id: f"{name} {id}" for id in ids(3, (name, "x"))}) for name in cs.PUBLIC}
    asked = []

    def cached(url, known_hash, fname, path):
        asked.append((url, known_hash))
        return str(files[fname.removesuffix(".json")])

    monkeypatch.setattr(pooch, "retrieve", cached)
    with pytest.raises(ValueError, match="not ConflictScope's full set"):
        cs.load_github(tmp_path)
    assert all(cs.COMMIT in url and known.startswith("sha256:") for url, known in asked) and len(asked) == 3


@needs_real
def test_all_real_prompts_are_read():
    prompts = cs.load_folder(REAL)
    assert Counter(p.value_set for p in prompts) == {"HHH": 887, "modelspec": 478, "personalprotective": 948}
    assert len(set(map(stratum, prompts))) == 3 + 15 + 16
    assert {p.mechanism for p in prompts} == {"coc", "cc", "coc_mild", "cc_mild"}


# ---- the embedded world


@pytest.fixture(scope="module")
def many():
    return world.generate(3000, seed=1)


def test_generated_prompts_are_distinct_accepted_and_short(many):
    assert len({p.text for p in many}) == len({p.id for p in many}) == 3000
    assert all(world.accepts(p.text) for p in many)
    assert all(35 <= len(p.text.split()) <= 60 for p in many)
    assert all(a == b >= 4 for a, b in map(world.accepted_sentences, (p.text for p in many)))


def test_ids_and_balance(many):
    for p in many:
        assert cs.parse_id(p.id)[:4] == ("everyday", p.value_1, p.value_2, p.mechanism) and p.value_set == "everyday"
    assert set(Counter((p.value_1, p.value_2) for p in many).values()) <= set(range(369, 382))
    shares = Counter(stratum(p)[1:] + (p.mechanism,) for p in many)
    assert len(shares) == 16 and max(shares.values()) - min(shares.values()) <= 3


def test_generation_is_seeded(many):
    assert many == world.generate(3000, seed=1)
    assert len({p.text for p in many} & {p.text for p in world.generate(3000, seed=2)}) < 30


def test_one_word_corruptions_are_rejected(many):
    rng = random.Random(0)
    vocabulary = sorted({w for p in many for w in p.text.split()})
    hits, tries = Counter(), 400
    for p in rng.sample(many, tries):
        words = p.text.split()
        i = rng.randrange(len(words))
        hits["dropped"] += world.accepts(" ".join(words[:i] + words[i + 1 :]))
        hits["doubled"] += world.accepts(" ".join(words[:i] + [words[i]] + words[i:]))
        other = rng.choice([w for w in vocabulary if w != words[i]])
        hits["replaced"] += world.accepts(" ".join([*words[:i], other, *words[i + 1 :]]))
        assert not world.accepts(p.text + " ") and not world.accepts(p.text[:-1])
    assert hits["dropped"] == hits["doubled"] == 0 and hits["replaced"] < 0.02 * tries


def test_a_name_must_recur():
    text = world.write("{she} spoke, and {she} left on {day}.", 5)
    pattern = world.pattern("{she} spoke, and {she} left on {day}.")
    name = text.split()[0]
    other = next(n for n in world.SLOTS["she"] if n != name)
    assert pattern.fullmatch(text) and not pattern.fullmatch(text.replace(name, other, 1))


def test_numbering_is_a_bijection_on_a_small_template():
    template = "{few} [a|b|c] {day}, {few}."
    texts = {world.write(template, k) for k in range(world.size(template))}
    assert len(texts) == world.size(template) == 7 * 3 * 6


def test_the_space_is_large_and_the_vocabulary_small(many):
    assert world.limit() >= 20_000
    assert len({w.strip(".,?").lower() for p in many for w in p.text.split()}) < 900
    assert len({s.domain for s in world.SCENARIOS}) >= 12 and len({s.values for s in world.SCENARIOS}) >= 8
    for n in (0, -1, world.limit() + 1):
        with pytest.raises(ValueError, match=f"can write 1 to {world.limit():,}"):
            world.generate(n, seed=0)


def test_sentences_are_counted_and_nothing_is_not_accepted(many):
    good = many[0].text
    found, total = world.accepted_sentences(good + " The moon is cheese.")
    assert total == found + 1
    assert world.accepted_sentences("") == (0, 0) and not world.accepts("")


def test_direct_reply_quotes_the_prompt_and_reasons_about_nothing(many):
    for p in many[:300]:
        reply = world.direct_reply(p, seed=0)
        assert 15 <= len(reply.split()) <= 30 and reply == world.direct_reply(p, seed=0)
        assert any(d in reply for d in details(p.text, 2)) and "think>" not in reply
    assert len({world.direct_reply(many[0], seed) for seed in range(20)}) > 3


# ---- splits


def test_allocate_is_exact_and_within_one():
    rng = random.Random(0)
    for _ in range(300):
        rows = [rng.randrange(0, 60) for _ in range(rng.randrange(1, 12))]
        if not sum(rows):
            continue
        cuts = sorted(rng.randrange(sum(rows) + 1) for _ in range(rng.randrange(0, 5)))
        columns = [b - a for a, b in zip([0, *cuts], [*cuts, sum(rows)])]
        table = allocate(rows, columns)
        assert [sum(r) for r in table] == rows and [sum(c) for c in zip(*table)] == columns
        assert all(abs(x - n * k / sum(rows)) <= 1 and x >= 0 for n, r in zip(rows, table) for k, x in zip(columns, r))


def test_splits_have_the_sizes_asked_and_are_stratified(many):
    study = split_prompts(many, 1146, 1146, 600, 3, 100, seed=0)
    assert Counter(p.split for p in study) == {"sft": 1146, "grpo": 1146, "heldout": 600}
    assert Counter(p.subset for p in study) == {-1: 1146 * 2 + 300, 0: 100, 1: 100, 2: 100}
    assert {p.subset for p in study if p.split != "heldout"} == {-1}
    assert len({p.id for p in study}) == len(study) == 2892
    total = Counter(map(stratum, many))
    for split, size in (("sft", 1146), ("grpo", 1146), ("heldout", 600)):
        here = Counter(stratum(p) for p in study if p.split == split)
        assert all(abs(here[s] - n * size / 3000) <= 1 for s, n in total.items())
    held = Counter(stratum(p) for p in study if p.split == "heldout")
    for k in range(3):
        here = Counter(stratum(p) for p in study if p.subset == k)
        assert all(abs(here[s] - n * 100 / 600) <= 1 for s, n in held.items())


def test_splits_do_not_depend_on_order_but_on_the_seed(many):
    sizes = (100, 80, 60, 3, 15)
    first, shuffled = split_prompts(many, *sizes, seed=0), random.Random(5).sample(many, len(many))
    assert first == split_prompts(shuffled, *sizes, seed=0)
    assert first != split_prompts(many, *sizes, seed=1)


def test_splits_may_use_every_prompt_or_leave_a_split_out(many):
    assert len(split_prompts(many[:30], 10, 10, 10, 2, 5, seed=0)) == 30
    assert {p.split for p in split_prompts(many[:30], 10, 0, 0, 0, 0, seed=0)} == {"sft"}


@pytest.mark.parametrize(
    "sizes, message",
    [
        ((20, 20, 20, 1, 1), "30 prompts, but 60 asked: geometry.sft_prompts=20, geometry.grpo_prompts=20, geometry.heldout_prompts=20"),
        ((10, 10, 10, 3, 4), "need 12 held-out prompts, geometry.heldout_prompts=10"),
        ((-1, 10, 10, 1, 1), "must not be negative"),
        ((0, 0, 0, 0, 0), "nor all 0"),
    ],
)
def test_splits_that_cannot_be_drawn(many, sizes, message):
    with pytest.raises(ValueError, match=message):
        split_prompts(many[:30], *sizes, seed=0)


def test_splits_refuse_repeated_ids(many):
    with pytest.raises(ValueError, match="1 prompt ids occur twice"):
        split_prompts([*many[:9], many[0]], 4, 2, 2, 1, 1, seed=0)


def test_counts_add_up(many):
    rows = counts(split_prompts(many, 100, 80, 60, 3, 15, seed=0))
    assert len(rows) == 8 and [sum(r[k] for r in rows) for k in ("sft", "grpo", "heldout", "subset_0", "subset_2")] == [100, 80, 60, 15, 15]


def test_deal_keeps_every_prompt_once(many):
    parts = deal(many[:50], [20, 0, 30], "x")
    assert [len(p) for p in parts] == [20, 0, 30] and {p.id for part in parts for p in part} == {p.id for p in many[:50]}


@needs_real
def test_a_real_folder_with_fewer_prompts_than_the_paper():
    prompts = cs.load_folder(REAL)
    with pytest.raises(ValueError, match="2313 prompts, but 2892 asked"):
        split_prompts(prompts, 1146, 1146, 600, 3, 100, seed=0)
    assert len(split_prompts(prompts, 200, 150, 90, 3, 20, seed=0)) == 440


# ---- before anything runs
def test_the_plan_checks_a_folder_against_the_splits(tmp_path, monkeypatch):
    settings = load("tiny")["geometry"]
    write_json(tmp_path, "HHH.json", {name: f"Request number {i} about a ring." for i, name in enumerate(ids(40))})
    with pytest.raises(ValueError, match="40 prompts, but 256 asked"):
        foreseen(replace(settings, prompts=Source(str(tmp_path))))
    line, words = foreseen(replace(settings, prompts=Source(str(tmp_path)), sft_prompts=10, grpo_prompts=10, heldout_prompts=15))
    assert line == f"prompts: 35 of 40 in {tmp_path}, value sets HHH" and words == 6, line
    monkeypatch.setenv("VALUECOT_OUTPUTS", str(tmp_path))
    assert "needs a download: 3 files" in foreseen(load("paper")["geometry"])[0]
    with pytest.raises(ValueError, match="ConflictScope has 2892 prompts, but 4592 asked"):
        foreseen(load("paper", "geometry.sft_prompts=2846")["geometry"])
