"""Every benchmark's official files: what is read, how it scores, its metrics and its submission."""

import json
import pickle

import pytest

from jaxmllm.data.benchmarks import BENCHMARKS, Unit, benchmark_named
from jaxmllm.errors import InputError, ProcessorError
from jaxmllm.processing.images import StoredImage, image_size, open_image
from tests.support.benchmarks import (
    as_base64,
    rows_of,
    write_benchmark,
    write_image,
    write_json,
    write_lines,
    write_rows,
)


@pytest.fixture
def opened(tmp_path):
    def open_benchmark(name, count=4, **options):
        write_benchmark(name, tmp_path, count=count)
        return benchmark_named(name).open(tmp_path, **options)

    return open_benchmark


def test_there_are_the_benchmarks_that_the_command_line_names():
    assert list(BENCHMARKS) == [
        "gqa", "vqav2", "okvqa", "vizwiz", "textvqa", "textvqa-ocr", "docvqa", "mmbench", "pope", "llava", "scenes",
    ]  # fmt: skip
    assert all(benchmark.name == name for name, benchmark in BENCHMARKS.items())
    with pytest.raises(InputError, match="no benchmark is called 'vqa'; there are gqa, vqav2"):
        benchmark_named("vqa")


# name -> id, image, categories of the second question; how many questions there are of four
SECOND = {
    "gqa": ("00020132", "images/n161313.jpg",
            {"structural": "verify", "semantic": "rel", "detailed": "existRelS", "kind": "binary"}, 4),
    "vqav2": ("42001", "val2014/COCO_val2014_000000000042.jpg",
              {"answer_type": "other", "question_type": "what color"}, 4),
    "okvqa": ("42001", "val2014/COCO_val2014_000000000042.jpg", {"question_type": "Vehicles and Transportation"}, 4),
    "vizwiz": ("VizWiz_val_00000001.jpg", "val/VizWiz_val_00000001.jpg",
               {"answer_type": "other", "answerable": "1"}, 4),
    "textvqa": ("34603", "train_images/003a8ae2ef43b900.jpg", {}, 4),
    "textvqa-ocr": ("34603", "train_images/003a8ae2ef43b900.jpg", {}, 4),
    "docvqa": ("49154", "documents/xnbl0000_1.png", {"question_types": "handwritten, form"}, 4),
    "mmbench": ("242", None, {"category": "attribute_recognition", "l2-category": "finegrained_perception"}, 16),
    "pope": ("random/2", "val2014/COCO_val2014_000000310196.jpg", {"subset": "random"}, 12),
    "llava": ("1", "images/000.jpg", {"category": "detail"}, 4),
    "scenes": ("1", "images/000.jpg", {"category": "detail"}, 4),
}  # fmt: skip


@pytest.mark.parametrize("name", BENCHMARKS)
def test_official_files_are_read(opened, tmp_path, name):
    source = opened(name)
    question_id, image, categories, length = SECOND[name]
    example = source[1]
    assert (len(source), source.skipped) == (length, ())
    assert (example.question_id, example.categories) == (question_id, categories)
    assert example.where.startswith(str(tmp_path))
    assert "line " in example.where
    assert image is None or example.image == tmp_path / image
    assert open_image(example.image).size == image_size(example.image) == (32, 24)
    assert example.text == ("Is there a green shape in the image?" if name == "pope" else "what colour is shape 1 ?")
    assert len({source[index].question_id for index in range(length)}) == length
    with pytest.raises(IndexError):
        source[length]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_reference_is_right_and_another_answer_is_not(opened, name):
    source, benchmark = opened(name), benchmark_named(name)
    for index in range(len(source)):
        example = source[index]
        assert benchmark.score(benchmark.reference(example), example) == 1
        assert benchmark.score("yes" if benchmark.reference(example) == "no" else "no", example) == 0
        assert isinstance(benchmark.parse("no", example), str)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_mean_over_units_is_the_headline(opened, name):
    source, benchmark = opened(name, count=6), benchmark_named(name)
    right = [benchmark.reference(source[index]) for index in range(len(source))]
    assert next(iter(benchmark.metrics(rows_of(name, source, right)).values())) == 1
    rows = rows_of(name, source, [answer if index % 3 else "black" for index, answer in enumerate(right)])
    units, metrics = benchmark.units(rows), benchmark.metrics(rows)
    headline = next(iter(metrics.values()))
    assert 0 < headline < 1
    assert sum(unit.value for unit in units) / len(units) == pytest.approx(headline)
    assert {unit.key for unit in units} <= {row["question_id"] for row in rows}
    assert {unit.cluster for unit in units} == {row["image"] for row in rows}
    assert all(0 <= value <= 1 for value in metrics.values())


