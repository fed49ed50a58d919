"""InstructBLIP's processor against transformers', which places image tokens before everything else."""

import copy
import json
import shutil

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BlipImageProcessorPil, PreTrainedTokenizerFast
from transformers import InstructBlipProcessor as Reference

import jaxmllm
from jaxmllm.convert.store import PROCESSOR_FILES
from jaxmllm.errors import ProcessorError
from jaxmllm.model import convert_checkpoint
from jaxmllm.processing import append_answers, encode_answers, load_processor, make_prompt, prompt_lengths
from tests.support import tiny
from tests.support.families import instructblip

WORDS = ("<unk>", "<s>", "</s>", "[PAD]", "ASSISTANT:", "what", "is", "left", "of", "it", "?", "red", "dark")
QFORMER_WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "?", "it", "of", "left", "is", "what")
PLACEHOLDER, TOKENS = len(WORDS), instructblip.INSTRUCTBLIP["num_query_tokens"]
LONG, SHORT = "what is left of it ?", "what ?"


def word_tokenizer(words, unknown, start, end, **named) -> PreTrainedTokenizerFast:
    ids = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}".strip(), special_tokens=[(token, ids[token]) for token in (start, end) if token]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=unknown, model_input_names=["input_ids", "attention_mask"], **named
    )


def reference(**changes) -> Reference:
    size = instructblip.VISION["image_size"]
    text = word_tokenizer(
        WORDS, "<unk>", "<s>", "", bos_token="<s>", eos_token="</s>", pad_token="[PAD]", padding_side="left"
    )
    asked = word_tokenizer(QFORMER_WORDS, "[UNK]", "[CLS]", "[SEP]", pad_token="[PAD]", padding_side="right")
    images = BlipImageProcessorPil(size={"height": size, "width": size})
    return Reference(images, text, asked, **{"num_query_tokens": TOKENS} | changes)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    fields = copy.deepcopy(instructblip.VARIANTS["instructblip_cross_seldom"]) | {"image_token_index": PLACEHOLDER}
    tiny.make_torch(fields).save_pretrained(folder)
    reference().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(checkpoint):
    return jaxmllm.load(checkpoint)


@pytest.fixture(scope="module")
def theirs(checkpoint):
    return Reference.from_pretrained(checkpoint)


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (30, 40, 3), dtype=np.uint8))


def assert_same(got, expected):
    assert set(got) == set(expected)
    for name in got:
        np.testing.assert_array_equal(got[name], expected[name], err_msg=name)
        assert got[name].dtype == expected[name].dtype, name


# --- against the processor itself -------------------------------------------------------------------------------------


@pytest.mark.parametrize("questions", [[LONG], [LONG, SHORT], [SHORT, SHORT]])
def test_one_image_a_prompt_gives_the_arrays_of_transformers(model, theirs, questions):
    images = [picture(number) for number in range(len(questions))]
    options = {"padding": True, "padding_side": "right", "return_tensors": "np"}
    assert_same(model.prepare(images, questions, "right"), theirs(images=images, text=questions, **options))


def test_padding_on_the_left_moves_the_decoders_text_alone(model, theirs):
    images, questions = [picture(0), picture(1)], [SHORT, LONG]
    got = dict(model.prepare(images, questions))  # the tokenizer's side is left
    expected = dict(theirs(images=images, text=questions, padding=True, return_tensors="np"))
    asked = {name: got.pop(name) for name in ("qformer_input_ids", "qformer_attention_mask")}
    moved = {name: expected.pop(name) for name in asked}
    assert_same(got, expected)
    # transformers moves the Q-Former's words to later positions as well, which changes what they mean
    assert moved["qformer_attention_mask"].tolist() == [[0] * 4 + [1] * 4, [1] * 8]
    for row, question in enumerate(questions):
        alone = theirs(images=images[row], text=[question], return_tensors="np")
        words = asked["qformer_attention_mask"][row].astype(bool)
        assert words.tolist() == sorted(words, reverse=True)
        np.testing.assert_array_equal(asked["qformer_input_ids"][row][words], alone["qformer_input_ids"][0])


