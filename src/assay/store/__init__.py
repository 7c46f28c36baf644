"""Where a run keeps what it measured, on disk or in memory, and the ledger over it.

A run folder is data, never code: JSON and Parquet, nothing pickled.

    run.json                               format version, targets, kind of ids, the caller's info
    values/part-000000-CRC32.parquet       step, micro, id and one column "value:TARGET" per target
    account/part-000000-CRC32.parquet      step, target, predicted, carried, decayed, actual, residual, status
    metadata/part-000000-CRC32.parquet     id and the user's columns; a later part overrules an earlier one
    packed/, tokens/, norms/               likewise, in runs that record them: step, micro, id and more
    curve/, quadrature/, refresh/          likewise: step and more; a later part may have other columns
    tables/NAME-000000-CRC32.parquet       side tables; the highest number is the table
    processes/0001/                        a folder like this one for every further process of a distributed run

Every file appears by an atomic rename after an fsync, so a killed run leaves whole files only. Parts are
numbered without gaps, and every file carries a checksum of its content: in its name, or in `run.json` itself.
"""

from assay.store.ledger import Ledger, open_ledger
from assay.store.shards import shard_of
from assay.store.writer import RunWriter

__all__ = ["Ledger", "RunWriter", "open_ledger", "shard_of"]
