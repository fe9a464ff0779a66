"""The files of a run, read and written here only. No torch."""

from gkd_lab.records.record import DamagedRecord, EvaluationRecord, Record, State, Store, worst

__all__ = ["DamagedRecord", "EvaluationRecord", "Record", "State", "Store", "worst"]
