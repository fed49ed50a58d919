"""Methods side by side: numbers by hand, answers as one by one, and the file that says who takes part."""

import dataclasses
import io
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import jaxmllm
from jaxmllm.analysis.bootstrap import mean_interval
from jaxmllm.data.parquet import write_parquet
from jaxmllm.data.small_scenes import A_SCENE, small_scene_questions
from jaxmllm.errors import InputError
from jaxmllm.evaluation.contest import (
    chances_of,
    outcome_rows,
    pointing,
    result_rows,
    run_contest,
    share_inside,
)
from jaxmllm.evaluation.contestants import Contestant, read_lineup
from jaxmllm.methods import CentreCrop, ContrastiveReinput, Method
from jaxmllm.methods.regions import ImageMap
from jaxmllm.models.boxes import TokenBoxes
from jaxmllm.report.contest import kinds_table, main_table, pick_questions, pointing_table, write_contest
from jaxmllm.report.sheets import GAP, SIDE, STRIP, draw_sheet
from tests.evaluation.cases import BATCH, MODEL, model

METHODS_FILE = MODEL.parent / "methods.toml"
CONTRASTIVE = ContrastiveReinput(candidates="all")
CONTESTANTS = (
    Contestant("base", "main", Method()),
    Contestant("centre", "main", CentreCrop()),
    Contestant("contrastive", "main", CONTRASTIVE),
    Contestant("among all", "candidates", CONTRASTIVE),
)
COUNT = 3 * A_SCENE + 2  # the last batch is not full


@pytest.fixture(scope="module")
def questions():
    return small_scene_questions("validation", COUNT, seed=5)


@pytest.fixture(scope="module")
def progress():
    return []


@pytest.fixture(scope="module")
def contest(questions, progress):
    return run_contest(
        model(), questions, CONTESTANTS, BATCH, on_progress=lambda *seen: progress.append(seen), drawn=(0, 9)
    )


def test_answers_are_those_given_one_batch_at_a_time(contest, questions):
    part = questions[4 : 4 + BATCH]
    for result in contest.results[:3]:
        alone = jaxmllm.answer(
            model(), [question.image for question in part], [question.text for question in part],
            method=result.contestant.method, max_new_tokens=4,
        )  # fmt: skip
        outcomes = result.run.outcomes[4 : 4 + BATCH]
        assert [outcome.prediction for outcome in outcomes] == list(alone)
        assert len(result.run.outcomes) == COUNT
        if alone.details.boxes is not None:
            assert [outcome.box for outcome in outcomes] == list(alone.details.boxes)


def test_accuracy_and_paired_interval_by_hand(contest, questions):
    base = contest.results[0]
    assert base.gain is None
    right = np.array([outcome.prediction == question.answer for outcome, question in
                      zip(base.run.outcomes, questions, strict=True)])  # fmt: skip
    assert 0 < right.mean() < 1
    scenes = [question.image.name for question in questions]
    assert len(set(scenes)) == 4 == contest.scenes
    for result in contest.results:
        correct = np.array([outcome.correct for outcome in result.run.outcomes])
        assert result.accuracy.value == pytest.approx(correct.mean())
        for kind, score in result.kinds.items():
            of_kind = [question.category == kind for question in questions]
            assert score.value == pytest.approx(correct[of_kind].mean()) and score.count == sum(of_kind)
        if result.gain is not None:
            changes = correct.astype(float) - right
            assert result.gain.value == pytest.approx(changes.mean())
            assert (result.gain.won, result.gain.lost) == ((changes > 0).sum(), (changes < 0).sum())
            assert result.gain.won and result.gain.lost < COUNT
            low, high = mean_interval(changes, scenes)
            assert (result.gain.low, result.gain.high) == (pytest.approx(low), pytest.approx(high))
            # whole scenes are drawn: questions one by one would give another interval
            assert (low, high) != tuple(mean_interval(changes))


