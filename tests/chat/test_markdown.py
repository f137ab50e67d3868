"""The Markdown of answers: formulas, tasks, tables, links and code, on a page and in a room."""

import time

import pytest

from chat.highlighting import highlighted
from chat.markdown import to_html
from tests.security.markup import Parsed


def page(text: str) -> str:
    return to_html(text, new_tab=True)


@pytest.mark.parametrize(
    ("text", "latex"),
    [
        (r"$$\int_0^1 x^2\,dx$$", r"\int_0^1 x^2\,dx"),
        ("$$\na = b\n$$", "a = b"),
        ("\\[\na\n= b_1*c*\n\\]", "a\n= b_1*c*"),
        (r"so \(a_b\) it", "a_b"),
        ("so $a*b*c$, it", "a*b*c"),
        ("so ($x$) it", "x"),
        (r"$\$5$", r"\$5"),
        ("設$x_1$為", "x_1"),
        ("> \\[\n> x_1*b*\n> \\]", "x_1*b*"),
        ("- a\n\n  $$\n  x_1*b*\n  $$", "x_1*b*"),
        ("text\n$$\nx\n$$\ntext", "x"),
        ("| a |\n|---|\n| $x_1$ |", "x_1"),
        ("```math\nx_1\n```", "x_1"),
        (r"**\(a\)** is `$b$`", "a"),
        (r"\(x\), and \(", "x"),
    ],
)
def test_formula_is_whole(text: str, latex: str) -> None:
    """As MathML on a page; in a room verbatim, with the attribute that clients display."""
    room = Parsed(to_html(text))
    formulas = [each for each in room.elements if "data-mx-maths" in each.attributes]
    assert [each.attributes["data-mx-maths"] for each in formulas] == [latex]
    assert "<em>" not in to_html(text)
    assert page(text).count("<math") == 1


@pytest.mark.parametrize(
    "text",
    [
        "It costs $5 and $10.",
        "Between $20-$30, US$5 or A$6",
        "$5 for one, 6$ for two",
        "$1,000 of them or 3k$.",
        r"\$x\$ and \$5$",
        "`$x$` and ``\\(a\\)``",
        "    $x$",
        "```\n$$x$$\n```",
        "$HOME/bin:$PATH",
        "$ a $",
        "an open $x, \\(y, \\[z and $$w",
        r"\[1\] and \[x\] and \[a\](b)",
        r"\\(a\\)",
        "$$$$ and $$ $$",
    ],
)
def test_what_is_no_formula_stays_text(text: str) -> None:
    assert "<math" not in page(text)
    assert "data-mx-maths" not in to_html(text)


@pytest.mark.parametrize("latex", [r"\frac{", r"\begin{x}", "^", "{" * 100, "x" * 5000, r"\sqrt["])
def test_latex_that_is_not_understood_is_shown_verbatim(latex: str) -> None:
    assert f"<code>{latex}</code>" in page(f"$${latex}$$")


def test_text_in_a_formula_is_text() -> None:
    assert "<mtext>a&lt;b</mtext>" in page(r"$\text{a<b}$")
    shown = Parsed(page(r"$\text{<img src=x onerror=y>} \href{javascript:a}{b}$"))
    assert not {"img", "a"} & shown.tags
    assert "href" not in shown.attributes


def test_tasks_are_boxes_on_a_page_and_signs_in_a_room() -> None:
    text = "- [ ] open\n- [x] done\n\n1. [X] counted\n   - [ ] nested\n- [y] none\n- [x]none"
    boxes = [each.attributes for each in Parsed(page(text)).elements if each.tag == "input"]
    assert [("checked" in each, each["aria-label"]) for each in boxes] == [
        (False, "Not done"),
        (True, "Done"),
        (True, "Done"),
        (False, "Not done"),
    ]
    assert all("disabled" in each for each in boxes)
    assert to_html(text).count("\u2610") == to_html(text).count("\u2611") == 2
    assert "[y] none" in page(text)
    assert "[x]none" in page(text)


def test_columns_are_aligned_without_a_style() -> None:
    text = "|a|b|c|d|\n|:-|:-:|-:|-|\n|1|2|3|4|"
    cells = [each for each in Parsed(page(text)).elements if each.tag == "td"]
    assert [each.attributes.get("align") for each in cells] == ["left", "center", "right", None]
    assert not Parsed(to_html(text)).attributes


