"""The files of a run, read and written here only. No torch."""

from gkd_lab.store.record import (
    DamagedRecord,
    EvaluationRecord,
    Record,
    RecordPart,
    State,
    Store,
    combine_states,
)

__all__ = ["DamagedRecord", "EvaluationRecord", "Record", "RecordPart", "State", "Store", "combine_states"]