def test_passes_and_seconds(contest):
    base, centre, contrastive, again = (result.run for result in contest.results)
    assert [run.count.prompts for run in (base, centre, contrastive)] == [1, 2, 2]
    assert all(run.count.backward == 0 and 1 <= run.count.tokens <= 3 for run in (base, centre, contrastive))
    assert all(run.seconds > 0 for run in (base, centre, contrastive))
    assert again is contrastive  # the same method answers once


def test_progress_counts_every_answer_once(contest, progress):
    total = 3 * COUNT
    assert [done for done, *_ in progress] == sorted({done for done, *_ in progress})
    assert progress[-1] == (total, total, "contrastive")
    assert {label for *_, label in progress} == {"base", "centre", "contrastive"}


def test_what_is_in_the_crop_and_where_the_map_points(contest, questions):
    base, centre, contrastive, _ = contest.results
    assert (base.hits, base.mass, base.inside) == (None, None, None)
    assert centre.hits is None
    shares = []
    for question, outcome in zip(questions, centre.run.outcomes, strict=True):
        if not question.boxes:
            assert outcome.inside is None
            continue
        seen = np.zeros((336 * 4, 336 * 4), bool)  # in quarters of a pixel
        for box in question.boxes:
            left, top, right, bottom = np.rint(np.array(box) * 4).astype(int)
            seen[top:bottom, left:right] = True
        left, top, right, bottom = (4 * edge for edge in outcome.box)
        assert outcome.inside == pytest.approx(seen[top:bottom, left:right].sum() / seen.sum(), abs=0.05)
        shares.append(outcome.inside)
    assert centre.inside == pytest.approx(np.mean(shares))
    assert contest.pointed == len(shares) < COUNT
    known = [outcome for outcome in contrastive.run.outcomes if outcome.hit is not None]
    assert contrastive.hits == pytest.approx(np.mean([outcome.hit for outcome in known]))
    assert contrastive.mass == pytest.approx(np.mean([outcome.mass for outcome in known]))
    assert len(known) == contest.pointed


TOKENS = TokenBoxes(
    np.array([[0.0, 0, 10, 10], [10, 0, 20, 10], [0, 10, 10, 20], [10, 10, 20, 20], [20, 0, 20, 10]]), (2, 2), (20, 20)
)


def test_pointing_by_hand():
    evidence = [(12.0, 2.0, 15.0, 5.0)]  # beside the centre of its patch
    found = ImageMap(np.array([0.1, 0.6, -5.0, 0.3, 9.0]), TOKENS)  # the last token saw nothing
    assert pointing(found, evidence) == (True, pytest.approx(0.6))
    assert pointing(dataclasses.replace(found, values=np.array([0.4, 0.3, 0.0, 0.3, 0.0])), evidence) == (
        False, pytest.approx(0.3),
    )  # fmt: skip
    assert pointing(dataclasses.replace(found, values=-np.arange(5.0)), evidence)[1] == 0.0
    objects = [*evidence, (1.0, 1.0, 4.0, 4.0), (6.0, 16.0, 9.0, 19.0), (16.0, 6.0, 19.0, 9.0)]
    # one patch of four; of the objects, itself and one more in the same patch
    assert chances_of(TOKENS, evidence, objects) == (0.25, 0.5)
    assert chances_of(TOKENS, [(8.0, 2.0, 12.0, 5.0)], []) == (0.5, 0.0)


def test_the_share_of_evidence_in_a_box_by_hand():
    assert share_inside([(0, 0, 10, 10)], (0, 0, 20, 20)) == 1.0
    assert share_inside([(0, 0, 10, 10), (20, 20, 30, 30)], (5, 0, 25, 30)) == pytest.approx(0.5)
    assert share_inside([(0, 0, 10, 10), (20, 20, 22, 22)], (19, 19, 30, 30)) == pytest.approx(4 / 104)


