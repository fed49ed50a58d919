"""Tiny benchmarks in the form of the official files."""

import base64
import csv
import io
import json
from pathlib import Path

from PIL import Image

from jaxmllm.data.benchmarks import Source, benchmark_named
from jaxmllm.data.benchmarks.base import judged_row

COLOURS = ("red", "green", "blue", "yellow")
ROTATIONS = 4
MMBENCH_COLUMNS = (
    "index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source", "l2-category", "comment",
    "split",
)  # fmt: skip


def write_benchmark(name: str, folder: Path, count: int = 4, image_size: tuple[int, int] = (32, 24)) -> None:
    """Writes a benchmark's question files and images.

    Args:
      folder: it is made if it is not there.
      count: questions, two of each image; of POPE in each subset, of MMBench before rotation.
      image_size: width and height of the images in pixels.
    """
    folder.mkdir(parents=True, exist_ok=True)
    WRITERS[name](folder, count, image_size)


def rows_of(name: str, source: Source, predictions: list[str]) -> list[dict]:
    """Rows as a run writes them."""
    benchmark = benchmark_named(name)
    generated = {"log_probability": -1.0, "tokens": 2, "stopped": True}
    rows = [
        judged_row(benchmark, index, source[index], source[index].text, prediction) | generated
        for index, prediction in enumerate(predictions)
    ]
    return json.loads(json.dumps(rows))


def write_json(path: Path, value: object, indent: int | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=indent, ensure_ascii=False), encoding="utf-8")


def write_lines(path: Path, rows: list) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_rows(path: Path, rows: list[dict], columns: tuple[str, ...] = MMBENCH_COLUMNS) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, dialect="excel-tab", restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def picture(number: int, size: tuple[int, int]) -> Image.Image:
    return Image.new("RGB", size, COLOURS[number % 4]).rotate(10 * number, fillcolor="black")


