"""The benchmarks' metrics: cases worked out by hand from the official evaluators' source, and properties."""

import dataclasses
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmllm.data import metrics
from jaxmllm.data.metrics import (
    anls,
    evalai_normalise,
    gqa_match,
    mmbench_accuracies,
    mmbench_circular,
    mmbench_option,
    okvqa_accuracy,
    pope_label,
    pope_scores,
    textvqa_accuracy,
    vizwiz_accuracy,
    vqa_accuracy,
    vqa_normalise,
)
from jaxmllm.data.metrics.contractions import CONTRACTIONS
from jaxmllm.errors import InputError

LEAVE_ONE_OUT = [vqa_accuracy, textvqa_accuracy, vizwiz_accuracy, okvqa_accuracy]
# Mean over ten answers of min(1, others that match / 3), by how many of the ten match.
SCORE_OF_MATCHES = {0: 0.0, 1: 0.3, 2: 0.6, 3: 0.9, 4: 1.0, 10: 1.0}

few_texts = settings(max_examples=40, deadline=None)
pieces = st.sampled_from(
    [*list(".,;'?!-/ABZÉßİ½٣ \n\t\xa0"), "a", "the", "two", "None", "cat", "dont", "Im", "hes", "3,000", "1.5", "it's"]
)
texts = st.lists(pieces, max_size=8).map("".join)
tens = st.lists(texts, min_size=10, max_size=10)


def table(names, rows):
    """Parametrizes a test with {why: (arguments, ...)}."""
    return pytest.mark.parametrize(names, [pytest.param(*row, id=why) for why, row in rows.items()])


def as_dicts(answers, **more):
    return [{"answer": answer, "answer_id": i + 1, **more} for i, answer in enumerate(answers)]


# Normalisation ------------------------------------------------------------------------------------------------------

NORMALISED_ALIKE = {
    "empty": ("", ""),
    "lowered": ("YES", "yes"),
    "only articles": ("The a AN", ""),
    "number word": ("ten", "10"),
    "none is a number": ("None", "0"),
    "eleven is not on the list": ("eleven", "eleven"),
    "number word inside a word stays": ("someone", "someone"),
    "article by its punctuation": ("a-frame", "frame"),
    "mark without a space becomes one": ("black/white", "black white"),
    "mark with a space vanishes": ("black/ white", "black white"),
    "a space by one mark makes all of that kind vanish": ("a/b /c", "ab c"),
    "kinds of mark are judged apart": ("x/y -z", "x y z"),
    "space by a mark is seen in the text as given": ("x-/ y", "x y"),
    "space put in for one mark does not count for the next": ("x;/y", "x y"),
    "marks not on the list stay": ("5:30 & #1 *$2 50%", "5:30 & #1 *$2 50%"),
    "typographic apostrophe is no mark": ("don\u2019t", "don\u2019t"),
    "period before a digit stays": ("3.5", "3.5"),
    "period at the end goes": ("3.", "3"),
    "period after a digit goes": ("3.x", "3x"),
    "period before a digit stays after a letter": ("x.5", "x.5"),
    "period at the start before a digit stays": (".5", ".5"),
    "periods between letters go": ("U.S.A.", "usa"),
    "of two periods the one before the digit stays": ("1..5", "1.5"),
    "period before a superscript goes, for it is no digit": ("1.²", "1²"),
    "period before an Arabic digit stays": ("1.٣", "1.٣"),
    "only 32 periods go": ("." * 40, "." * 8),
    "contraction": ("dont", "don't"),
    "contraction half written": ("couldn'tve", "couldn't've"),
    "contraction that loses its apostrophe": ("somebody'd", "somebodyd"),
    "capitalised key never fires": ("Im Ive", "im ive"),
    "contraction is written out once": ("somebodyd've", "somebody'd've"),
    "white space of any kind separates words": ("x\xa0\u3000y", "x y"),
}
NORMALISED_VQA = {
    "comma between digits makes every mark vanish": ("1,000-a/b", "1000ab"),
    "comma between other signs is a mark like any other": ("red,blue", "red blue"),
    "comma before a space vanishes": ("red, blue", "red blue"),
    "comma between a digit and a letter": ("1,x", "1 x"),
    "question mark becomes a space": ("x?y", "x y"),
    "apostrophe stays": ("dog's", "dog's"),
    "contraction with 's": ("hes", "he's"),
    "break is white space between words": ("x\ny", "x y"),
    "break by a mark is not a space": ("x-\ny", "x y"),
}
NORMALISED_EVALAI = {
    "comma in a number goes first": ("1,000", "1000"),
    "so marks beside it are spaced": ("1,000-x", "1000 x"),
    "comma without a space joins words": ("red,blue", "redblue"),
    "question mark joins words": ("x?y", "xy"),
    "'s stands apart": ("dog's", "dog 's"),
    "'s in capitals too": ("DOG'S", "dog 's"),
    "contraction with 's is not split again": ("hes", "he's"),
    "let's is split before it is looked up": ("let's", "let 's"),
    "'s makes space before a mark that follows nothing": ("-'s", "'s"),
    "break by a mark is a space": ("x-\ny-z", "x yz"),
}