@pytest.mark.parametrize("name", BENCHMARKS)
def test_limit_takes_the_first_and_sources_can_be_pickled(opened, tmp_path, name):
    whole, few = opened(name), benchmark_named(name).open(tmp_path, limit=3)
    assert len(few) == 3
    again = pickle.loads(pickle.dumps(few))
    assert [again[index] for index in range(3)] == [whole[index] for index in range(3)]
    assert len(pickle.dumps(few)) < 10_000
    with pytest.raises(InputError, match="limit is 0"):
        benchmark_named(name).open(tmp_path, limit=0)


# Each benchmark's own -------------------------------------------------------------------------------------------------


def test_vqav2_scores_by_the_official_dicts(opened):
    source, benchmark = opened("vqav2"), benchmark_named("vqav2")
    example = source[0]
    assert example.answers is not None
    assert example.answers[8] == {
        "answer": "Black.",
        "answer_confidence": "yes",
        "answer_id": 9,
        "raw_answer": "BLACK.",
    }
    assert benchmark.score("Red!", example) == 1
    assert benchmark.score("black", example) == pytest.approx(0.3)
    assert benchmark.parse("The Two.", example) == "2"


@pytest.mark.parametrize("name, subtype", [("test2015", "test2015"), ("test-dev2015", "test2015"), ("train2014", None)])
def test_vqav2_has_splits(opened, tmp_path, name, subtype):
    opened("vqav2")
    image = tmp_path / f"{subtype}" / f"COCO_{subtype}_000000000007.jpg"
    write_image(image, 0, (8, 8))
    questions = {"questions": [{"image_id": 7, "question": "what ?", "question_id": 70}], "license": {}}
    write_json(tmp_path / "Questions" / f"v2_OpenEnded_mscoco_{name}_questions.json", questions, indent=1)
    assert len(benchmark_named("vqav2").open(tmp_path)) == 4, "val2014 goes first"
    if subtype is None:
        with pytest.raises(InputError, match=r"holds no v2_mscoco_train2014_annotations\.json"):
            benchmark_named("vqav2").open(tmp_path, split=name)
        return
    source = benchmark_named("vqav2").open(tmp_path, split=name)
    assert (source[0].image, source[0].answers, source[0].categories) == (image, None, {})
    assert benchmark_named("vqav2").score("red", source[0]) is None
    assert benchmark_named("vqav2").reference(source[0]) is None
    rows = rows_of("vqav2", source, ["red"])
    assert (benchmark_named("vqav2").metrics(rows), benchmark_named("vqav2").units(rows)) == ({}, [])


def test_vqav2_and_okvqa_may_lie_in_one_folder(opened, tmp_path):
    write_benchmark("vqav2", tmp_path)
    assert len(opened("okvqa", count=2)) == 2
    assert len(benchmark_named("vqav2").open(tmp_path)) == 4


def test_okvqa_scores_by_answer_and_not_by_raw_answer(opened):
    example = opened("okvqa")[0]
    assert example.answers == ("red",) * 8 + ("Black.", "two")
    assert benchmark_named("okvqa").score("2", example) == pytest.approx(0.3)
    assert example.categories == {"question_type": "Sports and Recreation"}


def test_vizwiz_without_answers(tmp_path):
    write_image(tmp_path / "test" / "VizWiz_test_00000000.jpg", 0, (8, 8))
    write_json(tmp_path / "Annotations" / "test.json", [{"image": "VizWiz_test_00000000.jpg", "question": "What?"}])
    source = benchmark_named("vizwiz").open(tmp_path)
    assert (source[0].answers, source[0].categories) == (None, {})
    submission = benchmark_named("vizwiz").submission(rows_of("vizwiz", source, ["a cup"]))
    assert json.loads(submission.text) == [{"image": "VizWiz_test_00000000.jpg", "answer": "a cup"}]


def test_textvqa_test_split_has_images_of_its_own(tmp_path):
    write_image(tmp_path / "test_images" / "ab.jpg", 0, (8, 8))
    question = {"image_id": "ab", "question": "what ?", "question_id": 3, "image_classes": []}
    write_json(tmp_path / "TextVQA_0.5.1_test.json", {"data": [question]})
    source = benchmark_named("textvqa").open(tmp_path)
    assert (source[0].image, source[0].answers) == (tmp_path / "test_images" / "ab.jpg", None)


