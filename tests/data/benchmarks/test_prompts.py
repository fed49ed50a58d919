"""Prompts: what each benchmark and family is asked in, and templates of one's own."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmllm.data.benchmarks import BENCHMARKS
from jaxmllm.data.benchmarks.base import Example
from jaxmllm.data.prompts import fill_prompt, prompt_template
from jaxmllm.errors import InputError
from jaxmllm.models.registry import FAMILIES

SHORT = "\nAnswer the question using a single word or phrase."
UNSURE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."


def example(text="What is it?", **fields):
    return Example("1", "a, line 1", "a.jpg", text, None, fields=fields)


def ask(benchmark, family, **options):
    one = example(ocr="STOP, 3", hint="Look.", options="A. x\nB. y")
    return fill_prompt(prompt_template(benchmark, family, **options), one, "<image>")


@pytest.mark.parametrize(
    "benchmark, expected",
    {
        "gqa": f"What is it?{SHORT}",
        "vqav2": f"What is it?{SHORT}",
        "okvqa": f"What is it?{UNSURE}{SHORT}",
        "vizwiz": f"What is it?{UNSURE}{SHORT}",
        "textvqa": f"What is it?{SHORT}",
        "textvqa-ocr": f"What is it?\nReference OCR token: STOP, 3{SHORT}",
        "docvqa": f"What is it?{SHORT}",
        "mmbench": "Look.\nWhat is it?\nA. x\nB. y\nAnswer with the option's letter from the given choices directly.",
        "pope": f"What is it?{SHORT}",
        "llava": "What is it?",
        "scenes": "What is it?",
    }.items(),
)
def test_prompts_are_the_published_ones(benchmark, expected):
    assert ask(benchmark, "llava") == ask(benchmark, "qwen2_vl") == expected


def test_instructblip_is_asked_as_its_paper_does():
    assert ask("vqav2", "instructblip") == "Question: What is it? Short answer:"
    assert ask("textvqa-ocr", "instructblip") == "OCR tokens: STOP, 3. Question: What is it? Short answer:"
    assert ask("mmbench", "instructblip") == ask("mmbench", "llava")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_every_benchmark_has_a_prompt_for_every_family(benchmark, family):
    assert "What is it?" in ask(benchmark, family)


def test_a_line_of_an_empty_field_vanishes():
    template = prompt_template("mmbench", "llava")
    assert fill_prompt(template, example(options="A. x"), "<image>").startswith("What is it?\nA. x\nAnswer")
    ocr = fill_prompt(prompt_template("textvqa-ocr", "llava"), example(), "<image>")
    assert ocr == f"What is it?\nReference OCR token: {SHORT}"


def test_whole_conversations():
    assert ask("vqav2", "llava", conversation="vicuna_v1") == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        f"detailed, and polite answers to the user's questions. USER: <image>\nWhat is it?{SHORT} ASSISTANT:"
    )
    assert ask("llava", "llava", override="Q {question}", conversation="llava_v1_5") == (
        "USER: <image>\nQ What is it? ASSISTANT:"
    )
    with pytest.raises(InputError, match="no conversation is called 'chatml'; there are vicuna_v1, llava_v1_5"):
        prompt_template("vqav2", "llava", conversation="chatml")
    with pytest.raises(InputError, match="a whole prompt already"):
        prompt_template("vqav2", "llava", override="{image} {question}", conversation="vicuna_v1")


def test_a_template_of_ones_own():
    assert ask("vqav2", "llava", override="{image}Q: {question}\nA:") == "<image>Q: What is it?\nA:"
    assert ask("vqav2", "llava", override='Say {{"answer": ...}}: {question}') == 'Say {"answer": ...}: What is it?'


def test_a_file_of_ones_own_goes_before_the_packaged_one(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        '[templates.vqav2]\nllava = "L {question}"\n[templates.gqa]\ndefault = "G {question}"\n'
        '[conversations]\nmine = "{image}|{prompt}|"\nvicuna_v1 = "V {image}{prompt}"\n'
    )
    assert ask("vqav2", "llava", override=path) == "L What is it?"
    assert ask("vqav2", "vipllava", override=str(path)) == f"What is it?{SHORT}"
    assert ask("gqa", "llava", override=path, conversation="mine") == "<image>|G What is it?|"
    assert ask("gqa", "llava", override=path, conversation="vicuna_v1") == "V <image>G What is it?"
    assert ask("gqa", "instructblip", override=path) == "G What is it?"


@pytest.mark.parametrize(
    "template, problem",
    [
        ("{question} {answer}", r"has the field \{answer\}; there are \{question\}, \{hint\}"),
        ("{question} {}", r"has the field \{\}"),
        ("{question", "braces that are not paired"),
        ("{question} }", "braces that are not paired"),
        ("{question}\n{", "braces that are not paired"),
        ("{question!r} {question}", "says more than a name"),
        ("{question:>20} {question}", "says more than a name"),
        ("{question} {question.__class__}", r"has the field \{question.__class__\}"),
        ("{{question}} {question", "braces that are not paired"),
        ("{{question}}", r"has no \{question\}"),
    ],
)  # fmt: skip
def test_templates_that_cannot_be_filled(template, problem):
    if "{question}" in template:
        with pytest.raises(InputError, match=problem):
            prompt_template("vqav2", "llava", override=template)
    with pytest.raises(InputError, match=problem):
        fill_prompt(template, example(), "<image>")


@pytest.mark.parametrize(
    "content, problem",
    [
        ("templates =", "cannot be read as TOML"),
        ("[prompts]\n", "holds prompts; expected tables"),
        ("[templates.vqav2]\nllava = 3\n", "vqav2 is {'llava': 3}; expected texts by names"),
        ('[templates]\nvqav2 = "x"\n', "vqav2 is 'x'; expected texts by names"),
        ("[conversations]\na = 3\n", "conversations is {'a': 3}"),
        ('[templates.vqav2]\nllava = "no field"\n', r"has no \{question\}"),
        ("\xff", "cannot be read as TOML"),
    ],
)
def test_files_of_another_form(tmp_path, content, problem):
    path = tmp_path / "mine.toml"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match=problem):
        prompt_template("vqav2", "llava", override=path)


def test_a_conversation_without_its_places(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('[conversations]\na = "USER: {prompt}"\n')
    with pytest.raises(InputError, match=r"expected \{image\} and \{prompt\} in it"):
        prompt_template("vqav2", "llava", override=path, conversation="a")


def test_names_that_there_are_not(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.toml: no such file; expected a TOML file, or a template"):
        prompt_template("vqav2", "llava", override=tmp_path / "nowhere.toml")
    with pytest.raises(InputError, match="no prompt for the benchmark 'mine' and the family 'llava'"):
        prompt_template("mine", "llava")
    assert prompt_template("mine", "llava", override="{question}") == "{question}"


@settings(deadline=None)
@given(st.text(min_size=1), st.text(), st.text())
def test_what_a_question_says_is_put_in_as_it_is(text, ocr, hint):
    one = example(text, ocr=ocr, hint=hint)
    assert fill_prompt("{{{question}}} {ocr}|{hint}", one, "<image>") == f"{{{text}}} {ocr}|{hint}"