@table("text, expected", NORMALISED_ALIKE)
@pytest.mark.parametrize("normalise", [vqa_normalise, evalai_normalise])
def test_both_normalisations(normalise, text, expected):
    assert normalise(text) == expected


@table("text, expected", NORMALISED_VQA)
def test_vqav2s_normalisation(text, expected):
    assert vqa_normalise(text) == expected


@table("text, expected", NORMALISED_EVALAI)
def test_evalais_normalisation(text, expected):
    assert evalai_normalise(text) == expected


def test_contractions_are_the_published_list():
    assert len(CONTRACTIONS) == 120
    assert [key for key in CONTRACTIONS if key != key.lower()] == ["Id've", "I'dve", "Im", "Ive"]
    assert [key for key, value in CONTRACTIONS.items() if key == value] == ["let's", "she's"]


@few_texts
@given(texts)
def test_vqav2s_normalisation_is_idempotent(text):
    once = vqa_normalise(text)
    assert vqa_normalise(once) == once


def test_normalisation_is_not_idempotent_where_its_warts_say_so():
    assert vqa_normalise(vqa_normalise("." * 40)) == ""
    assert evalai_normalise(evalai_normalise("hes")) == "he 's"


# Leave-one-out accuracies -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accuracy", LEAVE_ONE_OUT)
@pytest.mark.parametrize("matches", SCORE_OF_MATCHES)
def test_score_by_the_number_of_answers_that_match(accuracy, matches):
    answers = ["red"] * matches + [f"other {i}" for i in range(10 - matches)]
    assert accuracy("red", answers) == pytest.approx(SCORE_OF_MATCHES[matches], abs=1e-12)


@pytest.mark.parametrize("accuracy", LEAVE_ONE_OUT)
@table("prediction, answers, expected", {
    "both sides are normalised": ("The two.", ["2", "TWO", "a two", "two!"] + ["3"] * 6, 1.0),
    "empty prediction": ("", ["red"] * 9 + ["blue"], 0.0),
    "empty prediction meets answers that come to nothing": ("", ["the", "a", "", " "] + ["red"] * 6, 1.0),
    "white space": ("\n red\tcar ", ["red car"] * 4 + ["x"] * 6, 1.0),
    "unanswerable is an answer": ("unanswerable", ["unanswerable"] * 2 + ["x"] * 8, 0.6),
})  # fmt: skip
def test_answers_that_differ_are_normalised_by_all(accuracy, prediction, answers, expected):
    assert accuracy(prediction, answers) == pytest.approx(expected, abs=1e-12)


@table("prediction, answer, vqa", {
    "case": ("Yes", "yes", 0.0),
    "number word": ("two", "2", 0.0),
    "article": ("the cat", "cat", 0.0),
    "period": ("cat.", "cat", 0.0),
    "ends": (" cat\n", "\tcat ", 1.0),
    "newline within": ("red\ncar", "red car", 1.0),
    "two newlines are two spaces": ("red\n\ncar", "red car", 0.0),
})  # fmt: skip
def test_only_vqav2_compares_raw_where_all_answers_agree(prediction, answer, vqa):
    assert vqa_accuracy(prediction, [answer] * 10) == vqa
    for accuracy in (textvqa_accuracy, vizwiz_accuracy, okvqa_accuracy):
        assert accuracy(prediction, [answer] * 10) == 1.0


def test_vqav2_looks_for_agreement_before_it_normalises():
    # Nine "yes" and one "Yes" differ as given, so both sides are normalised and all ten agree with "YES".
    assert vqa_accuracy("YES", ["yes"] * 9 + ["Yes"]) == 1.0
    # Given with breaks or blanks at their ends they are the same text, so nothing is normalised.
    assert vqa_accuracy("YES", ["yes"] * 9 + ["yes\n"]) == 0.0


