"""A text by the share of its tokens: nothing lost, nothing run, readable without colours; and which text each token is."""

import html
import io
import json
import re
from pathlib import Path

import matplotlib.image
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from valuecot.companion.safe import clean
from valuecot.training.models import train_tokenizer
from valuecot.training.pieces import decoded, pieces
from valuecot.view.theme import PALETTE
from valuecot.view.tokens import LOOKS, SIGNS, STEPS, shade, shade_style, shares_figure, token_text

SHARED = Path(__file__).parents[2] / "shared" / "data"
TEXTS = ("She gave her word.\n\n  And then?", "a café: 火の鳥 👩‍👩‍👧 ok", "<think>\nPhase 1 (High Temp): x\n</think>\n\nB)", "\ttabs  and   spaces ", "e\u0301 combining", "")


def plain(text):
    "What a reader sees of HTML."
    return html.unescape(re.sub(r"<[^>]+>", "", text.replace("<br>", "\n")))


def shown(page):
    "The text of `token_text` alone, without legend and table."
    return plain(re.search(r'<div style="white-space:pre-wrap[^"]*">(.*)</div>(?:<p class="vc-caption|</div>)', page, re.S)[1])


# ------------------------------------------------------------------------------ pieces


def spaced():
    "A tokenizer in SentencePiece's way: words with a mark for their space, bytes for what it does not know."
    words = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *map(chr, range(97, 123)), *".:,?!()123ABPSTH", "th", "▁th", "er"]
    core = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[("t", "h"), ("▁", "th"), ("e", "r")], byte_fallback=True, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def on_disk(name):
    folder = next((f for f in (SHARED / "tokenizers" / name, SHARED / name) if (f / "tokenizer_config.json").exists()), None)
    if folder is None:
        pytest.skip(f"no tokenizer {name} in ../shared/data here")
    return AutoTokenizer.from_pretrained(folder)


MADE = {"bytes": lambda: train_tokenizer(["She gave her word. And then?"] * 3, 300), "sentencepiece": spaced, "llama3": lambda: on_disk("llama3"), "qwen2.5": lambda: on_disk("qwen2.5"), "lm_stories260K": lambda: on_disk("lm_stories260K")}