def test_tables_hold_the_numbers(contest, questions, tmp_path):
    rows = result_rows(contest)
    values = {(row["method"], row["metric"], row["category"]): row for row in rows}
    assert len(values) == len(rows)
    centre = contest.results[1]
    assert values["centre", "accuracy", "all"]["value"] == centre.accuracy.value
    assert values["centre", "difference", "all"]["low"] == centre.gain.low
    assert values["centre", "passes_prompts", "all"]["value"] == 2
    assert ("base", "difference", "all") not in values and ("base", "pointing_hits", "all") not in values
    answers = outcome_rows(contest)
    write_parquet(answers, tmp_path / "answers.parquet")
    stored = pq.read_table(tmp_path / "answers.parquet").to_pylist()
    assert len(stored) == len(CONTESTANTS) * COUNT
    assert np.mean([row["correct"] for row in stored if row["method"] == "centre"]) == centre.accuracy.value
    json.dumps(rows, allow_nan=False)

    shown = {row[0]: row for row in main_table(contest.results)}
    assert shown["base"][2:6] == ["", "", "", ""]
    assert shown["centre"][1] == f"{100 * centre.accuracy.value:.1f}"
    assert shown["centre"][3] == f"{100 * centre.gain.low:+.1f} to {100 * centre.gain.high:+.1f}"
    assert kinds_table(contest.results)[0][1:] == sorted({question.category for question in questions})
    assert [row[0] for row in pointing_table(contest)] == [
        "method", "centre", "contrastive", "chance: random object", "chance: random patch",
    ]  # fmt: skip
    assert [result.contestant.label for result in contest.of_group("candidates")] == ["base", "among all"]


def test_tensorboard_shows_numbers_and_pictures(contest, questions, tmp_path):
    write_contest(tmp_path, contest, {"seed": 5}, ["what was tuned"])
    assert {path.name for path in tmp_path.iterdir()} == {"base", "centre", "contrastive", "among_all", "summary"}
    centre = events(tmp_path / "centre")
    (accuracy,) = centre.Scalars("metrics/accuracy")
    assert accuracy.value == pytest.approx(contest.results[1].accuracy.value) and accuracy.step == COUNT
    assert centre.Scalars("running_accuracy")[-1].value == pytest.approx(accuracy.value)
    assert "_hparams_/session_start_info" in events(tmp_path / "centre").summary_metadata
    summary = events(tmp_path / "summary")
    tags = [tag for tag in summary.Tags()["images"] if tag.startswith("looked_at/")]
    assert len(tags) == 2 and questions[9].question_id in tags[1]
    sizes = set()
    for tag in tags:
        (image,) = summary.Images(tag)
        sizes.add(Image.open(io.BytesIO(image.encoded_image_string)).size)
    # the question itself and two methods beside it: "among all" does what "contrastive" does
    assert sizes == {(3 * (2 * SIDE + GAP) + 2 * GAP, STRIP + SIDE)}
    texts = summary.Tags()["tensors"]
    assert {"1_main/text_summary", "1_candidates/text_summary", "3_tuning/text_summary"} <= set(texts)


def test_the_sheet_shows_the_crop_in_its_place(contest, questions):
    centre = contest.results[1]
    shown, outcome = centre.run.shown[9], centre.run.outcomes[9]
    picture = Image.fromarray(np.full((SIDE, SIDE, 3), 40, np.uint8))
    box = (20, 30, 90, 100)
    silent = contest.results[0].run
    entries = [
        ("base", silent.outcomes[9], silent.shown[9]),
        ("centre", outcome, dataclasses.replace(shown, box=box)),
    ]
    sheet = draw_sheet(picture, dataclasses.replace(questions[9], boxes=((2.0, 4.0, 10.0, 12.0),)), entries)
    assert sheet.shape == (STRIP + SIDE, 3 * (2 * SIDE + GAP) + 2 * GAP, 3)
    begins = 2 * (SIDE + GAP)  # of the second cell; in the first are the question and what base answered
    assert {tuple(sheet[0, begins])} == {(26, 127, 55) if outcome.correct else (207, 34, 46)}
    marked = sheet[STRIP:, begins : begins + SIDE].astype(int)
    cyan = np.argwhere((marked[..., 2] > 200) & (marked[..., 0] < 60))
    assert (*cyan.min(axis=0)[::-1], *cyan.max(axis=0)[::-1] + 1) == pytest.approx(box, abs=1)
    lime = np.argwhere((marked[..., 1] > 200) & (marked[..., 2] < 60))
    assert (*lime.min(axis=0)[::-1], *lime.max(axis=0)[::-1]) == pytest.approx((2, 4, 10, 12), abs=1.5)
    beside = sheet[STRIP:, begins + SIDE + GAP : begins + 2 * SIDE + GAP]
    np.testing.assert_array_equal(beside, np.asarray(shown.picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC)))