def test_vqav2s_commas_differ_from_textvqas():
    answers = ["1,000 people"] * 5 + ["lots"] * 5
    assert vqa_accuracy("1000 people", answers) == textvqa_accuracy("1000 people", answers) == 1.0
    answers = ["red,blue"] * 5 + ["lots"] * 5
    assert (vqa_accuracy("red blue", answers), textvqa_accuracy("red blue", answers)) == (1.0, 0.0)


def test_vqav2s_others_differ_as_dicts():
    answers = ["red"] * 4 + ["blue"] * 6
    assert vqa_accuracy("red", as_dicts(answers)) == vqa_accuracy("red", answers) == 1.0
    # Without ids, equal dicts leave each other out: the four "red" see no match, the six "blue" see four.
    assert vqa_accuracy("red", [{"answer": answer} for answer in answers]) == pytest.approx(0.6)
    assert vqa_accuracy("red", [{"answer": "red"}] * 10) == 0.0
    # Two kinds of "red" see each other only (2 of 3, twice two), the "blue" all four.
    sure = [{"answer": "red", "answer_confidence": confidence} for confidence in ("yes", "yes", "no", "no")]
    assert vqa_accuracy("red", [*sure, *as_dicts(["blue"] * 6)]) == pytest.approx((4 * 2 / 3 + 6) / 10)
    # Equality is asked after normalising: "The red" and "red" become the same dict.
    assert vqa_accuracy("red", [{"answer": "The red"}, {"answer": "red"}, {"answer": "blue"}]) == pytest.approx(2 / 9)


def test_answers_given_are_left_as_they_were():
    answers = as_dicts([" The two.\n"] * 4 + ["x"] * 6)
    vqa_accuracy("2", answers)
    assert answers[0] == {"answer": " The two.\n", "answer_id": 1}


@pytest.mark.parametrize(
    "count, matches, expected",
    [(1, 1, 0.0), (2, 2, 1 / 3), (3, 1, 2 / 9), (4, 4, 1.0), (5, 2, (2 * 1 / 3 + 3 * 2 / 3) / 5), (11, 3, 10 / 11)],
)
def test_any_number_of_answers_is_taken_but_by_textvqa(count, matches, expected):
    answers = ["red"] * matches + ["blue"] * (count - matches)
    for accuracy in (vqa_accuracy, vizwiz_accuracy, okvqa_accuracy):
        assert accuracy("red", answers) == pytest.approx(expected, abs=1e-12)
    with pytest.raises(InputError, match=f"exactly 10 answers, got {count}"):
        textvqa_accuracy("red", answers)


def test_no_answers_score_nothing_where_the_original_allows_them():
    assert vizwiz_accuracy("", []) == okvqa_accuracy("", []) == 0.0
    with pytest.raises(InputError, match="exactly 10 answers, got 0"):
        textvqa_accuracy("", [])
    with pytest.raises(InputError, match="at least one answer"):
        vqa_accuracy("", [])
    with pytest.raises(InputError, match="at least one answer"):
        anls("", [])


@pytest.mark.parametrize("accuracy", [*LEAVE_ONE_OUT, anls])
def test_one_text_is_not_a_list_of_answers(accuracy):
    with pytest.raises(InputError, match="put it in a list"):
        accuracy("yes", "tenletters")


@pytest.mark.parametrize("bad", [{}, {"answer": None}, {"answer": 2}])
def test_official_dicts_need_an_answer(bad):
    with pytest.raises(InputError, match=r"answers\[1\] must be a text or a dict with a text under 'answer'"):
        vqa_accuracy("yes", [{"answer": "yes"}, bad])


@pytest.mark.parametrize("accuracy", LEAVE_ONE_OUT)
@few_texts
@given(data=st.data(), answers=tens)
def test_accuracies_lie_in_range_and_do_not_see_the_order(accuracy, data, answers):
    prediction = data.draw(st.sampled_from(answers) | texts)
    score = accuracy(prediction, answers)
    assert type(score) is float
    assert 0 <= score <= 1
    assert accuracy(prediction, data.draw(st.permutations(answers))) == pytest.approx(score, abs=1e-12)
    # Only five scores can come of ten answers; the running sum may miss their last digit.
    assert min(abs(score - possible) for possible in SCORE_OF_MATCHES.values()) < 1e-12


