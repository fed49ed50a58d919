"""Bad data: each fault is named with its file and line, or left out and listed."""

import base64
import csv
import json
import re

import pytest

from jaxmllm.data.benchmarks import benchmark_named
from jaxmllm.errors import InputError
from tests.support.benchmarks import write_benchmark, write_rows

# name -> question file, key of its list (None: the document is the list), field of the id
FILES = {
    "vqav2": ("v2_OpenEnded_mscoco_val2014_questions.json", "questions", "question_id"),
    "okvqa": ("OpenEnded_mscoco_val2014_questions.json", "questions", "question_id"),
    "vizwiz": ("val.json", None, "image"),
    "textvqa": ("TextVQA_0.5.1_val.json", "data", "question_id"),
    "textvqa-ocr": ("TextVQA_0.5.1_val.json", "data", "question_id"),
    "docvqa": ("val_v1.0_withQT.json", "data", "questionId"),
    "pope": ("coco_pope_random.json", "lines", "question_id"),
    "llava": ("questions.jsonl", "lines", "question_id"),
    "gqa": ("testdev_balanced_questions.json", "members", None),
    "mmbench": ("MMBench_DEV_EN.tsv", "rows", "index"),
}
ANNOTATIONS = {"vqav2": "v2_mscoco_val2014_annotations.json", "okvqa": "mscoco_val2014_annotations.json"}


class Edited:
    """A question file whose records can be changed."""

    def __init__(self, path, key):
        self.path, self.key = path, key
        text = path.read_text(encoding="utf-8")
        if key == "lines":
            self.records = [json.loads(line) for line in text.splitlines()]
        elif key == "rows":
            with path.open(encoding="utf-8", newline="") as file:
                self.records = list(csv.DictReader(file, dialect="excel-tab"))
        else:
            self.document = json.loads(text)
            inside = self.document if key in (None, "members") else self.document[key]
            self.records = list(inside.values()) if key == "members" else inside

    def save(self):
        if self.key == "lines":
            text = "".join(json.dumps(record) + "\n" for record in self.records)
            self.path.write_text(text, encoding="utf-8")
        elif self.key == "rows":
            write_rows(self.path, self.records)
        else:
            self.path.write_text(json.dumps(self.document, indent=1), encoding="utf-8")


@pytest.fixture
def edit(tmp_path):
    """Writes a benchmark and opens one of its files for changes."""

    def write(name, annotations=False):
        write_benchmark(name, tmp_path)
        return (
            Edited(tmp_path / ANNOTATIONS[name], "annotations")
            if annotations
            else Edited(tmp_path / FILES[name][0], FILES[name][1])
        )

    return write


def refused(name, folder, problem, line=True, left=None):
    """The fault is an error; where bad data is skipped, it is listed, and the other questions are there."""
    benchmark = benchmark_named(name)
    whole = {"mmbench": 16, "pope": 12}.get(name, 4)
    with pytest.raises(InputError, match=problem) as error:
        benchmark.open(folder)
    message = str(error.value)
    assert str(folder) in message
    assert not line or re.search(r", line \d+: ", message)
    source = benchmark.open(folder, skip_bad=True)
    assert len(source) == (whole - 1 if left is None else left)
    assert f"{source.skipped[0].where}: {source.skipped[0].problem}" == message
    return source


TEXT_FIELDS = {
    "vqav2": ("question",),
    "okvqa": ("question",),
    "vizwiz": ("image", "question"),
    "textvqa": ("question", "image_id"),
    "docvqa": ("question", "image"),
    "pope": ("text", "image"),
    "llava": ("text", "image"),
    "gqa": ("question", "imageId"),
    "mmbench": ("question",),
}


@pytest.mark.parametrize(
    "name, field, value",
    [
        (name, field, value)
        for name, fields in TEXT_FIELDS.items()
        for field in fields
        # a table holds nothing but text
        for value in ([None, ""] if name == "mmbench" else [None, "", " \n", 7, ["a"]])
    ],
)
def test_missing_empty_and_mistyped_texts(edit, tmp_path, name, field, value):
    file = edit(name)
    if value is None:
        del file.records[1][field]
    else:
        file.records[1][field] = value
    file.save()
    source = refused(name, tmp_path, f"field '{field}' is ")
    assert len(source.skipped) == 1


@pytest.mark.parametrize("value", [None, "12", 1.5, True])
@pytest.mark.parametrize("name", ["vqav2", "okvqa", "textvqa", "docvqa", "pope"])
def test_missing_and_mistyped_numbers(edit, tmp_path, name, value):
    file = edit(name)
    file.records[1][FILES[name][2]] = value
    file.save()
    source = refused(name, tmp_path, f"field '{FILES[name][2]}' is {value!r}; expected a whole number")
    if name in ANNOTATIONS:
        assert "annotation of a question that is not in" in source.skipped[1].problem


