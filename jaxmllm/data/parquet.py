"""Results as Parquet files."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def write_parquet(rows: list[dict[str, Any]], path: Path) -> None:
    """Writes rows as one Parquet table."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path)