@few_texts
@given(texts, tens)
def test_ids_and_indices_tell_answers_apart_alike(prediction, answers):
    assert vqa_accuracy(prediction, answers) == vqa_accuracy(prediction, as_dicts(answers, answer_confidence="yes"))


# DocVQA and GQA -----------------------------------------------------------------------------------------------------


@table("prediction, answers, expected", {
    "same": ("cat", ["cat"], 1.0),
    "case and white space do not count": (" The\n CAT ", ["the cat"], 1.0),
    "one substitution in four": ("cats", ["cars"], 0.75),
    "one insertion": ("cat", ["cats"], 0.75),
    "a half is kept": ("ab", ["ax"], 0.5),
    "less than a half is 0": ("abc", ["axy"], 0.0),
    "best of the answers": ("cat", ["dog", "cart", ""], 0.75),
    "empty against empty": ("", [""], 1.0),
    "empty against text": ("", ["a"], 0.0),
    "blank against empty": ("  ", [""], 1.0),
    "divided by the raw length": ("ab  ", ["xb"], 0.75),
    "raw length of the answer too": ("xb", ["a     b"], pytest.approx(1 - 2 / 7)),
    "measured in capitals, in which ß is two": ("ß", ["s"], 0.5),
    "lowered İ is two, its capital one: a distance of two over one": ("İ", ["x"], 0.0),
    "punctuation counts": ("$1,000", ["1000"], pytest.approx(1 - 2 / 6)),
    "transposition costs two": ("form", ["from"], 0.5),
})  # fmt: skip
def test_anls(prediction, answers, expected):
    assert anls(prediction, answers) == expected


@few_texts
@given(data=st.data(), answers=st.lists(texts, min_size=1, max_size=4))
def test_anls_lies_in_range_and_does_not_see_the_order(data, answers):
    prediction = data.draw(st.sampled_from(answers) | texts)
    score = anls(prediction, answers)
    assert type(score) is float
    assert score == 0 or 0.5 <= score <= 1
    assert anls(prediction, data.draw(st.permutations(answers))) == score
    assert anls(answers[0], answers) == 1
    assert anls(answers[0], [prediction]) == anls(prediction, [answers[0]])


@table("prediction, answer, expected", {
    "same": ("yes", "yes", 1.0),
    "lowered": ("YES", "yes", 1.0),
    "every period off the end": ("Yes...", "yes", 1.0),
    "period at the start stays": (".yes", "yes", 0.0),
    "space at the end stays": ("yes ", "yes", 0.0),
    "period before a space stays": ("yes. ", "yes", 0.0),
    "article stays": ("the cat", "cat", 0.0),
    "answer is not lowered": ("yes", "Yes", 0.0),
    "answer keeps its period": ("yes.", "yes.", 0.0),
    "both empty": (".", "", 1.0),
})  # fmt: skip
def test_gqa(prediction, answer, expected):
    score = gqa_match(prediction, answer)
    assert type(score) is float
    assert score == expected


# MMBench ------------------------------------------------------------------------------------------------------------

PETS = {"A": "a dog", "B": "a Cat", "C": "None", "D": "NA"}


@table("prediction, expected", {
    "letter": ("B", "B"),
    "letter and text": ("B. a cat", "B"),
    "letter in brackets": ("(C)", "C"),
    "letter in stars": ("**D**", "D"),
    "other marks stay on the word": ("'B' \"B\" B?", None),
    "small letter is none": ("b", None),
    "letter beyond the options": ("E", None),
    "two letters": ("A or B", None),
    "the same letter twice": ("B, that is B", "B"),
    "article at the start taken for the option": ("A mouse", "A"),
    "letter fourth from the end": ("B is it, surely", "B"),
    "letter fifth from the end is too far": ("B is what I say", None),
    "where a letter first stands counts": ("B is what I say: B", None),
    "refusal": ("Cannot determine the answer", "Z"),
    "refusal before a letter": ("I can't process this file. B", "Z"),
    "refusal in another case is none": ("cannot determine the answer", None),
    "Z": ("Z.", "Z"),
    "Z beside a letter": ("Z B", "B"),
    "answer is": ("I'd say the answer is C, for A and B are not in the image at all", "C"),
    "answer is, in any case and stars": ("A or B? The Answer  IS **b**", "B"),
    "answer is the start of a word": ("the answer is black", "B"),
    "answer is an article": ("the answer is a mouse", "A"),
    "answer beyond D is passed over": ("A? the answer is E? answer is B? I mean A or B", "B"),
    "answer: is not it": ("A or B, answer: B", None),
    "text": ("i see a cat", "B"),
    "text in capitals, its letter too early": ("A CAT it is not without reason", "B"),
    "text in a word": ("a doghouse", "A"),
    "two texts": ("a dog, a cat", None),
    "None is an option": ("none", "C"),
    "NA is an option, found in any word": ("banana", "D"),
    "text in a reply of twice the options' length": ("it is a cat" + "." * 21, "B"),
    "text in a longer reply": ("it is a cat" + "." * 22, None),
    "failed call skips the letters": ("Failed to obtain answer via API B", None),
    "empty": ("", None),
})  # fmt: skip
def test_mmbench_option(prediction, expected):
    assert mmbench_option(prediction, PETS) == expected


