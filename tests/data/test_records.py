"""Random access to records: the same as reading the file whole, whatever its layout and however it is cut."""

import csv
import io
import json
import pickle
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxmllm.data.fields import RecordError
from jaxmllm.data.json_records import json_list, json_members
from jaxmllm.data.records import json_lines
from jaxmllm.data.tsv_records import tsv_rows
from jaxmllm.errors import InputError

few = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
numbers = st.integers(-(10**20), 10**20) | st.floats(allow_nan=False) | st.sampled_from([0, 1.5e300, -1e-9])
values = st.recursive(
    st.none() | st.booleans() | numbers | text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4),
    max_leaves=8,
)
layouts = st.fixed_dictionaries(
    {"indent": st.sampled_from([None, 0, 1, "\t"]), "ensure_ascii": st.booleans()},
    optional={"separators": st.sampled_from([(",", ":"), (" ,\r\n", " :\t")])},
)
chunks = st.sampled_from([1, 2, 7, 64, 1 << 20])


@pytest.fixture
def write(tmp_path):
    def write_bytes(content, name="a.json"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write_bytes


def everything(records):
    return [records[number] for number in range(len(records))]


@few
@given(st.lists(values, max_size=6), layouts, chunks, st.sampled_from(["", " \n", "\ufeff"]))
def test_a_list_is_read_as_json_reads_it(write, entries, layout, chunk, before):
    path = write(before + json.dumps(entries, **layout) + "\n ")
    assert everything(json_list(path, chunk=chunk)) == entries


@few
@given(st.dictionaries(text, values, max_size=5), st.lists(values, max_size=6), layouts, chunks, st.randoms())
def test_a_list_under_a_key_is_read_with_what_is_around_it(write, others, entries, layout, chunk, random):
    members = list({**others, "data": entries}.items())
    random.shuffle(members)
    records = json_list(write(json.dumps(dict(members), **layout)), "data", chunk=chunk)
    assert everything(records) == entries
    others.pop("data", None)
    assert records.header == {name: value for name, value in others.items() if not isinstance(value, list)}


@few
@given(st.dictionaries(text, values, max_size=6), layouts, chunks)
def test_members_are_read_as_json_reads_them(write, members, layout, chunk):
    assert dict(everything(json_members(write(json.dumps(members, **layout)), chunk=chunk))) == members


@few
@given(st.lists(values, max_size=6), st.sampled_from(["\n", "\r\n", "\n \n"]), st.booleans())
def test_lines_are_read_as_json_reads_them(write, entries, end, last):
    content = end.join(json.dumps(entry, ensure_ascii=False) for entry in entries) + (end if last else "")
    assert everything(json_lines(write(content))) == entries


cells = st.text(st.sampled_from("ab\"\t\n\r é漢 '\\,"), max_size=6)


@few
@given(
    st.lists(st.tuples(cells, cells, cells), max_size=6),
    chunks,
    # with "\n" for an end the csv module leaves "\r" without quotation marks, and then it ends a row
    st.sampled_from([("\n", csv.QUOTE_ALL), ("\r\n", csv.QUOTE_ALL), ("\r\n", csv.QUOTE_MINIMAL)]),
    st.booleans(),
)
def test_rows_are_read_as_they_were_written(write, rows, chunk, form, last):
    file, (end, quoting) = io.StringIO(), form
    csv.writer(file, delimiter="\t", lineterminator=end, quoting=quoting).writerows([("x", "y", "ü"), *rows])
    content = file.getvalue() if last else file.getvalue().removesuffix(end)
    expected = [dict(zip(("x", "y", "ü"), row, strict=True)) for row in rows]
    assert everything(tsv_rows(write(content), chunk=chunk)) == expected


@few
@given(st.text(st.sampled_from('ab"\t\nc'), max_size=30), chunks)
def test_any_table_is_read_as_the_csv_module_reads_it(write, body, chunk):
    if body.count('"') % 2:
        body += '"'
    path = write("x\ty\tz\n" + body)
    rows = [row for row in csv.reader(io.StringIO(body, newline=""), delimiter="\t") if row]
    try:
        read = everything(tsv_rows(path, chunk=chunk))
    except InputError as error:
        assert any(len(row) > 3 for row in rows) or "is never closed" in str(error)
        return
    expected = [dict(zip("xyz", [*row, "", "", ""][:3], strict=True)) for row in rows]
    assert read == expected


def test_what_pandas_takes_for_missing_is_text(write):
    path = write('index\tA\tB\n1\tNone\tNA\n2\t\t""\n3\tnan\n\n   \n4\t1.0\t01\n')
    assert everything(tsv_rows(path)) == [
        {"index": "1", "A": "None", "B": "NA"},
        {"index": "2", "A": "", "B": ""},
        {"index": "3", "A": "nan", "B": ""},
        {"index": "4", "A": "1.0", "B": "01"},
    ]


def test_places_are_lines_and_numbers_where_records_share_one(write):
    one_line = json_list(write("[1, 2,\n3]"))
    assert [one_line.place(number).where.split(", ", 1)[1] for number in range(3)] == [
        "record 1, line 1", "record 2, line 1", "line 2",
    ]  # fmt: skip
    assert [one_line.place(number).line for number in range(3)] == [1, 1, 2]
    pretty = json_list(write(json.dumps({"data": [{"a": 1}, {"a": 2}]}, indent=2)), "data", chunk=3)
    assert [pretty.place(number).line for number in range(2)] == [3, 6]
    table = tsv_rows(write('x\ty\n"a\nb"\tc\n\nd\te\n'), chunk=2)
    assert [table.place(number).line for number in range(2)] == [2, 5]
    lines = json_lines(write("\n1\n\n2\n"))
    assert [lines.place(number).line for number in range(2)] == [2, 4]


def test_records_can_be_pickled(write):
    for records in (
        json_list(write("[1, 2]")),
        json_members(write('{"a": 1}', "b.json")),
        tsv_rows(write("a\tb\nc\td", "c")),
    ):
        assert everything(pickle.loads(pickle.dumps(records))) == everything(records)


def test_memory_is_bounded_by_chunk_and_record(write):
    path = write(json.dumps({"data": [{"text": "x" * 1000, "number": number} for number in range(5000)]}))
    tracemalloc.start()
    records = json_list(path, "data", chunk=1 << 14)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(records) == 5000
    assert peak < path.stat().st_size / 4


FAULTS = {
    "cut off in a record": ('{"data": [{"a": 1},\n {"a": 2', "line 2", "cut off"),
    "cut off in a text": ('{"data": [{"a": 1},\n {"a": "bcd', "line 2", "cut off"),
    "cut off between records": ('{"data": [{"a": 1},\n', "line 2", "cut off"),
    "cut off behind a record": ('{"data": [{"a": 1}\n', "line 2", "cut off"),
    "cut off behind the list": ('{"data": [{"a": 1}]\n', "line 2", "cut off"),
    "cut off before the list": ('{"data":', "line 1", "cut off"),
    "no comma": ('{"data": [{"a": 1}\n {"a": 2}]}', "line 2", "',' or ']'"),
    "a comma too many": ('{"data": [{"a": 1},\n]}', "line 2", "Expecting value"),
    "a colon too few": ('{"data"\n[]}', "line 2", "expected a colon behind a key"),
    "key without marks": ("{data: []}", "line 1", "expected a key in quotation marks"),
    "single quotes": ("{'data': []}", "line 1", "expected a key in quotation marks"),
    "malformed record": ('{"data": [\n{"a": 1}, {"a" 2}]}', "line 2", "Expecting ':' delimiter"),
    "line break in a text": ('{"data": [\n"a\nb"]}', "line 2", "Invalid control character"),
    "something behind": ('{"data": []}\n{}', "line 2", "something follows the document"),
    "a list at the top": ("[1, 2]", "line 1", "expected an object with a list under 'data'"),
    "no list under the key": ('{"data": {}}', "line 1", "expected a list under 'data'"),
    "twice": ('{"data": [], "data": []}', "line 1", "is there twice"),
    "too deep": ('{"data": [' + "[" * 100_000, "line 1", "not valid JSON"),
    "too long a number": ('{"data": [' + "1" * 5000 + "]}", "line 1", "not valid JSON"),
    "empty": ("", "line 1", "the file ends"),
    "no text at all": ("<html>\n</html>", "line 1", "expected an object with a list under 'data', found '<'"),
}  # fmt: skip


@pytest.mark.parametrize("chunk", [1, 1 << 20])
@pytest.mark.parametrize("fault", FAULTS)
def test_malformed_documents_are_named_with_file_and_line(write, fault, chunk):
    content, line, problem = FAULTS[fault]
    if chunk == 1 and len(content) > 1000:
        chunk = 1000
    path = write(content)
    with pytest.raises(InputError) as error:
        json_list(path, "data", chunk=chunk)
    assert str(error.value).startswith(f"{path}, {line}: not valid JSON")
    assert problem in str(error.value)


def test_a_fault_early_in_a_file_is_found_without_reading_the_rest(write):
    path = write('[{"a" 1}, ' + '{"a": 1}, ' * 100_000 + "{}]")
    tracemalloc.start()
    with pytest.raises(InputError, match="delimiter"):
        json_list(path, chunk=1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < path.stat().st_size / 4


def test_documents_without_the_list_are_told_what_they_hold(write):
    path = write('{"info": {}, "annotations": []}')
    with pytest.raises(InputError, match=r"a\.json: holds no 'questions'; .* found info, annotations"):
        json_list(path, "questions")
    with pytest.raises(InputError, match="expected a list at the top level"):
        json_list(path)
    with pytest.raises(InputError, match="expected an object at the top level"):
        json_members(write("[]"))


ENCODINGS = {
    "gzip": (b"\x1f\x8b\x08\x00abc", "a gzip archive; unpack it"),
    "zip": (b"PK\x03\x04abc", "a zip archive; unzip it"),
    "utf-16": ('{"data": []}'.encode("utf-16"), "UTF-16; save it as UTF-8"),
    "utf-16 without a mark": ('{"data": []}'.encode("utf-16-le"), "a binary file, or text in UTF-16"),
    "binary": (b"abc\0def", "a binary file"),
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "a Git LFS pointer"),
}


@pytest.mark.parametrize("read", [json_list, json_members, json_lines, tsv_rows])
@pytest.mark.parametrize("kind", ENCODINGS)
def test_files_that_are_no_utf8_text_are_named_for_what_they_are(write, kind, read):
    content, problem = ENCODINGS[kind]
    path = write(content)
    with pytest.raises(InputError, match=problem) as error:
        read(path)
    assert str(error.value).startswith(f"{path}: cannot be read as text")


@pytest.mark.parametrize("read", [json_list, json_members, json_lines, tsv_rows])
def test_missing_files_and_folders_are_refused(tmp_path, read):
    with pytest.raises(InputError, match="no such file"):
        read(tmp_path / "nowhere.json")
    with pytest.raises(InputError, match="cannot be read as text"):
        read(tmp_path)


def test_a_record_in_another_encoding_is_a_bad_record_of_its_own(write):
    latin = '[{"a": "ok"},\n {"a": "é"}]'.encode("latin-1")
    records = json_list(write(latin))
    assert records[0] == {"a": "ok"}
    with pytest.raises(RecordError, match=r"line 2: not UTF-8 text .* save the file as UTF-8"):
        records[1]
    rows = tsv_rows(write("a\tb\nx\té\n".encode("latin-1")))
    with pytest.raises(RecordError, match="line 2: not UTF-8 text"):
        rows[0]
    with pytest.raises(InputError, match="line 1: not UTF-8 text"):
        tsv_rows(write("é\tb\n".encode("latin-1")))


def test_half_a_character_is_a_bad_record_of_its_own(write):
    content = r'["\ud83d\ude00", "\\ud83d",' + "\n" + r'{"a": ["\uD83D"]}]'
    records = json_list(write(content))
    assert (records[0], records[1]) == ("😀", r"\ud83d")
    with pytest.raises(RecordError, match=r"line 2: a text in it holds half of a surrogate pair"):
        records[2]


def test_a_malformed_line_is_a_bad_record_of_its_own(write):
    records = json_lines(write('{"a": 1}\n{"a": \n[[1]]\n'))
    assert (records[0], records[2]) == ({"a": 1}, [[1]])
    with pytest.raises(RecordError, match="line 2: not valid JSON"):
        records[1]
    deep = json_lines(write("[" * 100_000))
    with pytest.raises(RecordError, match="nested too deeply"):
        deep[0]


@pytest.mark.parametrize(
    "content, problem",
    [
        ('a\tb\n1\t"2\n3\n', r"line 2: a quotation mark opens a cell of this row and is never closed"),
        ('a\tb\n1\t2\n\n"', r"line 4: a quotation mark opens"),
        ("", "empty; expected a header row"),
        ("\n \n", "empty; expected a header row"),
        ("a\tb\ta\n", "line 1: the column 'a' is there twice"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("chunk", [1, 1 << 20])
def test_malformed_tables_are_refused(write, content, problem, chunk):
    with pytest.raises(InputError, match=problem):
        tsv_rows(write(content), chunk=chunk)


def test_a_row_with_too_many_cells_is_a_bad_record_of_its_own(write):
    rows = tsv_rows(write("a\tb\n1\t2\t3\n4\t5\n"))
    with pytest.raises(RecordError, match="line 2: the row has 3 cells; the header names 2 columns"):
        rows[0]
    assert rows[1] == {"a": "4", "b": "5"}
