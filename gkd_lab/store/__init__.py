"""Store: records, their locks and provenance; the files of a run are read and written here only. No torch."""

from gkd_lab.store.cell_state import State, combine_states
from gkd_lab.store.record import DamagedRecord, EvaluationRecord, Record, RecordPart, Store

__all__ = ["DamagedRecord", "EvaluationRecord", "Record", "RecordPart", "State", "Store", "combine_states"]