def test_mmbench_option_depends_on_the_options_there_are():
    assert mmbench_option("the answer is D", {"A": "x", "B": "y"}) is None
    assert mmbench_option("the answer is D or the answer is B if you ask me", {"A": "1", "B": "2"}) is None
    assert mmbench_option("C", {"A": "x", "B": "y"}) is None
    assert mmbench_option("Z", {"A": "x", "Z": "y"}) == "Z"
    assert mmbench_option("what", {"A": "", "B": "dog"}) == "A", "an empty option is in every reply"
    assert mmbench_option("dog", {"A": "", "B": "dog"}) is None
    assert mmbench_option("Failed to obtain answer via API", {"A": "failed to obtain", "B": "x"}) == "A"
    assert mmbench_option("anything", {}) is None


def test_mmbench_option_leaves_the_options_as_they_were():
    choices = dict(PETS)
    mmbench_option("a cat", choices)
    assert choices == PETS


@pytest.mark.parametrize("letter", ["a", "AB", "", "1", "Ä"])
def test_options_go_by_capital_letters(letter):
    with pytest.raises(InputError, match="one capital letter"):
        mmbench_option("B", {"B": "x", letter: "y"})


@few_texts
@given(texts, st.dictionaries(st.sampled_from("ABCDEF"), texts))
def test_mmbench_option_is_one_of_the_options_or_z_or_none(prediction, choices):
    assert mmbench_option(prediction, choices) in {*choices, "Z", None}


def rows(**flags):
    return [{"index": int(name.removeprefix("i")), "correct": flag} for name, flag in flags.items()]


@table("given_rows, expected", {
    "all right": (rows(i3=True, i1000003=True), (1.0, 1.0, 1.0)),
    "a rotation wrong": (rows(i3=True, i1000003=False, i4=True), (0.5, 1.0, 2 / 3)),
    "the base wrong": (rows(i3=False, i1000003=True, i2000003=True, i4=True), (0.5, 0.5, 0.75)),
    "groups of one": (rows(i1=True, i2=False), (0.5, 0.5, 0.5)),
    "rotation first, flags as numbers": (rows(i1000007=0, i7=1), (0.0, 1.0, 0.5)),
    "rotation without its base": (rows(i1=True, i1000002=False), (1.0, 1.0, 0.5)),
    "index 0": (rows(i0=True, i1000000=True), (1.0, 1.0, 1.0)),
})  # fmt: skip
def test_mmbench_circular(given_rows, expected):
    assert dataclasses.astuple(mmbench_accuracies(iter(given_rows))) == pytest.approx(expected)
    assert mmbench_circular(iter(given_rows)) == pytest.approx(expected[0])


@table("given_rows, fault", {
    "no rows": ([], "expected rows of base questions"),
    "no base": (rows(i1000002=True), "expected rows of base questions"),
    "twice": (rows(i5=True) * 2, "index 5 comes twice"),
    "no index": ([{"correct": True}], "a row needs 'index'"),
    "no flag": ([{"index": 3}], "a row needs 'index'"),
    "index is text": ([{"index": "3", "correct": True}], "a row needs 'index'"),
    "index is negative": ([{"index": -3, "correct": True}], "a row needs 'index'"),
    "flag is text": ([{"index": 3, "correct": "no"}], "a row needs 'index'"),
})  # fmt: skip
def test_bad_rows_are_named(given_rows, fault):
    with pytest.raises(InputError, match=fault):
        mmbench_circular(given_rows)


