"""What importing and running the library takes: no backend on import, and never torch."""

import subprocess
import sys

import numpy as np
import pytest

import jaxmllm
from tests.support import tiny

IMPORT = """
import sys
import jaxmllm
assert "torch" not in sys.modules
assert "transformers" not in sys.modules
if "jax" in sys.modules:
    import jax._src.xla_bridge
    assert jax._src.xla_bridge._backends == {}, "a backend was started"
for name in jaxmllm.__all__:
    assert getattr(jaxmllm, name) is not None
assert set(jaxmllm.__all__) <= set(dir(jaxmllm))
import jax._src.xla_bridge
assert jax._src.xla_bridge._backends == {}, "a backend was started by the names"
assert "torch" not in sys.modules
print("fine")
"""

WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
import jax, numpy as np
jax.config.update("jax_default_matmul_precision", "highest")
import jaxmllm
from jaxmllm.analysis import erase_image
model = jaxmllm.load(sys.argv[1])
inputs = dict(np.load(sys.argv[2]))
clean = model.forward(model.params, inputs).logits
erased = model.forward(model.params, inputs, edits=erase_image(1)).logits
np.savez(sys.argv[3], clean=clean, erased=erased)
assert sys.modules["torch"] is None
"""


def run(code: str, *arguments: object) -> str:
    command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_import_starts_no_backend_and_imports_no_torch_and_every_name_resolves():
    assert run(IMPORT) == "fine\n"


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'jaxmllm' has no attribute 'lode'"):
        jaxmllm.lode  # noqa: B018


def test_public_names_are_sorted_and_have_homes():
    assert jaxmllm.__all__ == sorted(jaxmllm.__all__)
    assert set(jaxmllm.__all__) == set(jaxmllm._HOMES)


def test_a_model_loads_and_runs_where_torch_cannot_be_imported(plain_pair, tmp_path):
    from jaxmllm.analysis import erase_image

    inputs = tiny.make_inputs(plain_pair, [[3, 6], [3, 6]])
    np.savez(tmp_path / "inputs.npz", **inputs)
    run(WITHOUT_TORCH, plain_pair.folder, tmp_path / "inputs.npz", tmp_path / "logits.npz")
    model = plain_pair.jax
    with np.load(tmp_path / "logits.npz") as logits:
        for name, edits in (("clean", None), ("erased", erase_image(1))):
            expected = np.asarray(model.forward(model.params, inputs, edits=edits).logits)
            np.testing.assert_allclose(logits[name], expected, atol=1e-6, rtol=0)
