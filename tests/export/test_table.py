"""Tables for people: what fits stands in one line, what does not goes on below, nothing is lost."""

import pytest

from llmexport.export.cli.table import cells, narrowed, table, wrap

ROWS = [("llama", "a decoder"), ("bert", "an encoder: no cache")]


def test_columns_stand_below_their_names() -> None:
    drawn = table("models", ("arch", "what"), ROWS, 100)
    assert drawn.splitlines() == [
        "models",
        "arch    what",
        "────────────────────────────",
        "llama   a decoder",
        "bert    an encoder: no cache",
    ]


def test_a_table_without_columns_has_no_header() -> None:
    assert table("models", (), ROWS[:1], 100) == "models\nllama   a decoder\n"


def test_a_table_without_rows_is_its_header() -> None:
    assert table("models", ("arch",), [], 100) == "models\narch\n────\n"
    assert table("models", (), [], 100) == "models\n"


def test_title_and_header_alone_are_bold() -> None:
    lines = table("models", ("arch", "what"), ROWS, 100, bold=True).splitlines()
    assert [line.startswith("\x1b[1m") and line.endswith("\x1b[0m") for line in lines] == [True, True] + [False] * 3


def test_what_is_too_long_goes_on_in_its_column() -> None:
    lines = table("models", (), ROWS, 20).splitlines()[1:]
    assert lines == ["llama   a decoder", "bert    an encoder:", "        no cache"]


@pytest.mark.parametrize("width", [9, 17, 40])
@pytest.mark.parametrize("text", ["", "one two three", "/a/path/without/any/space and more", "写 模型 漢字漢字漢字"])
def test_nothing_is_lost_and_nothing_too_wide(text: str, width: int) -> None:
    lines = table("t", ("name", "text"), [("x", text)], width).splitlines()[1:]
    assert max(map(cells, lines)) <= width
    told = "".join(line.removeprefix("x") for line in lines[2:] if "─" not in line)
    assert told.replace(" ", "").endswith(text.replace(" ", ""))


def test_wide_characters_take_two_cells_and_accents_none() -> None:
    assert [cells(t) for t in ("ab", "漢字", "e\N{COMBINING ACUTE ACCENT}")] == [2, 4, 1]
    assert wrap("漢字漢字", 5) == ["漢字", "漢字"]


def test_the_widest_columns_are_cut_to_equal_widths() -> None:
    assert narrowed([3, 40, 50], 43) == [3, 20, 20]
    assert narrowed([3, 4], 43) == [3, 4]
    assert narrowed([8, 8], 1) == [1, 1]
