"""The checkpoints on which bugs are planted."""

import json
from pathlib import Path

from tests.support import tiny, tiny_checkpoints
from tests.support.families import FAMILIES

# Beside those of the parity suite: what a bug needs to show that none of them has.
OWN = {
    # more than ten layers
    "eleven_layers": tiny.config_fields("grouped_queries")
    | {"text_config": tiny.config_fields("grouped_queries")["text_config"] | {"num_hidden_layers": 11}},
    # several rows and columns of tiles, whatever size an image has
    "two_by_two_tiles": tiny.config_fields("next_llama") | {"image_grid_pinpoints": [[56, 56], [56, 84]]},
}
# With the files of a processor.
PREPARED = {f"{family}_prepared": family for family in FAMILIES}


def write_variant(name: str, folder: Path) -> None:
    """Writes the checkpoint of a variant into a folder that does not exist yet."""
    if name in PREPARED:
        tiny_checkpoints.write_checkpoint(PREPARED[name], folder)
        fields = json.loads((folder / "config.json").read_text())
    else:
        fields = OWN.get(name) or tiny.config_fields(name)
    tiny.make_torch(json.loads(json.dumps(fields))).save_pretrained(folder)
