"""Files and folders: what is looked for where, and what is said of what is not there."""

import re
import shutil

import pytest

from jaxmllm.data.benchmarks import BENCHMARKS, benchmark_named
from jaxmllm.errors import InputError
from tests.support.benchmarks import write_benchmark, write_json

# name -> a question file
FILES = {
    "vqav2": "v2_OpenEnded_mscoco_val2014_questions.json",
    "okvqa": "OpenEnded_mscoco_val2014_questions.json",
    "vizwiz": "val.json",
    "textvqa": "TextVQA_0.5.1_val.json",
    "textvqa-ocr": "TextVQA_0.5.1_val.json",
    "docvqa": "val_v1.0_withQT.json",
    "pope": "coco_pope_random.json",
    "llava": "questions.jsonl",
    "gqa": "testdev_balanced_questions.json",
}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_data_must_be_a_folder(tmp_path, name):
    benchmark = benchmark_named(name)
    with pytest.raises(InputError, match="nowhere: no such folder"):
        benchmark.open(tmp_path / "nowhere")
    (tmp_path / "data.zip").write_bytes(b"PK\x03\x04")
    with pytest.raises(InputError, match=r"data\.zip: an archive; unzip it"):
        benchmark.open(tmp_path / "data.zip")
    (tmp_path / "data.json").write_text("[]")
    with pytest.raises(InputError, match=r"data\.json: a file; expected the folder"):
        benchmark.open(tmp_path / "data.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty: holds no "):
        benchmark.open(tmp_path / "empty")
    if name != "scenes":
        with pytest.raises(InputError, match="name it with --data DIR"):
            benchmark.open(None)


@pytest.mark.parametrize("name", FILES)
def test_archives_that_were_not_unzipped_are_named(tmp_path, name):
    write_benchmark(name, tmp_path)
    folder = next(path for path in tmp_path.iterdir() if path.is_dir())
    shutil.rmtree(folder)
    (tmp_path / f"{folder.name}.zip").write_bytes(b"PK\x03\x04")
    expected = rf"; unzip first: {folder.name}\.zip"
    with pytest.raises(InputError, match=rf"no image .*{expected}"):
        benchmark_named(name).open(tmp_path)
    with pytest.raises(InputError, match="records are bad, the first at"):
        benchmark_named(name).open(tmp_path, skip_bad=True)
    (tmp_path / FILES[name]).unlink()
    if name != "pope":
        with pytest.raises(InputError, match=rf"unzip first: {folder.name}\.zip"):
            benchmark_named(name).open(tmp_path)


def test_an_archive_by_the_name_of_a_question_file(tmp_path):
    write_benchmark("vqav2", tmp_path)
    (tmp_path / FILES["vqav2"]).write_bytes(b"PK\x03\x04" + b"x" * 100)
    with pytest.raises(InputError, match="it is a zip archive; unzip it first"):
        benchmark_named("vqav2").open(tmp_path)


@pytest.mark.parametrize("name", ["vqav2", "vizwiz", "textvqa", "gqa", "pope"])
def test_two_files_that_may_be_meant(tmp_path, name):
    write_benchmark(name, tmp_path)
    path = tmp_path / FILES[name]
    other = tmp_path / "annotations" / path.name
    other.parent.mkdir()
    other.write_bytes(path.read_bytes())
    with pytest.raises(InputError, match=f"2 files may be meant: .*{re.escape(str(other))}"):
        benchmark_named(name).open(tmp_path)
    path.unlink()
    assert len(benchmark_named(name).open(tmp_path)) in (4, 12)


def test_two_files_of_docvqa_are_told_apart_by_name(tmp_path):
    write_benchmark("docvqa", tmp_path)
    path = tmp_path / FILES["docvqa"]
    (tmp_path / "val_v1.0.json").write_bytes(path.read_bytes())
    with pytest.raises(InputError, match="2 files may be meant"):
        benchmark_named("docvqa").open(tmp_path)
    assert len(benchmark_named("docvqa").open(tmp_path, split="val_v1.0")) == 4


def test_several_splits_without_a_default_must_be_named(tmp_path):
    for split in ("test2015", "test-dev2015"):
        write_json(tmp_path / f"v2_OpenEnded_mscoco_{split}_questions.json", {"questions": []})
    with pytest.raises(InputError, match="name one with --split: test-dev2015, test2015"):
        benchmark_named("vqav2").open(tmp_path)
    with pytest.raises(InputError, match="of split 'val'; found test-dev2015, test2015"):
        benchmark_named("vqav2").open(tmp_path, split="val")
    with pytest.raises(InputError, match="no question could be read; there is no record in it"):
        benchmark_named("vqav2").open(tmp_path, split="test2015")
