"""Where a run keeps what it measured, on disk or in memory, and the ledger over it.

A run folder is data, never code: JSON and Parquet, nothing pickled.

    run.json                        format version, targets, kind of ids, the caller's info
    values/part-000000.parquet      step, micro, id and one column "value:TARGET" per target
    account/part-000000.parquet     step, target, predicted, carried, decayed, actual, residual, status
    metadata/part-000000.parquet    id and the user's own columns; a later part overrules an earlier one
    tables/NAME.parquet             small side tables, replaced as a whole

Every file appears by an atomic rename after an fsync, so a killed run leaves whole files only. Parts are
numbered without gaps and their pages carry checksums.
"""

from assay.store.ledger import Ledger, open_ledger
from assay.store.writer import RunWriter

__all__ = ["Ledger", "RunWriter", "open_ledger"]