def test_numbers_depend_neither_on_the_side_nor_on_the_batch(model):
    images, questions = [picture(0), picture(1)], [SHORT, LONG]

    def last(*inputs):
        return np.asarray(model.forward(model.params, model.prepare(*inputs), logits_at="last").logits)

    left, right = last(images, questions, "left"), last(images, questions, "right")
    np.testing.assert_allclose(left, right, atol=1e-5, rtol=0)
    np.testing.assert_allclose(left[:1], last(images[:1], questions[:1]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_several_images_repeat_the_question_and_prompts_without_have_none(model, side):
    got = model.prepare([[picture(0), picture(1)], [], picture(2)], [LONG, SHORT, SHORT], side)
    shape = {name: array.shape[0] for name, array in got.items()}
    assert shape == dict.fromkeys(("input_ids", "attention_mask"), 3) | dict.fromkeys(
        ("pixel_values", "qformer_input_ids", "qformer_attention_mask"), 3
    )
    asked = got["qformer_input_ids"]
    np.testing.assert_array_equal(asked[0], asked[1])
    assert asked[2].tolist() == [2, QFORMER_WORDS.index("what"), QFORMER_WORDS.index("?"), 3, 0, 0, 0, 0]
    for row, (count, question) in enumerate(((2, LONG), (0, SHORT), (1, SHORT))):
        ids = got["input_ids"][row][got["attention_mask"][row].astype(bool)].tolist()
        assert ids == [PLACEHOLDER] * (count * TOKENS) + [1, *[WORDS.index(word) for word in question.split()]]
    assert np.isfinite(np.asarray(model.forward(model.params, got, logits_at="last").logits)).all()


def test_prompts_without_any_image_have_no_image_arrays(model, theirs):
    expected = theirs(text=[LONG, SHORT], padding=True, return_tensors="np")
    names = ("input_ids", "attention_mask")
    assert_same(dict(model.prepare([[], []], [LONG, SHORT])), {name: expected[name] for name in names})


def test_the_prompt_is_the_plain_question_behind_its_images(model):
    processor = model.processor
    assert make_prompt(processor, LONG, 2) == f"<image>\n<image>\n{LONG}"
    whole = model.prepare([picture(0)], [f"<image>{LONG}"])
    assert_same(dict(whole), dict(model.prepare([picture(0)], [LONG])))
    assert prompt_lengths(processor, [LONG, SHORT]) == [(0, 7), (0, 3)]
    with pytest.raises(ProcessorError, match="holds <image> behind text"):
        model.prepare([picture(0)], ["what <image> ?"])


def test_answers_follow_the_question(model):
    answers = encode_answers(model.processor, ["dark red"])
    batch = append_answers(model.prepare([picture(0)], [SHORT]), answers)
    dark, red = WORDS.index("dark"), WORDS.index("red")
    assert batch["input_ids"][0].tolist()[-3:] == [WORDS.index("?"), dark, red]
    assert model.forward(model.params, batch, logits_at="answer").logits.shape[:2] == (1, 2)


def test_processors_are_told_how_many_placeholders_there_are(model):
    with pytest.raises(ProcessorError, match=r"hold 1 <image> for 2 image\(s\)"):
        model.processor(images=[picture(0), picture(1)], text=[f"<image>\n{SHORT}"])


# --- files ------------------------------------------------------------------------------------------------------------


def test_files_that_name_neither_placeholder_nor_query_tokens_give_the_same_arrays(checkpoint, model, tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(checkpoint / name, tmp_path)
    parts = reference()
    bare = word_tokenizer(WORDS, "<unk>", "<s>", "", bos_token="<s>", pad_token="[PAD]", padding_side="left")
    bare.save_pretrained(tmp_path)
    parts.qformer_tokenizer.save_pretrained(tmp_path / "qformer_tokenizer")
    parts.image_processor.save_pretrained(tmp_path)
    assert "<image>" not in (tmp_path / "tokenizer.json").read_text()
    images, questions = [picture(0), picture(1)], [LONG, SHORT]
    assert_same(dict(jaxmllm.load(tmp_path).prepare(images, questions)), dict(model.prepare(images, questions)))


def test_a_folder_without_the_qformers_tokenizer_is_an_error(checkpoint, model, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "bare", ignore=shutil.ignore_patterns("qformer_tokenizer"))
    with pytest.raises(ProcessorError, match=r"qformer_tokenizer/ is missing"):
        load_processor(folder, model.config)


def test_a_placeholder_that_is_not_the_configs_is_an_error(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "other")
    fields = json.loads((folder / "config.json").read_text()) | {"image_token_index": PLACEHOLDER + 1}
    (folder / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ProcessorError, match=f"<image> the id {PLACEHOLDER}; config.json says {PLACEHOLDER + 1}"):
        _ = jaxmllm.load(folder).processor


def test_a_store_carries_both_tokenizers(checkpoint, model, tmp_path):
    assert "qformer_tokenizer/tokenizer.json" in PROCESSOR_FILES
    convert_checkpoint(checkpoint, tmp_path / "store")
    stored = jaxmllm.load(tmp_path / "store")
    assert_same(dict(stored.prepare([picture(0)], [LONG])), dict(model.prepare([picture(0)], [LONG])))
