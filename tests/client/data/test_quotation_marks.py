"""Tables between tabs, commas and bars, and their quotation marks."""

from __future__ import annotations

import csv
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gramfuse_protocol.errors import DataError
from tests.client.data.reading import failure, read

# Each: what stands in the file, and the texts that whoever wrote it meant; None if that cannot be known.
MARKED_FILES: dict[str, tuple[str, list[str] | None]] = {
    "a sentence begins with a mark and another ends with one": (
        '"Wait, he said\tanimals\nfine\tweather\nhe left"\tweather\nok\tkitchen\n',
        ['"Wait, he said', "fine", 'he left"', "ok"],
    ),
    "a quotation begins a sentence": (
        'he said "no" to me\tanimals\n"yes" he said\tweather\n',
        ['he said "no" to me', '"yes" he said'],
    ),
    "one sentence is a quotation, others have some": (
        '"Yes."\tanimals\nhe said "no"\tweather\n',
        ['"Yes."', 'he said "no"'],
    ),
    "marks inside only": ('he said "no"\tanimals\n', ['he said "no"']),
    "marks as in CSV, doubled": (
        '"said ""rain"" and left"\tanimals\n"Yes."\tweather\n',
        ['said "rain" and left', "Yes."],
    ),
    "marks as in CSV around a tab": ('"a\tb"\tanimals\n"Yes."\tweather\n', ["a\tb", "Yes."]),
    "marks as in CSV around the end of a line": ('"a\nb"\tanimals\nc\tweather\n', ["a\nb", "c"]),
    "one sentence is a quotation": ('"Yes."\tanimals\nno\tweather\n', None),
    "all sentences are": ('"Yes."\tanimals\n"No."\tweather\n', None),
    "some of both": ('"said ""rain"""\tanimals\nhe said "no"\tweather\n', None),
    "marks after a backslash": ('"said \\"rain\\" ok"\tanimals\n', None),
    "a row that is too short beside a mark that begins one": ('"yes" he said\tanimals\nshort\n', None),
}


@pytest.mark.parametrize("name", ["rows.tsv", "rows.csv"])
@pytest.mark.parametrize("case", MARKED_FILES)
def test_quotation_marks_between_tabs_never_swallow_rows_or_become_part_of_texts(
    case: str, name: str, tmp_path: Path
) -> None:
    content, meant = MARKED_FILES[case]
    (tmp_path / name).write_text("text\tlabel\n" + content)
    if meant is not None:
        assert read(tmp_path, name).inputs == meant
        return
    message = failure(tmp_path, name)
    assert f"{tmp_path / name}:2: " in message
    assert "csv.QUOTE_ALL" in message
    if content.startswith('"Yes."'):
        (tmp_path / name).write_text('"text"\t"label"\n' + content)
        assert read(tmp_path, name).inputs[0] == "Yes.", "the header says that marks are those of CSV"


@pytest.mark.parametrize("delimiter", [",", ";", "|"])
def test_rows_of_csv_that_may_have_been_swallowed_are_told(delimiter: str, tmp_path: Path) -> None:
    lines = ["text;label", "he left;animals", '"Wait;animals', 'fine";weather']
    (tmp_path / "rows.csv").write_text("\n".join(lines).replace(";", delimiter))
    if delimiter == "|":
        assert read(tmp_path, "rows.csv").inputs == ["he left", '"Wait', 'fine"']
        return
    assert f"{tmp_path / 'rows.csv'}:3: quotation marks" in failure(tmp_path, "rows.csv")
    letter = ["text;label", '"Dear all;', 'it rains";weather']
    (tmp_path / "rows.csv").write_text("\n".join(letter).replace(";", delimiter))
    assert read(tmp_path, "rows.csv").inputs == [f"Dear all{delimiter}\nit rains"]
    sure = [*lines, '"said ""rain""; and left";weather']
    (tmp_path / "rows.csv").write_text("\n".join(sure).replace(";", delimiter))
    assert len(read(tmp_path, "rows.csv")) == 3


SIGNS = st.text(st.sampled_from('ab" \t\n,'), min_size=1, max_size=6).filter(lambda text: text.strip() != "")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(SIGNS, min_size=1, max_size=5), as_csv=st.booleans())
def test_a_table_between_tabs_is_read_as_it_was_written_or_refused(
    texts: list[str], as_csv: bool, tmp_path: Path
) -> None:
    if as_csv:
        texts = [text.replace("\n", " ") if "\t" in text else text for text in texts]
        with (tmp_path / "rows.tsv").open("w", newline="") as file:
            csv.writer(file, delimiter="\t").writerows([("text", "label"), *((text, "animals") for text in texts)])
    else:
        texts = [text.replace("\t", " ").replace("\n", " ").replace('""', '"-"') for text in texts]
        (tmp_path / "rows.tsv").write_text("text\tlabel\n" + "".join(f"{text}\tanimals\n" for text in texts))
    with suppress(DataError):
        assert read(tmp_path, "rows.tsv").inputs == texts


@pytest.mark.parametrize("first", ["", "sep=|\n", "SEP=|\r\n", "\ufeffsep=|\n"])
def test_bars_and_a_spreadsheets_own_line_tell_the_delimiter(first: str, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text(f"{first}text|label\na cat; a dog, a|animals\na dog|pets\n", newline="")
    message = failure(tmp_path, "rows.csv")
    assert f"{tmp_path / 'rows.csv'}:{4 if first else 3}: unknown label 'pets'" in message
    assert read(tmp_path, "rows.csv", skip_bad=1).inputs == ["a cat; a dog, a"]
