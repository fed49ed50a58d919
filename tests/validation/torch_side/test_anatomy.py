"""Where things are in transformers' modules, against what the suite knows of each family."""

import types

import pytest
import torch

from jaxmllm.errors import ConfigError
from jaxmllm.validation.torch_side import anatomy
from tests.support import tiny

LAYOUT = [[2, 7], [5, 3], [1, 1]]


@pytest.mark.parametrize("layout", ["unlike_lengths", "several_images", "text_only"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_forward_arguments_are_those_of_the_suite(pair, layout, side):
    inputs = tiny.make_inputs(pair, tiny.LAYOUTS[layout], side)
    expected = pair.family.forward_arguments(pair.torch, inputs)
    got = anatomy.forward_arguments(pair.torch, inputs)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


def test_image_features_are_what_is_put_into_the_prompts(pair):
    tensors = anatomy.tensors_of(tiny.make_inputs(pair, LAYOUT))
    with torch.no_grad():
        expected = pair.family.features(pair.torch, tensors)
        got = anatomy.image_features(pair.torch, tensors)
    assert [tuple(each.shape) for each in got] == [tuple(each.shape) for each in expected]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_blocks_after_the_last_that_is_used_change_nothing(pair, monkeypatch):
    found = anatomy.find(pair.torch)
    tensors = anatomy.tensors_of(tiny.make_inputs(pair, LAYOUT))

    def damaged(block):
        """The features with a block that gives zeros."""
        with monkeypatch.context() as patch:
            patch.setattr(block, "forward", lambda hidden, *args, **kwargs: torch.zeros_like(hidden))
            return torch.cat(anatomy.image_features(pair.torch, tensors))

    with torch.no_grad():
        expected = torch.cat(anatomy.image_features(pair.torch, tensors))
        changed = [not torch.equal(damaged(block), expected) for block in found.blocks]
    assert changed[found.used_blocks - 1]
    assert not any(changed[found.used_blocks :])


def test_layers_and_head_are_the_decoders(pair):
    found = anatomy.find(pair.torch)
    assert found.layers == list(pair.family.layers(pair.torch))
    assert found.head is pair.torch.get_output_embeddings()


def test_patches_of_qwen2_5_vl_are_sorted_by_windows(tmp_path):
    pair = tiny.make_pair("qwen2_5_vl", tmp_path)
    found = anatomy.find(pair.torch)
    tensors = anatomy.tensors_of(tiny.make_inputs(pair, LAYOUT))
    seen = {}
    hooks = [
        found.vision_embedding[0].register_forward_hook(lambda module, args, output: seen.update(embed=output)),
        found.blocks[0].register_forward_pre_hook(lambda module, args: seen.update(hidden=args[0])),
    ]
    with torch.no_grad():
        anatomy.image_features(pair.torch, tensors)
    for hook in hooks:
        hook.remove()
    order = anatomy.patch_order(found, tensors["image_grid_thw"])
    assert not torch.equal(seen["embed"], seen["hidden"])
    assert torch.equal(seen["embed"][order], seen["hidden"])


def test_other_families_keep_the_order_of_patches(tmp_path):
    pair = tiny.make_pair("qwen2_vl", tmp_path)
    assert anatomy.patch_order(anatomy.find(pair.torch), torch.tensor([[1, 4, 6]])) is None


def test_an_unknown_family_is_named():
    model = torch.nn.Module()
    model.config = types.SimpleNamespace(model_type="blip")
    with pytest.raises(ConfigError, match="'blip'"):
        anatomy.find(model)