@few_texts
@given(st.dictionaries(st.tuples(st.integers(1, 4), st.integers(0, 3)), st.booleans()), st.randoms())
def test_circular_is_at_most_vanilla_and_does_not_see_the_order(flags, random):
    flags |= {(base, 0): flags.get((base, 0), False) for base, _ in flags} | {(9, 0): True}
    given_rows = [{"index": base + turn * 1_000_000, "correct": flag} for (base, turn), flag in flags.items()]
    scores = mmbench_accuracies(given_rows)
    bases = {base for base, _ in flags}
    whole = [all(flag for (base, _), flag in flags.items() if base == one) for one in bases]
    assert scores.circular == pytest.approx(sum(whole) / len(whole))
    assert 0 < scores.circular <= scores.vanilla <= 1
    assert 0 < scores.vanilla_all <= 1
    random.shuffle(given_rows)
    assert mmbench_accuracies(given_rows) == scores


# POPE ---------------------------------------------------------------------------------------------------------------


@table("prediction, expected", {
    "no": ("no", "no"),
    "No with a comma": ("No, there is not", "no"),
    "not": ("There is not a dog", "no"),
    "no anywhere in the sentence": ("There is no dog.", "no"),
    "no after the first period": ("I see. no", "yes"),
    "nothing before the first period": (".no", "yes"),
    "NO is not on the list": ("NO", "yes"),
    "Not is not on the list": ("Not at all", "yes"),
    "no with an exclamation mark": ("no!", "yes"),
    "no after a newline": ("\nno", "yes"),
    "no after two spaces": ("well,  no", "no"),
    "a comma joins": ("yes,no", "yes"),
    "a comma within": ("n,o", "no"),
    "no in a word": ("nothing", "yes"),
    "empty": ("", "yes"),
    "anything": ("banana", "yes"),
})  # fmt: skip
def test_pope_label(prediction, expected):
    assert pope_label(prediction) == expected
    assert pope_label(pope_label(prediction)) == expected


@table("labels, predictions, expected", {
    "one of each": (["yes", "yes", "no", "no"], ["Yes.", "no", "Yes", "No"], (0.5, 0.5, 0.5, 0.5, 0.5)),
    "all right": (["yes", "no"], ["yes", "no"], (1.0, 1.0, 1.0, 1.0, 0.5)),
    "always yes": (["yes", "no", "no", "no"], ["", "x", "y", "z"], (0.25, 0.25, 1.0, 0.4, 1.0)),
    "never yes": (["yes", "no"], ["no", "no"], (0.5, 0.0, 0.0, 0.0, 0.0)),
    "no label yes": (["no", "no"], ["yes", "no"], (0.5, 0.0, 0.0, 0.0, 0.5)),
    "no yes at all": (["no"], ["no"], (1.0, 0.0, 0.0, 0.0, 0.0)),
    "never right": (["yes", "no"], ["no", "yes"], (0.0, 0.0, 0.0, 0.0, 0.5)),
    "label other than no is positive": (["Yes", "No"], ["yes", "yes"], (1.0, 1.0, 1.0, 1.0, 1.0)),
})  # fmt: skip
def test_pope_scores(labels, predictions, expected):
    assert dataclasses.astuple(pope_scores(labels, predictions)) == pytest.approx(expected)


@pytest.mark.parametrize("labels, predictions", [(["yes"], []), (["yes"], ["yes", "no"]), ([], [])])
def test_pope_scores_need_a_prediction_a_label(labels, predictions):
    with pytest.raises(InputError, match=r"expected a prediction for each|at least one question"):
        pope_scores(labels, predictions)


@few_texts
@given(st.lists(st.tuples(st.sampled_from(["yes", "no"]), texts | st.just("no")), min_size=1, max_size=12))
def test_pope_scores_lie_in_range_and_take_replies_read_already(pairs):
    labels, predictions = [label for label, _ in pairs], [text for _, text in pairs]
    scores = pope_scores(labels, predictions)
    assert all(type(value) is float and 0 <= value <= 1 for value in dataclasses.astuple(scores))
    assert pope_scores(labels, list(map(pope_label, predictions))) == scores
    assert pope_scores(labels[::-1], predictions[::-1]) == scores


# The package --------------------------------------------------------------------------------------------------------


def test_public_names_are_there():
    assert metrics.__all__ == sorted(metrics.__all__)
    assert all(callable(getattr(metrics, name)) for name in metrics.__all__)


def test_import_brings_no_heavy_library():
    code = (
        "import sys, jaxmllm.data.metrics; "
        "assert not {'jax', 'torch', 'transformers', 'numpy', 'PIL'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