def test_ocr_tokens_are_those_of_either_file(opened, tmp_path):
    assert [opened("textvqa-ocr")[index].fields["ocr"] for index in range(4)] == ["STOP, No 0"] * 2 + ["STOP, No 2"] * 2
    texts = [
        "what ?\nReference OCR token: A, B.C\nAnswer the question using a single word or phrase.",
        "Reference OCR token: \nwhat ?\nAnswer the question using a single word or phrase.",
    ]
    names = ["003a8ae2ef43b900.jpg", "003a8ae2ef43b901"]
    lines = [{"question_id": "x", "image": name, "text": text} for name, text in zip(names, texts, strict=True)]
    write_lines(tmp_path / "llava_textvqa_val_v051_ocr.jsonl", lines)
    source = benchmark_named("textvqa-ocr").open(tmp_path)
    assert [source[index].fields["ocr"] for index in range(4)] == ["A, B.C"] * 2 + [""] * 2


def test_gqa_reports_binary_and_open(opened):
    source = opened("gqa")
    metrics = benchmark_named("gqa").metrics(rows_of("gqa", source, ["red", "no", "Green.", "green "]))
    assert metrics == {"accuracy": 0.5, "binary": 0.0, "open": 1.0}
    assert benchmark_named("gqa").parse("Green..", source[0]) == "green"


def test_gqa_without_answers(tmp_path):
    write_image(tmp_path / "images" / "n1.jpg", 0, (8, 8))
    write_json(tmp_path / "test_balanced_questions.json", {"7": {"question": "what ?", "imageId": "n1"}})
    source = benchmark_named("gqa").open(tmp_path)
    assert (source[0].answers, source[0].categories) == (None, {})
    assert benchmark_named("gqa").metrics(rows_of("gqa", source, ["red"])) == {}


def test_docvqa_pages_may_lie_without_their_folder(opened, tmp_path):
    opened("docvqa")
    (tmp_path / "documents").rename(tmp_path / "spdocvqa_images")
    source = benchmark_named("docvqa").open(tmp_path)
    assert source[0].image == tmp_path / "spdocvqa_images" / "xnbl0000_1.png"
    assert benchmark_named("docvqa").metrics(rows_of("docvqa", source, ["redd", "RED", "", "x"])) == {
        "anls": pytest.approx((0.75 + 1) / 4)
    }


def test_pope_has_subsets(opened, tmp_path):
    source = opened("pope")
    predictions = ["Yes", "Yes, it is", "yes", "no"] + ["yes", "no", "no", "no"] + ["no"] * 4
    metrics = benchmark_named("pope").metrics(rows_of("pope", source, predictions))
    assert list(metrics)[:5] == ["accuracy", "precision", "recall", "f1", "yes_ratio"]
    assert metrics["accuracy"] == pytest.approx(8 / 12)
    assert (metrics["random/accuracy"], metrics["random/precision"], metrics["random/recall"]) == (0.75, 2 / 3, 1)
    assert (metrics["popular/yes_ratio"], metrics["adversarial/f1"]) == (0.25, 0)
    one = benchmark_named("pope").open(tmp_path, split="popular")
    assert [one[index].question_id for index in range(4)] == [f"popular/{number}" for number in range(1, 5)]
    (tmp_path / "coco_pope_random.json").rename(tmp_path / "coco_pope_random.jsonl")
    (tmp_path / "coco_pope_popular.json").unlink()
    assert len(benchmark_named("pope").open(tmp_path)) == 8
    with pytest.raises(InputError, match="POPE has random, popular, adversarial"):
        benchmark_named("pope").open(tmp_path, split="val")
    with pytest.raises(InputError, match=r"holds no coco_pope_popular\.json"):
        benchmark_named("pope").open(tmp_path, split="popular")


def test_mmbench_rotations_make_one_unit(opened):
    source, benchmark = opened("mmbench", count=2), benchmark_named("mmbench")
    right = [benchmark.reference(source[index]) for index in range(8)]
    rows = rows_of("mmbench", source, [*right[:7], "none of them"])
    assert benchmark.metrics(rows) == {
        "circular_accuracy": 0.5, "vanilla_accuracy": 1.0, "vanilla_accuracy_all": pytest.approx(7 / 8),
    }  # fmt: skip
    image = str(source[0].image)
    assert benchmark.units(rows) == [Unit("241", image, 1.0), Unit("242", image, 0.0)]
    assert benchmark.units(rows[2:]) == []
    assert benchmark.metrics(rows[2:]) == {}, "no base question is among them"