def events(folder) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


def test_questions_to_draw_are_of_all_kinds(questions):
    picked = pick_questions(questions, 6)
    assert picked == sorted(picked) and len({questions[place].category for place in picked}) == 6
    assert all(questions[place].boxes for place in picked)


@pytest.mark.parametrize("wrong", [{"questions": []}, {"contestants": []}, {"contestants": CONTESTANTS[:1] * 2}])
def test_a_contest_of_nothing_is_refused(wrong, questions):
    with pytest.raises(InputError, match="expected at least one question, contestants with labels of their own"):
        run_contest(model(), **{"questions": questions, "contestants": CONTESTANTS} | wrong)


def test_the_shipped_file_has_base_first_and_an_ablation_that_differs_in_its_candidates_alone():
    lineup = read_lineup(METHODS_FILE)
    assert lineup.contestants[0].method == Method()
    methods = {one.label: one.method for one in lineup.contestants}
    assert {method.name for method in methods.values()} >= {
        "second-look", "random-crop", "centre-crop", "evidence-crop", "contrastive", "review-mask", "vicrop", "carve",
        "vcd", "dola", "opera",
    }  # fmt: skip
    assert {method.map for method in methods.values() if method.name == "vicrop"} == {
        "rel-att", "grad-att", "pure-grad",
    }  # fmt: skip
    ablation = [one.method for one in lineup.contestants if one.group == "candidates"]
    assert {method.candidates for method in ablation} == {"all", "deep", "shallow", "fusion"}
    paper = methods["contrastive paper"]
    assert paper.candidates == "fusion" and paper.pre is None and paper.post == "last"
    assert {dataclasses.replace(method, candidates="fusion") for method in ablation} == {paper}


def test_what_was_tuned_is_said_with_the_choice(tmp_path):
    path = tmp_path / "methods.toml"
    path.write_text(
        'fusion_layers = [1]\n[main]\nbase = "base"\ncentre = "centre-crop:share=0.5"\nours = "contrastive"\n'
        '[tuning]\nquestions = 80\nseed = 3\nrule = "the best"\n[tuning.tried]\ncentre = "share: 0.3, 0.5"\n'
    )
    lineup = read_lineup(path)
    assert lineup.tuning_lines() == [
        "Tuned on 80 questions of the validation split, seed 3: the best.",
        "centre: tried share: 0.3, 0.5; chosen centre-crop:share=0.5",
    ]
    assert lineup.contestants[2].method.fusion_layers == (1,) == lineup.fusion_layers
    assert read_lineup(written(path, '[main]\nbase = "base"\n')).tuning_lines() == [
        "Nothing was tuned: all options are at the values of the file."
    ]


def written(path, text):
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[main", "cannot be read"),
        ("[tuning]\nquestions = 3\n", "holds no methods"),
        ('[main]\nbase = "base"\n[other]\nbase = "vcd"\n', "'base' is there twice"),
        ("[main]\nbase = 3\n", "expected a method in words"),
        ('base = "base"\n', "base is no table"),
        ('[main]\nbase = "baze"\n', "no method 'baze'"),
        ('[main]\nbase = "base"\n[tuning]\nhow = "x"\n', r"\[tuning\] cannot be read"),
        ('[main]\nbase = "base"\n[tuning.tried]\nvcd = "x"\n', "tells of vcd, which no group has"),
    ],
)
def test_a_bad_file_is_told(text, message, tmp_path):
    with pytest.raises(InputError, match=message):
        read_lineup(written(tmp_path / "methods.toml", text))


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(InputError, match=r"none\.toml: cannot be read"):
        read_lineup(tmp_path / "none.toml")