@pytest.mark.parametrize("name", MADE)
def test_pieces_joined_are_the_decoded_text(name):
    tokenizer = MADE[name]()
    for text in TEXTS:
        for ids in (tokenizer(text).input_ids, tokenizer(text, add_special_tokens=False).input_ids):
            for cut in {len(ids), len(ids) // 2, max(len(ids) - 1, 0)}:  # cut off within a character, too
                found = pieces(tokenizer, ids[:cut])
                assert len(found) == cut and "".join(found) == decoded(tokenizer, ids[:cut])


@pytest.mark.parametrize("name", ["bytes", "sentencepiece"])
def test_a_split_character_belongs_to_one_token(name):
    tokenizer = MADE[name]()
    found = pieces(tokenizer, tokenizer("火", add_special_tokens=False).input_ids)
    assert [p for p in found if p.strip()] == ["火"] and found[-1] == "火"


def test_words_keep_their_leading_space():
    tokenizer = spaced()
    found = pieces(tokenizer, tokenizer("other the th", add_special_tokens=False).input_ids)
    assert " th" in found and "".join(found) == "other the th"


# ------------------------------------------------------------------------------ marks


def test_a_planted_script_stays_text():
    words = ["<script>alert(1)</script>", '" onmouseover="x', " <img src=x>", " &amp; $x$"]
    page = token_text(words, [0.5, -0.5, 0.01, 0.2], unit="<b>unit</b>", groups=["<i>a</i>"] * 2 + ["b"] * 2).text
    assert "<script" not in page and "<img" not in page and "<i>" not in page and "<b>unit" not in page
    assert "onmouseover=\"x" not in page and "mathjax_ignore" in page
    assert "".join(words[:2]) in shown(page) and "".join(words[2:]) in shown(page)


def test_the_cleaner_leaves_it_as_it_is():
    rng = np.random.default_rng(0)
    words = [f" w{i}\n" if i % 7 == 0 else f" <w{i}>" for i in range(60)]
    page = token_text(words, rng.standard_t(2, 60).tolist(), groups=[f"part {i // 20}" for i in range(60)]).text
    assert clean(page, lambda run: None).replace("&quot;", '"') == page.replace("&quot;", '"').replace("&#x27;", "'")


def test_without_marks_it_is_the_text_and_every_value_is_told_once():
    rng = np.random.default_rng(1)
    words, values = [f" w{i}" for i in range(100)], rng.standard_t(2, 100)
    values[:10] = np.nan
    page = token_text(words, values.tolist()).text
    assert shown(page) == "".join(words)
    told = [x for title in re.findall(r'title="([^"]*)"', page) for x in title.split(", ")]
    assert told == [f"{x:.2g}" for x in values[10:]]


def test_neighbours_of_one_shade_share_a_mark_and_a_long_text_is_small():
    assert token_text(["a", "b", "c", "d"], [1.0, 1.0, 1.0, -1.0]).text.split('line-height')[1].count("<span") == 2
    rng = np.random.default_rng(2)
    words = [" word" + "s" * int(i) for i in rng.integers(0, 4, 600)]
    page = token_text(words, (rng.standard_t(2, 600) * 1e-3).tolist(), groups=["explore"] * 200 + ["cool"] * 200 + ["converge"] * 200).text
    assert len(page) < 33_000
    worst = token_text(words, [1.0 if i % 2 else -1.0 for i in range(600)]).text  # no two neighbours alike, all as dark as can be
    assert len(worst) < 54_000
    smooth = token_text(words, np.sin(np.arange(600) / 60).tolist()).text
    assert len(smooth) < 17_000


def test_shades_are_told_apart_by_colour_by_ground_and_by_line():
    styles = [shade_style(level) for level in range(-4, 5)]
    assert len(set(styles)) == 9 and styles[4] == ""
    lines = [re.search(r"border-bottom:(\S+) (\S+)", s) for s in styles]
    drawn = [m.groups() for m in lines if m]
    assert len(drawn) == len(set(drawn)) == 6  # the faintest shade of each sign has its ground alone
    assert SIGNS[1][1] != SIGNS[-1][1] and {SIGNS[1][0], SIGNS[-1][0]} <= set(PALETTE)


def luminance(rgb):
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize(("page", "text"), [((1, 1, 1), (0.2, 0.2, 0.2)), ((0.07, 0.07, 0.07), (0.81, 0.81, 0.81))])
@pytest.mark.parametrize("sign", [1, -1])
def test_text_is_readable_on_every_shade_in_light_and_in_dark(page, text, sign):
    color = [int(SIGNS[sign][0][i : i + 2], 16) / 255 for i in (1, 3, 5)]
    for opacity, _ in LOOKS:
        a = int(opacity, 16) / 255
        ground, ink = luminance([a * c + (1 - a) * p for c, p in zip(color, page, strict=True)]), luminance(text)
        assert (max(ground, ink) + 0.05) / (min(ground, ink) + 0.05) >= 4.5


def test_shades_follow_the_scale():
    assert [shade(sign * step, 1.0) for sign in (1, -1) for step in STEPS] == [1, 2, 3, 4, -1, -2, -3, -4]
    assert shade(STEPS[0] * 0.99, 1.0) == shade(0.0, 0.0) == shade(None, 1.0) == 0
    small = token_text(["a"], [0.01], scale=1.0).text
    assert "background" not in small.split("line-height")[1]
    assert "nothing is shaded" in token_text(["a", "b"], [0.0, 0.0]).text
    assert "nothing scored of 1 token" in token_text(["a"], [None]).text


def test_the_largest_are_listed_with_their_place_and_sign():
    page = token_text(["a", " b\n", "c"], [0.1, -0.4, None], groups=["x", "y", "y"], k=2).text
    assert '<td>" b\\n"</td><td>2</td><td>y</td><td>-0.4</td>' in page.replace("&quot;", '"')
    assert page.count("<tr>") == 3


def test_groups_are_named_with_their_sums():
    page = token_text(["a", "b", "c"], [0.25, 0.5, None], groups=["explore", "explore", "rest"]).text
    assert "<b>explore</b> <small>(2 tokens, sum 0.75)" in page and "<b>rest</b> <small>(1 token, not scored)" in page


@pytest.mark.parametrize(("words", "values", "groups", "said"), [([], [], None, "no tokens"), (["a"], [], None, "1 pieces and 0 shares"), (["a"], [1.0], [], "0 groups"), (["a"], [float("inf")], None, "a share is inf")])
def test_what_does_not_fit_is_refused(words, values, groups, said):
    with pytest.raises(ValueError, match=said):
        token_text(words, values, groups=groups)


# ------------------------------------------------------------------------------ figure


@pytest.fixture
def rows():
    return pd.DataFrame({"label": ["prompt", "explore"] * 2, "arm": ["standard"] * 2 + ["annealing"] * 2, "share": [0.2, 0.8, -0.1, 1.1], "tokens": [50, 150, 1100, 100]})


def test_a_group_is_drawn_with_its_share_and_its_part_of_the_tokens(rows):
    figure = shares_figure(rows, "Made up", "n = 1")
    go.Figure(figure.plotly)
    json.dumps(figure.plotly)
    drawn = figure.plotly["data"]
    assert [t["x"][1] for t in drawn if t["mode"] == "lines+markers"] == [20, 80, -10, 110]
    assert [t["x"][0] for t in drawn if t["mode"] == "markers"][:4] == pytest.approx([25, 75, 91.667, 8.333])
    assert figure.plotly["layout"]["yaxis"]["ticktext"] == ["explore (150 / 100)", "prompt (50 / 1,100)"]
    assert "prompt of Standard CoT 20.0 % in 25.0 % of the tokens" in figure.alt
    seen = matplotlib.image.imread(io.BytesIO(figure.png(60)), format="png")
    assert seen[..., 3].any() and len(np.unique(seen.reshape(-1, seen.shape[-1]), axis=0)) > 20


def test_rows_without_their_columns_or_tokens_are_refused(rows):
    for bad, said in ((rows.drop(columns="share"), "lack the columns"), (rows[:0], "rows are empty"), (rows.assign(tokens=0), "has no token")):
        with pytest.raises(ValueError, match=said):
            shares_figure(bad, "Made up")


def test_groups_that_overlap_have_their_part_of_all_tokens(rows):
    figure = shares_figure(rows[:2].assign(of=400), "Made up")
    assert [t["x"][0] for t in figure.plotly["data"] if t["mode"] == "markers"][:2] == [12.5, 37.5]
