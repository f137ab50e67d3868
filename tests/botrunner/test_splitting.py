"""Long Markdown texts in pieces that render like the whole."""

import html
import re
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wcwidth import iter_graphemes

from botrunner.outgoing.splitting import cost, split
from chat.markdown import to_html

LIMIT = 2_000


def words(markup: str) -> list[str]:
    return html.unescape(re.sub(r"<[^>]*>", " ", markup)).split()


def pieces(text: str, limit: int = LIMIT) -> list[str]:
    found = list(split(text, limit))
    for piece in found:
        assert sum(map(cost, piece.split("\n"))) <= limit
    return found


def test_a_short_text_is_one_piece() -> None:
    assert pieces("Hello\n\n```\nx\n```") == ["Hello\n\n```\nx\n```"]
    assert pieces("") == []


def test_a_long_line_is_cut_after_a_sentence() -> None:
    text = "The first sentence is here. And a second one, which is longer! " * 200 + "End."
    found = pieces(text)
    assert len(found) > 3
    assert all(piece.endswith((".", "!")) for piece in found)
    assert " ".join(found).split() == text.split()


def test_a_line_without_sentences_is_cut_between_words() -> None:
    text = " ".join(f"word{number}" for number in range(3_000))
    assert " ".join(pieces(text)) == text


def test_paragraphs_are_kept_whole() -> None:
    paragraphs = [f"Paragraph {number}. " + "It goes on. " * 9 + "End." for number in range(40)]
    text = "\n\n".join(paragraphs)
    found = pieces(text)
    assert len(found) > 5
    assert [each for piece in found for each in piece.split("\n\n")] == paragraphs


def test_a_line_is_kept_whole_in_a_paragraph_of_lines() -> None:
    lines = [f"Line {number} of a poem, which goes on" for number in range(200)]
    found = pieces("\n".join(lines))
    assert [each for piece in found for each in piece.split("\n")] == lines


@pytest.mark.parametrize(
    "text", ["x" * 5_000, "\u6587\u5b57" * 2_000, "a" * 99 + "\u0301b" * 2_000]
)
def test_only_a_word_that_is_too_long_is_cut(text: str) -> None:
    assert "".join(pieces(text)) == text


@pytest.mark.parametrize(
    "character",
    [
        "\U0001f468\u200d\U0001f469\u200d\U0001f467",
        "e\u0301\u0323",
        "\U0001f1e9\U0001f1ea",
        "\U0001f44d\U0001f3fd",
    ],
)
def test_a_character_that_is_composed_of_several_is_kept_whole(character: str) -> None:
    found = pieces(character * 1_000)
    assert len(found) > 1
    assert {each for piece in found for each in iter_graphemes(piece)} == {character}


def test_chinese_is_cut_after_a_sentence() -> None:
    text = "\u8fd9\u662f\u4e00\u53e5\u8bdd\u3002" * 300
    found = pieces(text)
    assert "".join(found) == text
    assert all(piece.endswith("\u3002") for piece in found)


@pytest.mark.parametrize(
    ("opening", "closing", "reopened"),
    [
        ("```python", "```", "```python"),
        ("~~~~", "~~~~", "~~~~"),
        ('````js title="a b"', "````", "````js"),
    ],
)
def test_a_code_block_is_continued_in_its_language(
    opening: str, closing: str, reopened: str
) -> None:
    code = [f"    x = {number}  # ``` and | and > and - too" for number in range(120)]
    found = pieces("\n".join(["Look:", opening, *code, closing, "", "That is it."]))
    assert len(found) > 3
    assert all(piece.startswith(f"{reopened}\n") for piece in found[1:-1])
    seen = [
        line
        for piece in found
        for block in re.findall(r"<pre><code[^>]*>(.*?)</code></pre>", to_html(piece), re.S)
        for line in html.unescape(block).splitlines()
    ]
    assert seen == code
    assert "That is it." in found[-1]


def test_a_code_block_is_cut_at_an_empty_line() -> None:
    functions = [f"def f{n}():\n" + "    pass\n" * 5 for n in range(60)]
    found = pieces("```py\n" + "\n".join(functions) + "```")
    assert all(piece.startswith("```py\ndef ") for piece in found)


def test_an_unclosed_code_block_is_continued() -> None:
    found = pieces("```\n" + "x = 1\n" * 500)
    assert all(to_html(piece).startswith("<pre><code>x = 1") for piece in found)


