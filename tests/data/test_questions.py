"""Question files: what is read, and every fault with the line it is on."""

import json
from pathlib import Path

import pytest

from jaxmllm.data.questions import Question, read_questions
from jaxmllm.errors import InputError

GOOD = {"image": "a.png", "text": "what is it ?", "answer": "red"}


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    (folder / "deep").mkdir(parents=True)
    for name in ("a.png", "b.png", "deep/c.png"):
        (folder / name).write_bytes(b"only the name is looked at")
    return folder


@pytest.fixture
def write(tmp_path):
    def write_lines(*lines) -> Path:
        path = tmp_path / "questions.jsonl"
        text = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
        path.write_text("\n".join(text) + "\n", encoding="utf-8")
        return path

    return write_lines


def test_questions_are_read_with_all_their_fields(write, images):
    path = write(
        {"question_id": 7, "image": "a.png", "text": "what colour ?", "category": "colour", "answer": " red\n",
         "boxes": [[10, 20, 30.5, 40]], "objects": [[10, 20, 30, 40], [50, 9, 70, 30]]},
        {"question_id": "x-1", **GOOD, "image": "deep/c.png", "boxes": [], "note": "fields of other tools are let be"},
    )  # fmt: skip
    assert read_questions(path, images) == [
        Question(
            "7",
            images / "a.png",
            "what colour ?",
            "colour",
            "red",
            ((10.0, 20.0, 30.5, 40.0),),
            ((10.0, 20.0, 30.0, 40.0), (50.0, 9.0, 70.0, 30.0)),
        ),
        Question("x-1", images / "deep/c.png", "what is it ?", "all", "red", (), None),
    ]


def test_paths_may_be_text(write, images):
    assert len(read_questions(str(write(GOOD)), str(images))) == 1


def test_id_and_category_may_be_left_out(write, images):
    questions = read_questions(write(GOOD, "", "   ", GOOD), images)
    assert [(q.question_id, q.category, q.boxes, q.objects) for q in questions] == [
        ("1", "all", None, None),
        ("4", "all", None, None),
    ]


def test_null_is_as_good_as_left_out(write, images):
    nothing = {"question_id": None, "category": None, "boxes": None, "objects": None}
    questions = read_questions(write({**GOOD, **nothing}, {**GOOD, **nothing}), images)
    assert [(q.question_id, q.category, q.boxes) for q in questions] == [("1", "all", None), ("2", "all", None)]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_line_ends_of_either_kind_and_none_at_the_end(tmp_path, images, end):
    path = tmp_path / "questions.jsonl"
    path.write_bytes(end.join(json.dumps({**GOOD, "question_id": number}) for number in range(3)).encode())
    assert [q.question_id for q in read_questions(path, images)] == ["0", "1", "2"]


@pytest.mark.parametrize("character", ["é", "\u2028", "\u0085"], ids=["accent", "line_separator", "next_line"])
def test_text_may_hold_any_character(write, images, character):
    # the last two count as line ends to Unicode, but not to JSON, which takes them in strings as they are
    question = {**GOOD, "text": f"what{character}now ?"}
    assert read_questions(write(GOOD, question), images)[1].text == question["text"]


FAULTS = {
    "malformed": ('{"image": "a.png",', "not valid JSON"),
    "text": ("what is it ?", "not valid JSON"),
    "list": ([1, 2], "expected a JSON object, found list"),
    "number": ("3", "expected a JSON object, found int"),
    "no_image": ({"text": "what ?", "answer": "red"}, "field 'image' is None; expected text"),
    "no_text": ({"image": "a.png", "answer": "red"}, "field 'text' is None; expected text"),
    "no_answer": ({"image": "a.png", "text": "what ?"}, "field 'answer' is None; expected text"),
    "empty_image": ({**GOOD, "image": ""}, "field 'image' is ''; expected text"),
    "empty_text": ({**GOOD, "text": " "}, "field 'text' is ' '; expected text"),
    "empty_answer": ({**GOOD, "answer": "\n"}, r"field 'answer' is '\n'; expected text"),
    "answer_number": ({**GOOD, "answer": 3}, "field 'answer' is 3; expected text"),
    "missing_image": ({**GOOD, "image": "z.png"}, "no image"),
    "image_is_a_folder": ({**GOOD, "image": "deep"}, "no image"),
    "doubled_id": ({**GOOD, "question_id": 1}, "question_id 1 is already on line 1"),
    "doubled_id_as_text": ({**GOOD, "question_id": "1"}, "question_id 1 is already on line 1"),
    "boxes_number": ({**GOOD, "boxes": 3}, "expected a list of [left, top, right, bottom] in pixels, found 3"),
    "boxes_flat": ({**GOOD, "boxes": [1, 2, 3, 4]}, "field 'boxes': expected a list of [left, top, right, bottom]"),
    "boxes_three": ({**GOOD, "boxes": [[1, 2, 3]]}, "field 'boxes': expected a list of [left, top, right, bottom]"),
    "boxes_words": ({**GOOD, "boxes": [["a", "b", "c", "d"]]}, "field 'boxes': expected a list"),
    "boxes_object": ({**GOOD, "boxes": {}}, "field 'boxes': expected a list"),
    "boxes_no_area": ({**GOOD, "boxes": [[1, 2, 1, 4]]}, "field 'boxes': [1.0, 2.0, 1.0, 4.0] is not a box"),
    "boxes_reversed": ({**GOOD, "boxes": [[1, 2, 3, 4], [3, 2, 1, 4]]}, "[3.0, 2.0, 1.0, 4.0] is not a box"),
    "boxes_nan": ({**GOOD, "boxes": [[1, 2, float("nan"), 4]]}, "is not a box"),
    "objects_upside_down": ({**GOOD, "objects": [[1, 4, 3, 2]]}, "field 'objects': [1.0, 4.0, 3.0, 2.0] is not a box"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named_with_file_and_line(write, images, fault):
    line, message = FAULTS[fault]
    path = write({**GOOD, "question_id": 1}, "", line, GOOD)
    with pytest.raises(InputError) as error:
        read_questions(path, images)
    assert str(error.value).startswith(f"{path}, line 3: ")
    assert message in str(error.value)


def test_missing_image_is_named_with_its_whole_path(write, images):
    with pytest.raises(InputError, match=str(images / "z.png")):
        read_questions(write({**GOOD, "image": "z.png"}), images)


@pytest.mark.parametrize("content", ["", "\n\n  \n"])
def test_file_without_questions_is_refused(tmp_path, images, content):
    (tmp_path / "empty.jsonl").write_text(content)
    with pytest.raises(InputError, match=r"empty\.jsonl: holds no questions"):
        read_questions(tmp_path / "empty.jsonl", images)


def test_files_and_folders_that_are_not_there_are_refused(tmp_path, write, images):
    with pytest.raises(InputError, match=r"nowhere\.jsonl: no such question file"):
        read_questions(tmp_path / "nowhere.jsonl", images)
    with pytest.raises(InputError, match=f"{images}: cannot be read as text"):
        read_questions(images, images)
    with pytest.raises(InputError, match=r"nowhere: no such image folder"):
        read_questions(write(GOOD), tmp_path / "nowhere")


def test_file_that_is_no_text_is_refused(tmp_path, images):
    (tmp_path / "a.jsonl").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(InputError, match=r"a\.jsonl: cannot be read as text"):
        read_questions(tmp_path / "a.jsonl", images)
