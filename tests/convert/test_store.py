"""The Orbax store: written whole or not at all, read back to the bit; and the folders that ``load`` cannot use."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmllm
from jaxmllm.convert import store
from jaxmllm.convert.plan import flatten
from jaxmllm.convert.streaming import partial_folder, verify_store
from jaxmllm.errors import CheckpointError, ConfigError, InputError, ProcessorError
from jaxmllm.model import convert_checkpoint, find_checkpoint
from tests.support import tiny
from tests.support.stores import everything_in, same_stores, write_format_1

EXTRA_FILES = {
    "preprocessor_config.json": "{}",
    "tokenizer.json": '{"a": 1}',
    "chat_template.jinja": "{{ messages }}\n",
}


@pytest.fixture(scope="module")
def source(plain_pair, tmp_path_factory):
    """A checkpoint with processor files (whose content a store does not look at) and a file that is neither."""
    folder = Path(shutil.copytree(plain_pair.folder, tmp_path_factory.mktemp("source") / "checkpoint"))
    for name, content in EXTRA_FILES.items():
        (folder / name).write_text(content)
    (folder / "notes.txt").write_text("not part of the model")
    return folder


@pytest.fixture(scope="module")
def converted(source, tmp_path_factory):
    destination = tmp_path_factory.mktemp("store") / "deep" / "store"
    convert_checkpoint(source, destination)
    return destination


@pytest.fixture
def spoilable(converted, tmp_path):
    return Path(shutil.copytree(converted, tmp_path / "store"))


def assert_same_params(got, wanted):
    got, wanted = flatten(got), flatten(wanted)
    assert sorted(got) == sorted(wanted)
    for leaf in wanted:
        assert got[leaf].dtype == wanted[leaf].dtype
        np.testing.assert_array_equal(np.asarray(got[leaf]), np.asarray(wanted[leaf]), err_msg=leaf)


def test_store_holds_the_same_model_to_the_bit(plain_pair, converted):
    model = jaxmllm.load(converted)
    assert store.is_store(converted)
    assert not store.is_store(plain_pair.folder)
    assert model.config == plain_pair.jax.config
    assert_same_params(model.params, plain_pair.jax.params)
    inputs = tiny.make_inputs(plain_pair, [[3, 6], [3, 6]])
    expected = plain_pair.jax.forward(plain_pair.jax.params, inputs).logits
    np.testing.assert_array_equal(np.asarray(model.forward(model.params, inputs).logits), np.asarray(expected))


def test_store_carries_config_and_processor_files_unchanged_and_nothing_else(source, converted):
    for name in ("config.json", *EXTRA_FILES):
        assert (converted / name).read_bytes() == (source / name).read_bytes()
    beside = {path.name for path in converted.iterdir()} - {path.name for path in source.iterdir()}
    assert beside == {store.MARKER, store.PARAMS, store.CHECKSUMS}
    assert not (converted / "notes.txt").exists()
    assert not list(converted.glob("*.safetensors"))
    assert json.loads((converted / store.MARKER).read_text()) == {"format": 2, "param_dtype": ["float32"]}


def test_nothing_is_left_beside_a_store(converted):
    assert [path.name for path in converted.parent.iterdir()] == [converted.name]


def test_store_may_be_read_by_whoever_may_read_a_new_folder(converted, tmp_path):
    (tmp_path / "new").mkdir()
    assert converted.stat().st_mode == (tmp_path / "new").stat().st_mode


@pytest.mark.parametrize(
    ("named", "asked", "stored"),
    [("bfloat16", None, "bfloat16"), ("float16", None, "float16"), ("float64", None, "float32"),
     (None, None, "float32"), ("float16", "bfloat16", "bfloat16")],
)  # fmt: skip
def test_store_keeps_the_type_that_was_asked_for_or_that_the_config_names(source, tmp_path, named, asked, stored):
    folder = Path(shutil.copytree(source, tmp_path / "source"))
    fields = json.loads((folder / "config.json").read_text())
    fields.pop("dtype")
    if named is not None:
        fields["torch_dtype"] = named  # as transformers before version 5 spells it
    (folder / "config.json").write_text(json.dumps(fields))
    convert_checkpoint(folder, tmp_path / "store", param_dtype=asked)
    assert json.loads((tmp_path / "store" / store.MARKER).read_text())["param_dtype"] == [stored]
    kept = jaxmllm.load(tmp_path / "store", param_dtype=stored).params
    assert_same_params(kept, jaxmllm.load(folder, param_dtype=stored).params)


def test_store_loads_in_another_type_than_it_was_written_in(converted, plain_pair):
    params = jaxmllm.load(converted, dtype="bfloat16").params
    assert_same_params(params, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), plain_pair.jax.params))


def test_store_converts_again(converted, tmp_path, plain_pair):
    convert_checkpoint(converted, tmp_path / "again")
    assert_same_params(jaxmllm.load(tmp_path / "again").params, plain_pair.jax.params)


def test_store_of_format_1_loads_and_converts(plain_pair, source, converted, tmp_path):
    write_format_1(tmp_path / "old", source, plain_pair.jax.params)
    assert_same_params(jaxmllm.load(tmp_path / "old").params, plain_pair.jax.params)
    with pytest.raises(CheckpointError, match="a store of format 1 holds no checksums"):
        verify_store(tmp_path / "old")
    convert_checkpoint(tmp_path / "old", tmp_path / "new")
    assert_same_params(jaxmllm.load(tmp_path / "new").params, plain_pair.jax.params)


def test_params_are_a_plain_orbax_checkpoint(plain_pair, converted):
    """Without jaxmllm: the tree as it is, its metadata, another type, and a part of it."""
    import orbax.checkpoint as ocp

    wanted, folder = plain_pair.jax.params, converted / store.PARAMS
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(folder)
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(restored))
        assert_same_params(restored, wanted)
        found = flatten(checkpointer.metadata(folder).item_metadata.tree)
        assert {leaf: (value.shape, value.dtype) for leaf, value in found.items()} == {
            leaf: (value.shape, value.dtype) for leaf, value in flatten(wanted).items()
        }
        target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), wanted)
        rough = checkpointer.restore(folder, target)
        assert_same_params(rough, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), wanted))
    with ocp.PyTreeCheckpointer() as checkpointer, pytest.warns(UserWarning, match="Sharding info not provided"):
        assert_same_params(checkpointer.restore(folder), wanted)


# --- writing that fails -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "full_folder", "file"])
def test_destination_that_exists_is_refused_and_left_alone(source, tmp_path, kind):
    destination = tmp_path / "store"
    if kind == "file":
        destination.write_text("mine")
    else:
        destination.mkdir()
    if kind == "full_folder":
        (destination / "mine.txt").write_text("mine")
    before = everything_in(tmp_path)
    with pytest.raises(InputError, match=f"{destination} exists already; name a new folder or remove it"):
        convert_checkpoint(source, destination)
    assert everything_in(tmp_path) == before


def test_parent_that_is_a_file_is_refused_and_left_alone(source, tmp_path):
    (tmp_path / "parent").write_text("a file")
    with pytest.raises(InputError, match=f"{tmp_path / 'parent' / 'store'}: cannot be written"):
        convert_checkpoint(source, tmp_path / "parent" / "store")
    assert everything_in(tmp_path) == {"parent": b"a file"}


FAILING_DISK = """
import resource, sys
import jaxmllm
from jaxmllm.model import convert_checkpoint
import orbax.checkpoint
source, destination, cut_store = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
for call in (lambda: convert_checkpoint(source, destination), lambda: jaxmllm.load(cut_store)):
    try:
        call()
    except Exception as error:
        print(f"{type(error).__name__}: {error}".splitlines()[0])
