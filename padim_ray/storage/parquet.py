"""Write tables as Parquet, whichever strings they have in memory."""

import base64
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

ROW_GROUP_ROWS, ROW_GROUP_BYTES = 2**20, 2**28  # at most; readers hold a group's strings together
_ORDINARY = {pa.large_string(): pa.string(), pa.large_binary(): pa.binary()}


def write_parquet(table: pa.Table, file: Path | BinaryIO) -> None:
    """Write a table as Parquet; readers get strings with 32-bit offsets."""
    schema = table.schema
    for index, kind in enumerate(schema.types):
        schema = schema.set(index, schema.field(index).with_type(_ORDINARY.get(kind, kind)))
    # the metadata that pyarrow reads the types from; Parquet itself has one type of strings
    metadata = {**(schema.metadata or {}), "ARROW:schema": base64.b64encode(schema.serialize())}
    row_bytes = max(1, table.nbytes // max(1, table.num_rows))
    rows = max(1, min(ROW_GROUP_ROWS, ROW_GROUP_BYTES // row_bytes))
    with pq.ParquetWriter(file, table.schema, compression="zstd", store_schema=False) as writer:
        writer.write_table(table, row_group_size=rows)
        writer.add_key_value_metadata(metadata)