@pytest.mark.parametrize("name", FILES)
def test_doubled_ids_are_named_with_both_lines(edit, tmp_path, name):
    if name == "gqa":
        write_benchmark("gqa", tmp_path)
        path = tmp_path / FILES["gqa"][0]
        path.write_text(path.read_text().replace('"00020132"', '\n"00020131"'))
        refused(name, tmp_path, r"line 2: question_id 00020131 is there twice, first at .*, line 1")
        return
    file = edit(name)
    file.records[1][FILES[name][2]] = file.records[0][FILES[name][2]]
    file.save()
    if name == "mmbench":  # what refers to the doubled row's image loses it besides
        with pytest.raises(InputError, match=r"line \d+: question_id 241 is there twice, first at .*, line 2"):
            benchmark_named(name).open(tmp_path)
    else:
        refused(name, tmp_path, r"line \d+: question_id .* is there twice, first at .*, line \d+")


@pytest.mark.parametrize("name", [name for name in FILES if name != "mmbench"])
def test_missing_images(tmp_path, name):
    write_benchmark(name, tmp_path)
    images = sorted(path for path in tmp_path.rglob("*") if path.suffix in (".jpg", ".png"))
    images[-1].unlink()
    left = {"vizwiz": 3, "pope": 6}.get(name, 2)
    refused(name, tmp_path, f"no image .*{re.escape(images[-1].name)}", left=left)


@pytest.mark.parametrize("name", ["vqav2", "okvqa", "vizwiz", "textvqa"])
@pytest.mark.parametrize("fault", ["nine", "eleven", "none", "text", "number inside"])
def test_answers_must_be_ten(edit, tmp_path, name, fault):
    file = edit(name, annotations=name in ANNOTATIONS)
    answers = file.records[1]["answers"]
    file.records[1]["answers"] = {
        "nine": answers[:9],
        "eleven": [*answers, answers[0]],
        "none": [],
        "text": "red",
        "number inside": [*answers[:9], 3],
    }[fault]
    file.save()
    problem = {"nine": "holds 9 entries; expected exactly 10", "eleven": "holds 11 entries", "none": "holds 0 entries"}
    refused(name, tmp_path, problem.get(fault, "expected"))


@pytest.mark.parametrize("name", ANNOTATIONS)
def test_questions_without_annotations_and_the_other_way_round(edit, tmp_path, name):
    file = edit(name, annotations=True)
    lost = file.records.pop(1)
    file.save()
    refused(name, tmp_path, r"question_id 42001 has no annotation in .*annotations\.json")
    file.records.insert(1, lost)
    file.save()
    questions = Edited(tmp_path / FILES[name][0], "questions")
    questions.records.pop(1)
    questions.save()
    refused(name, tmp_path, r"annotations\.json, line \d+: annotation of a question that is not in")
    assert benchmark_named(name).open(tmp_path, limit=2).skipped == (), "only as far as the limit"


@pytest.mark.parametrize("name", ANNOTATIONS)
def test_doubled_and_mismatched_annotations(edit, tmp_path, name):
    file = edit(name, annotations=True)
    file.records.append(file.records[0])
    file.save()
    refused(name, tmp_path, r"annotations\.json, line \d+: id 42000 is there twice, first at .*, line \d+", left=4)
    file.records.pop()
    file.records[0]["image_id"] = 9
    file.save()
    refused(name, tmp_path, "image_id 9; its question has 42")


@pytest.mark.parametrize("name", [name for name in FILES if name != "mmbench"])
def test_a_file_that_is_cut_off(tmp_path, name):
    write_benchmark(name, tmp_path)
    path = tmp_path / FILES[name][0]
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(InputError, match=rf"{re.escape(path.name)}, line \d+: not valid JSON"):
        benchmark_named(name).open(tmp_path)
    if FILES[name][1] != "lines":
        with pytest.raises(InputError, match="cut off"):
            benchmark_named(name).open(tmp_path, skip_bad=True)


def test_a_malformed_line_can_be_skipped(tmp_path):
    write_benchmark("llava", tmp_path)
    path = tmp_path / "questions.jsonl"
    path.write_text(path.read_text() + "{\n")
    refused("llava", tmp_path, r"line 5: not valid JSON", left=4)


