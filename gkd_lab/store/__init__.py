"""The files of a run, read and written here only. No torch."""

from gkd_lab.store.record import DamagedRecord, EvaluationRecord, Part, Record, State, Store, worst

__all__ = ["DamagedRecord", "EvaluationRecord", "Part", "Record", "State", "Store", "worst"]