def write_image(path: Path, number: int, size: tuple[int, int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(number, size).save(path)


def as_base64(number: int, size: tuple[int, int]) -> str:
    file = io.BytesIO()
    picture(number, size).save(file, "JPEG")
    return base64.b64encode(file.getvalue()).decode()


def question(number: int) -> str:
    return f"what colour is shape {number} ?"


def answer(number: int) -> str:
    return COLOURS[number // 2 % 4]


def ten(number: int) -> list[dict]:
    """Ten answers as VQA's files have them, two of them unlike the others."""
    texts = [answer(number)] * 8 + ["Black.", "two"]
    return [
        {"answer": text, "answer_confidence": "yes", "answer_id": place} for place, text in enumerate(texts, start=1)
    ]


def _write_vqa(folder: Path, count: int, size: tuple[int, int], prefix: str, kinds: dict[str, str]) -> None:
    questions, annotations = [], []
    for number in range(count):
        ids = {"image_id": 42 + number // 2, "question_id": (42 + number // 2) * 1000 + number}
        questions.append({**ids, "question": question(number)})
        kind = sorted(kinds)[number % len(kinds)]
        annotations.append(
            {**ids, "question_type": kind, "answer_type": "other", "multiple_choice_answer": answer(number),
             "answers": [{**one, "raw_answer": one["answer"].upper()} for one in ten(number)]}
        )  # fmt: skip
        write_image(folder / "val2014" / f"COCO_val2014_{ids['image_id']:012d}.jpg", number // 2, size)
    head = {"info": {"version": "2.0"}, "data_type": "mscoco", "data_subtype": "val2014", "license": {"name": "CC"}}
    write_json(
        folder / f"{prefix}OpenEnded_mscoco_val2014_questions.json",
        {"info": head["info"], "task_type": "Open-Ended", **head, "questions": questions},
    )
    write_json(
        folder / f"{prefix}mscoco_val2014_annotations.json",
        {**head, "annotations": annotations, "question_types": kinds},
    )


def _write_vqav2(folder: Path, count: int, size: tuple[int, int]) -> None:
    _write_vqa(folder, count, size, "v2_", {"what color": "what color", "how many": "how many"})


def _write_okvqa(folder: Path, count: int, size: tuple[int, int]) -> None:
    _write_vqa(folder, count, size, "", {"one": "Vehicles and Transportation", "four": "Sports and Recreation"})


def _write_vizwiz(folder: Path, count: int, size: tuple[int, int]) -> None:
    rows = []
    for number in range(count):
        image = f"VizWiz_val_{number:08d}.jpg"
        answers = [{"answer": one["answer"], "answer_confidence": "yes"} for one in ten(number)]
        rows.append(
            {"image": image, "question": question(number), "answers": answers,
             "answer_type": "other" if number % 2 else "unanswerable", "answerable": number % 2}
        )  # fmt: skip
        write_image(folder / "val" / image, number, size)
    write_json(folder / "val.json", rows, indent=4)


def _write_textvqa(folder: Path, count: int, size: tuple[int, int]) -> None:
    rows, ocr = [], []
    for number in range(count):
        image_id = f"003a8ae2ef43b9{number // 2:02d}"
        rows.append(
            {"question": question(number), "image_id": image_id, "image_classes": ["Shape", "Colour"],
             "flickr_original_url": "https://example.org/a.jpg", "image_width": size[0], "image_height": size[1],
             "answers": [one["answer"] for one in ten(number)], "question_tokens": question(number).split(),
             "question_id": 34602 + number, "set_name": "val"}
        )  # fmt: skip
        write_image(folder / "train_images" / f"{image_id}.jpg", number // 2, size)
        if number % 2 == 0:
            ocr.append({"image_id": image_id, "ocr_tokens": ["STOP", f"No {number}"], "ocr_info": []})
    head = {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1"}
    write_json(folder / "TextVQA_0.5.1_val.json", {**head, "data": rows})
    write_json(folder / "TextVQA_Rosetta_OCR_v0.2_val.json", {**head, "data": ocr})


def _write_gqa(folder: Path, count: int, size: tuple[int, int]) -> None:
    questions = {}
    for number in range(count):
        image_id = f"n{161313 + number // 2}"
        structural, semantic, detailed = (("query", "attr", "directOf"), ("verify", "rel", "existRelS"))[number % 2]
        questions[f"{20131 + number:08d}"] = {
            "semantic": [{"operation": "select", "dependencies": [], "argument": "shape (12)"}],
            "entailed": [], "equivalent": [], "question": question(number), "imageId": image_id, "isBalanced": True,
            "groups": {"global": "color", "local": "10"}, "answer": answer(number), "semanticStr": "select: shape (12)",
            "annotations": {"answer": {}, "question": {}, "fullAnswer": {}},
            "types": {"detailed": detailed, "semantic": semantic, "structural": structural},
            "fullAnswer": f"It is {answer(number)}.",
        }  # fmt: skip
        write_image(folder / "images" / f"{image_id}.jpg", number // 2, size)
    write_json(folder / "testdev_balanced_questions.json", questions)


def _write_docvqa(folder: Path, count: int, size: tuple[int, int]) -> None:
    rows = []
    for number in range(count):
        image = f"documents/xnbl00{number // 2:02d}_1.png"
        rows.append(
            {"questionId": 49153 + number, "question": question(number), "question_types": ["handwritten", "form"],
             "image": image, "docId": 14465 + number // 2, "ucsf_document_id": "xnbl", "ucsf_document_page_no": "1",
             "answers": [answer(number), answer(number).upper()], "data_split": "val"}
        )  # fmt: skip
        write_image(folder / image, number // 2, size)
    write_json(
        folder / "val_v1.0_withQT.json",
        {"dataset_name": "SP-DocVQA", "dataset_version": "1.0", "dataset_split": "val", "data": rows},
    )


def _write_mmbench(folder: Path, count: int, size: tuple[int, int]) -> None:
    rows = []
    for turn in range(ROTATIONS):
        for number in range(count):
            options = COLOURS[turn:] + COLOURS[:turn]
            rows.append(
                {"index": 241 + number + turn * 1_000_000, "question": question(number),
                 "hint": "Look at the\n\"shape\".\tCarefully." if number % 2 else "",
                 **dict(zip("ABCD", options, strict=True)),
                 "answer": "ABCD"[options.index(answer(number))], "category": "attribute_recognition",
                 "image": as_base64(number // 2, size) if turn == 0 else 241 + number, "source": "scenes",
                 "l2-category": "finegrained_perception", "split": "dev"}
            )  # fmt: skip
    write_rows(folder / "MMBench_DEV_EN.tsv", rows)


def _write_pope(folder: Path, count: int, size: tuple[int, int]) -> None:
    for subset in ("random", "popular", "adversarial"):
        rows = []
        for number in range(count):
            image = f"COCO_val2014_{310196 + number // 2:012d}.jpg"
            rows.append(
                {"question_id": number + 1, "image": image,
                 "text": f"Is there a {COLOURS[number % 4]} shape in the image?",
                 "label": "yes" if number % 2 == 0 else "no"}
            )  # fmt: skip
            write_image(folder / "val2014" / image, number // 2, size)
        write_lines(folder / f"coco_pope_{subset}.json", rows)


def _write_llava(folder: Path, count: int, size: tuple[int, int]) -> None:
    rows = []
    for number in range(count):
        image = f"{number // 2:03d}.jpg"
        rows.append(
            {"question_id": number, "image": image, "text": question(number),
             "category": ("conv", "detail")[number % 2], "answer": answer(number)}
        )  # fmt: skip
        write_image(folder / "images" / image, number // 2, size)
    write_lines(folder / "questions.jsonl", rows)


WRITERS = {
    "gqa": _write_gqa,
    "vqav2": _write_vqav2,
    "okvqa": _write_okvqa,
    "vizwiz": _write_vizwiz,
    "textvqa": _write_textvqa,
    "textvqa-ocr": _write_textvqa,
    "docvqa": _write_docvqa,
    "mmbench": _write_mmbench,
    "pope": _write_pope,
    "llava": _write_llava,
    "scenes": _write_llava,
}