def test_a_table_repeats_its_header() -> None:
    rows = [f"| {number} | a\\|b | `c` |" for number in range(100)]
    table = ["| No. | Name | Code |", "| --: | :-: | --- |", *rows]
    found = pieces("\n".join(["Before", "", *table, "", "After"]), 4_000)
    assert len(found) > 2
    seen = []
    for piece in found:
        markup = to_html(piece)
        assert words(markup[markup.index("<thead") : markup.index("</thead")]) == [
            *("No.", "Name", "Code")
        ]
        seen += re.findall(r"<td[^>]*>(\d+)</td>", markup)
    assert seen == [str(number) for number in range(100)]
    assert "After" in found[-1]


def test_a_header_has_at_least_one_row() -> None:
    for length in range(0, 1_500, 25):
        text = "word " * (length // 5) + "\n\n|a|b|\n|-|-|\n" + "|1|2|\n" * 30
        for piece in pieces(text):
            assert not piece.endswith("|-|-|")


def test_a_numbered_list_goes_on_with_its_numbers() -> None:
    items = [f"{number}. Item {number} has some text" for number in range(1, 200)]
    found = pieces("\n".join(items))
    assert len(found) > 3
    for piece in found[1:]:
        assert f'<ol start="{piece.split(".")[0]}">' in to_html(piece)
    assert [line for piece in found for line in piece.split("\n")] == items


def test_a_nested_list_keeps_its_depth() -> None:
    lines = ["- top"]
    for number in range(80):
        lines += [f"    - middle {number}", f"        - deep {number}"]
    for piece in pieces("\n".join(lines)):
        markup = to_html(piece)
        assert "<pre>" not in markup
        deep = re.search(r"<li>\s*deep", markup)
        assert deep
        before = markup[: deep.start()]
        assert before.count("<ul>") - before.count("</ul>") == 3


def test_a_code_block_in_a_list_stays_in_it() -> None:
    text = "1. First\n2. Second:\n\n   ```sh\n" + "   make   test\n" * 150 + "   ```\n3. Third"
    found = pieces(text)
    assert len(found) > 2
    for piece in found[1:]:
        markup = to_html(piece)
        assert markup.startswith('<ol start="2">\n<li>')
        assert '<code class="language-sh">make   test\n' in markup
    assert "<li>Third</li>" in to_html(found[-1]).replace("<p>", "").replace("</p>", "")


def test_a_quote_stays_a_quote() -> None:
    text = "> " + "A sentence of the quote. " * 100 + "\n> It ends.\n\nNot the quote."
    found = pieces(text)
    assert all(piece.startswith("> ") for piece in found)
    assert "<p>Not the quote.</p>" in to_html(found[-1])


def test_a_heading_is_followed_by_its_text() -> None:
    sections = "\n\n".join(f"## Heading {n}\n\n" + "Some text. " * 20 for n in range(30))
    assert all(not piece.splitlines()[-1].startswith("#") for piece in pieces(sections))


def test_markup_within_a_line_is_not_cut() -> None:
    link = "[the long name of a link](https://example.org/path)"
    text = f"see {link} and `some code here` or **bold text** "
    for piece in pieces(text * 60):
        assert piece.count("`") % 2 == 0
        assert piece.count("**") % 2 == 0
        assert piece.count("[") == piece.count("](") == piece.count(")")


SENTENCES = st.integers(1, 60).map(lambda length: " ".join(["w"] * length) + ".")
BLOCKS = st.one_of(
    SENTENCES,
    SENTENCES.map(lambda text: f"# {text}"),
    SENTENCES.map(lambda text: f"> {text}\n>\n> - {text}"),
    st.lists(SENTENCES, min_size=1, max_size=20).map(lambda rows: "- " + "\n- ".join(rows)),
    st.lists(SENTENCES, min_size=1, max_size=20).map(
        lambda rows: "1. " + "\n   1. ".join(rows) + "\n2. end"
    ),
    st.lists(SENTENCES, max_size=30).map(lambda rows: "```py\n" + "\n".join(rows) + "\n```"),
    st.lists(SENTENCES, min_size=1, max_size=9).map(
        lambda rows: "|a|b|\n|-|-|\n" + "\n".join(f"|{row}|x|" for row in rows)
    ),
)


@settings(deadline=None)
@given(st.lists(BLOCKS, min_size=1, max_size=12), st.integers(2_500, 9_000))
def test_no_word_is_lost_cut_or_moved(blocks: list[str], limit: int) -> None:
    numbers = count()
    text = re.sub(r"\bw\b", lambda _: f"w{next(numbers)}", "\n\n".join(blocks))
    found = pieces(text, limit)
    numbered = re.compile(r"\bw\d+\b")
    assert [w for piece in found for w in numbered.findall(piece)] == numbered.findall(text)
    seen = [w for piece in found for w in numbered.findall(to_html(piece))]
    assert seen == numbered.findall(to_html(text))