@pytest.mark.parametrize(
    ("text", "addresses"),
    [
        ("See https://example.org/a_b_c?x=1&y.", ["https://example.org/a_b_c?x=1&y"]),
        ("(http://localhost:3000/x)", ["http://localhost:3000/x"]),
        ("**www.example.org/a**", ["https://www.example.org/a"]),
        (
            "<https://example.org>, ftp://example.org/f",
            ["https://example.org", "ftp://example.org/f"],
        ),
        ("main.py, a@example.org, @a:example.org, //example.org, xwww.a.org", []),
        ("`https://example.org` javascript:alert(1) file:///etc", []),
        ("[https://a.example](https://b.example)", ["https://b.example"]),
        ("![words *and*](https://example.org/x.png)", ["https://example.org/x.png"]),
        ("[![words](https://a.example/x.png)](https://b.example)", ["https://b.example"]),
        ("![](https://example.org/x.png)", ["https://example.org/x.png"]),
        ("![a](data:image/png;base64,AA) ![b](/x.png) ![c](javascript:x)", []),
    ],
)
def test_links(text: str, addresses: list[str]) -> None:
    for html in (page(text), to_html(text)):
        parsed = Parsed(html)
        links = [each.attributes["href"] for each in parsed.elements if each.tag == "a"]
        assert links == addresses
        assert "img" not in parsed.tags


def test_image_is_described_by_its_words() -> None:
    assert ">words and</a>" in to_html("![words *and*](https://example.org/x.png)")
    assert ">https://example.org/x</a>" in to_html("![](https://example.org/x)")
    assert "!" not in to_html("![words](https://example.org/x.png)")


def test_line_breaks_and_scripts_are_the_only_html() -> None:
    for html in (page, to_html):
        assert "<td>x<br>y<br></td>" in html("|a|\n|-|\n|x<br>y<BR />|").replace('align="left"', "")
        assert "H<sub>2</sub>O and x<sup>2</sup>" in html("H<sub>2</sub>O and x<SUP>2</SUP>")
        assert "&lt;b&gt;" in html("<b>b</b>")
        assert "&lt;sub onclick" in html("<sub onclick=x>a</sub>")
        # What is not closed ends with its paragraph.
        assert "</sub></p>\n<p>b" in html("a <sub>open\n\nb </sup>")
        assert "<code>&lt;br&gt;" in html("`<br>`")


class TestCode:
    def test_code_is_highlighted_on_a_page_only(self) -> None:
        text = "```python\ndef f(x):\n    return '<b>'  # why\n```"
        shown = page(text)
        assert '<pre data-language="python"><code class="language-python">' in shown
        assert '<span class="k">def</span>' in shown
        assert "&lt;b&gt;" in shown
        assert "<span" not in to_html(text)
        assert 'class="language-python"' in to_html(text)

    @pytest.mark.parametrize("language", ["", "nosuchthing", "a b", "x&#32;fixed", "../x"])
    def test_code_in_other_languages_is_plain(self, language: str) -> None:
        shown = page(f"```{language}\nif x < 1:\n```")
        assert "if x &lt; 1:" in shown
        assert "<span" not in shown

    def test_no_line_of_code_is_lost(self) -> None:
        code = "\n\n  x = 1\n\n\n"
        shown = Parsed(page(f"```python\n{code}```"))
        text = "".join(word for each in shown.elements for word in each.words)
        assert text.count("\n") == code.count("\n")

    def test_long_code_is_plain(self) -> None:
        assert highlighted("x = 1\n" * 10_000, "python") is None
        assert highlighted("x" * 10_000, "python") is None
        assert "<span" in page("```python\n" + "x = 1\n" * 500 + "```")


def test_a_long_answer_is_rendered_up_to_its_limit() -> None:
    paragraphs = "**bold**\n\n" * 6_000
    shown = page(paragraphs)
    assert shown.count("<strong>") > 4_000 or shown.startswith("<pre>")
    long = "**start**\n\n" + "```\n" + "code\n" * 40_000
    shown = page(long)
    assert shown.startswith("<p><strong>start</strong></p>\n<pre>```\ncode\n")
    assert shown.count("code") == 40_000


@pytest.mark.parametrize(
    "text",
    ["$x$ " * 250_000, "```js\n" + "f(x)\n" * 200_000, "\\[" * 500_000, "http://a.b " * 90_000],
)
def test_a_megabyte_is_rendered_in_bounded_time(text: str) -> None:
    began = time.process_time()
    page(text)
    assert time.process_time() - began < 3