def test_mmbench_options_stop_at_the_first_empty_one_and_none_is_an_option(tmp_path):
    base = {"question": "which ?", "image": as_base64(0, (8, 8)), "category": "x"}
    rows = [
        {"index": 0, "A": "None", "B": "NA", "C": "", "D": "ghost", "answer": "B", **base},
        {"index": 1, "A": "nan", "B": "x", "C": "y", "D": "", "answer": "", **base, "hint": "NA"},
    ]
    write_rows(tmp_path / "a.tsv", rows)
    source = benchmark_named("mmbench").open(tmp_path)
    assert source[0].options == {"A": "None", "B": "NA"}
    assert (source[1].options, source[1].answers) == ({"A": "nan", "B": "x", "C": "y"}, None)
    assert source[1].fields == {"hint": "NA", "options": "A. nan\nB. x\nC. y"}
    benchmark = benchmark_named("mmbench")
    assert [benchmark.score(text, source[0]) for text in ("B", "NA", "None", "D")] == [1, 1, 0, 0]
    assert (benchmark.parse("B.", source[0]), benchmark.parse("who knows", source[0])) == ("B", "")


def test_mmbench_of_older_columns_and_with_paths(tmp_path):
    write_image(tmp_path / "images" / "1.jpg", 0, (8, 8))
    rows = [{"index": 1, "question": "which ?", "A": "x", "B": "y", "answer": "A", "image_path": "1.jpg"}]
    write_rows(tmp_path / "old.tsv", rows, ("index", "question", "A", "B", "answer", "image_path"))
    source = benchmark_named("mmbench").open(tmp_path)
    assert (source[0].image, source[0].categories) == (tmp_path / "images" / "1.jpg", {})
    assert source[0].fields["hint"] == ""


def test_mmbench_files_must_be_named_where_there_are_several(opened, tmp_path):
    opened("mmbench")
    write_rows(tmp_path / "MMBench_TEST_EN.tsv", [{"index": 1, "question": "which ?", "A": "x", "B": "y",
                                                  "image": as_base64(0, (8, 8))}])  # fmt: skip
    with pytest.raises(InputError, match="name one with --split: MMBench_DEV_EN, MMBench_TEST_EN"):
        benchmark_named("mmbench").open(tmp_path)
    assert len(benchmark_named("mmbench").open(tmp_path, split="MMBench_TEST_EN")) == 1
    with pytest.raises(InputError, match="of split 'dev'; found MMBench_DEV_EN, MMBench_TEST_EN"):
        benchmark_named("mmbench").open(tmp_path, split="dev")


def test_stored_images_are_opened_like_files(opened, tmp_path):
    image = opened("mmbench")[0].image
    assert isinstance(image, StoredImage)
    assert "data" not in repr(image), "the bytes are not for messages"
    with pytest.raises(ProcessorError, match="base64:1: broken, or not an image"):
        open_image(StoredImage("base64:1", image.data[:200]))
    with pytest.raises(ProcessorError, match="base64:2: broken, or not an image"):
        image_size(StoredImage("base64:2", b"no image"))


def test_llava_files_may_have_no_answers_and_any_name(tmp_path):
    write_image(tmp_path / "a.jpg", 0, (8, 8))
    write_lines(tmp_path / "mine.jsonl", [{"question_id": "q-1", "image": "a.jpg", "text": "what ?"}])
    source = benchmark_named("llava").open(tmp_path)
    assert (source[0].answers, source[0].categories) == (None, {"category": "all"})
    assert benchmark_named("llava").score("x", source[0]) is None
    write_lines(tmp_path / "more.jsonl", [])
    with pytest.raises(InputError, match="several question files; name one with --split: mine, more"):
        benchmark_named("llava").open(tmp_path)
    assert len(benchmark_named("llava").open(tmp_path, split="mine")) == 1
    with pytest.raises(InputError, match=r"holds no other\.jsonl, found mine, more"):
        benchmark_named("llava").open(tmp_path, split="other")


@pytest.mark.parametrize("prediction, score", [(" Red.\n", 1), ("RED", 1), ("red..", 0), ("a red", 0)])
def test_llava_answers_match_but_for_case_and_a_period(opened, prediction, score):
    assert benchmark_named("llava").score(prediction, opened("llava")[0]) == score


def test_scenes_come_with_the_package():
    source = benchmark_named("scenes").open(None, limit=4)
    assert source[0].text == "what digit is white ?"
    assert source[0].boxes == ((24.99, 6.24, 35.58, 26.53),)
    assert len(source[0].objects) == 5