def test_labels_and_types(edit, tmp_path):
    file = edit("pope")
    file.records[1]["label"] = "maybe"
    file.save()
    refused("pope", tmp_path, "field 'label' is 'maybe'; expected 'yes' or 'no'")
    file = edit("gqa")
    file.records[1]["types"] = "query"
    file.save()
    refused("gqa", tmp_path, "field 'types' is 'query'; expected an object")
    file = edit("docvqa")
    file.records[1]["answers"] = []
    file.save()
    refused("docvqa", tmp_path, "field 'answers' holds no entries; expected at least one")
    file = edit("llava")
    file.records[1]["boxes"] = [[1, 2, 1, 4]]
    file.save()
    refused("llava", tmp_path, r"field 'boxes': \[1.0, 2.0, 1.0, 4.0\] is not a box")


def test_records_that_are_no_objects(edit, tmp_path):
    for name in ("vizwiz", "textvqa", "docvqa", "pope", "llava"):
        file = edit(name)
        file.records[1] = [1, 2]
        file.save()
        refused(name, tmp_path, "expected a JSON object, found list")


NOT_AN_IMAGE = base64.b64encode(b"these are seventy bytes of a text that is no image at all, whoever reads it").decode()
BAD_CELLS = {
    "no base64": ("*" * 80, "is not base64"),
    "cut off": ("A" * 81, "is not base64"),
    "no image": (NOT_AN_IMAGE, "is base64, but not of an image"),
    "no such row": ("999", "field 'image' is '999'; expected base64, or the index of a row that has it"),
    "empty": ("", "field 'image' is ''"),
    "short": ("AAAA", "field 'image' is 'AAAA'"),
}


@pytest.mark.parametrize("fault", BAD_CELLS)
def test_images_in_a_table(edit, tmp_path, fault):
    file = edit("mmbench")
    file.records[-1]["image"], problem = BAD_CELLS[fault]
    file.save()
    refused("mmbench", tmp_path, problem)


@pytest.mark.parametrize(
    "field, value, problem",
    [
        ("index", "x1", "field 'index' is 'x1'; expected a whole number"),
        ("index", "", "field 'index' is ''"),
        ("answer", "E", "field 'answer' is 'E'; expected one of A, B, C, D"),
        ("answer", "a", "field 'answer' is 'a'"),
        ("index", "9" * 5000, "field 'index' is '999"),
        ("A", "", "field 'A' is ''; expected the text of an option"),
    ],
)
def test_cells_of_a_table(edit, tmp_path, field, value, problem):
    file = edit("mmbench")
    file.records[-1][field] = value
    file.save()
    refused("mmbench", tmp_path, problem)


def test_a_table_without_its_columns(tmp_path):
    (tmp_path / "a.tsv").write_text("index\tquestion\timage\n1\twhat\tx\n")
    with pytest.raises(InputError, match=r"a\.tsv: holds no column A; found index, question, image"):
        benchmark_named("mmbench").open(tmp_path)
    (tmp_path / "a.tsv").write_text("index\tquestion\tA\tB\n1\twhat\tx\ty\n")
    with pytest.raises(InputError, match="holds no column image or image_path"):
        benchmark_named("mmbench").open(tmp_path)
    (tmp_path / "a.tsv").write_text('index\tquestion\tA\tB\timage\n1\t"what\tx\ty\n')
    with pytest.raises(InputError, match=r"a\.tsv, line 2: a quotation mark"):
        benchmark_named("mmbench").open(tmp_path)


def test_ocr_tokens(edit, tmp_path):
    edit("textvqa-ocr")
    ocr = Edited(tmp_path / "TextVQA_Rosetta_OCR_v0.2_val.json", "data")
    lost = ocr.records.pop()
    ocr.save()
    refused("textvqa-ocr", tmp_path, "image_id 003a8ae2ef43b901 has no OCR tokens in", left=2)
    ocr.records.append({**lost, "ocr_tokens": ["a", 3]})
    ocr.save()
    refused("textvqa-ocr", tmp_path, r"Rosetta.*field 'ocr_tokens' is \['a', 3\]; expected a list of texts", left=2)
    (tmp_path / "TextVQA_Rosetta_OCR_v0.2_val.json").unlink()
    with pytest.raises(InputError, match=r"holds no TextVQA_Rosetta_OCR_v0\.2_val\.json or llava_textvqa"):
        benchmark_named("textvqa-ocr").open(tmp_path)
    assert len(benchmark_named("textvqa").open(tmp_path)) == 4


def test_limit_counts_good_questions(edit, tmp_path):
    file = edit("vizwiz")
    file.records[0]["question"] = ""
    file.save()
    source = benchmark_named("vizwiz").open(tmp_path, limit=2, skip_bad=True)
    assert [source[index].question_id[-5] for index in range(2)] == ["1", "2"]
    assert len(source.skipped) == 1