"""


@pytest.fixture(scope="module")
def failing_disk(source, converted, tmp_path_factory):
    """What is said, and what is left, when reads and writes fail inside Orbax: one line each, and a folder.

    These are true failures: no file may grow beyond 20 kB, and a file of params ends too early. They run in a process
    of their own, because the limit holds for a whole process and because Orbax's threads outlive the error.
    """
    folder = tmp_path_factory.mktemp("failing")
    cut = Path(shutil.copytree(converted, folder / "cut"))
    largest = max((cut / store.PARAMS).rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    (folder / "empty").mkdir()
    command = [sys.executable, "-c", FAILING_DISK, source, folder / "empty" / "store", cut]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
    lines = run.stdout.splitlines()
    assert len(lines) == 2, run.stderr[-2000:]
    return (*lines, folder)


def test_disk_that_fills_up_while_params_are_written_keeps_the_work(failing_disk, source, converted):
    written, _, folder = failing_disk
    destination = folder / "empty" / "store"
    assert written.startswith(f"InputError: {destination}: cannot be written")
    assert "File too large" in written
    assert f"the work so far is kept in {partial_folder(destination)}. Make room, and give the same command" in written
    assert [path.name for path in destination.parent.iterdir()] == [partial_folder(destination).name]
    convert_checkpoint(source, destination)
    same_stores(destination, converted)


def test_store_with_cut_params_is_refused(failing_disk):
    _, read, folder = failing_disk
    assert read.startswith(f"CheckpointError: {folder / 'cut' / store.PARAMS}")


def test_bad_source_leaves_nothing(tmp_path, source):
    folder = Path(shutil.copytree(source, tmp_path / "source"))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="truncated"):
        convert_checkpoint(folder, tmp_path / "store")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


# --- reading that fails -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [0, 3, "1", None])
def test_store_of_another_format_is_refused_by_its_number(spoilable, version):
    marker = json.loads((spoilable / store.MARKER).read_text())
    (spoilable / store.MARKER).write_text(json.dumps(marker | {"format": version}))
    with pytest.raises(
        CheckpointError, match=rf"store format {version!r}; this version reads formats 1 and 2\. Convert again"
    ):
        jaxmllm.load(spoilable)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe\x00"])
def test_broken_marker_is_named(spoilable, content):
    (spoilable / store.MARKER).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{store.MARKER}: not a store's marker"):
        jaxmllm.load(spoilable)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 24, "head_dim": 12},
        {"num_hidden_layers": 3},
        {"num_hidden_layers": 5},
        {"vocab_size": 120},
        {"attention_bias": True},
        {"tie_word_embeddings": True},
    ],
    ids=lambda change: next(iter(change)) + "_" + str(next(iter(change.values()))),
)
def test_store_with_the_config_of_another_model_is_refused(spoilable, change):
    fields = json.loads((spoilable / "config.json").read_text())
    fields["text_config"] |= change
    (spoilable / "config.json").write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match=r"weight\(s\) do not fit config.json: \w+/"):
        jaxmllm.load(spoilable)


def test_store_without_params_is_refused(spoilable):
    shutil.rmtree(spoilable / store.PARAMS)
    with pytest.raises(CheckpointError, match=f"{spoilable / store.PARAMS}"):
        jaxmllm.load(spoilable)


def test_name_on_the_hub_without_a_connection_is_an_error_that_says_what_to_do():
    with pytest.raises(CheckpointError) as error:
        jaxmllm.load("some-organisation/no-such-model")
    message = str(error.value)
    assert message.startswith(
        "some-organisation/no-such-model: no such folder here, and it cannot be fetched from the hub"
    )
    assert "give the path of a downloaded folder" in message
    assert "\n" not in message


@pytest.mark.parametrize("path", ["nowhere", "./a/b", "/no/such/folder", "a/b/c", "~/model"])
def test_path_that_is_no_folder_and_no_hub_name_is_refused(path):
    with pytest.raises(CheckpointError, match=f"{path}: not a folder; expected a checkpoint folder, an Orbax store"):
        find_checkpoint(path)


def test_path_of_a_file_is_refused(plain_pair):
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a folder"):
        jaxmllm.load(plain_pair.folder / "model.safetensors")


def test_folder_without_a_config_is_refused(tmp_path, plain_pair):
    shutil.copy(plain_pair.folder / "model.safetensors", tmp_path)
    with pytest.raises(ConfigError, match=r"config\.json: no such file; a checkpoint folder needs it"):
        jaxmllm.load(tmp_path)


def test_folder_of_config_and_weights_alone_runs_and_asks_for_processor_files_only_to_prepare(plain_pair, tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(plain_pair.folder / name, tmp_path)
    model = jaxmllm.load(str(tmp_path))
    inputs = tiny.make_inputs(plain_pair, [[3, 6], [3, 6]])
    expected = plain_pair.jax.forward(plain_pair.jax.params, inputs).logits
    np.testing.assert_array_equal(np.asarray(model.forward(model.params, inputs).logits), np.asarray(expected))
    picture = np.zeros((28, 28, 3), np.uint8)
    with pytest.raises(ProcessorError) as error:
        model.prepare([picture], ["what is this ?"])
    assert str(tmp_path) in str(error.value)
    assert "preprocessor_config.json and tokenizer.json (with tokenizer_config.json)" in str(error.value)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ProcessorError, match=r"without preprocessor_config\.json;"):
        model.prepare([picture], ["what is this ?"])
