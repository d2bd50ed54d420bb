"""What tests need: a function on N ranks of one machine, and errors measured against float64."""

from .distributed import RankError, RankOutcome, RankPool, run_ranks, run_ranks_outcomes
from .errors import ErrorReport, assert_error_rule, error_report

__all__ = [
    "ErrorReport",
    "RankError",
    "RankOutcome",
    "RankPool",
    "assert_error_rule",
    "error_report",
    "run_ranks",
    "run_ranks_outcomes",
]
