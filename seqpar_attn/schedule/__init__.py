"""Schedules of sequence-parallel attention: data built, proved, priced and printed without any device."""

from .build import METHODS, TRANSFERS, build_schedule
from .data import Block, Kind, Merge, Result, Schedule, ScheduleError, Step, Task, Transfer, consecutive
from .format import format_schedule
from .simulate import Rates, Simulation, simulate_schedule
from .validate import validate_schedule

__all__ = [
    "METHODS",
    "TRANSFERS",
    "Block",
    "Kind",
    "Merge",
    "Rates",
    "Result",
    "Schedule",
    "ScheduleError",
    "Simulation",
    "Step",
    "Task",
    "Transfer",
    "build_schedule",
    "consecutive",
    "format_schedule",
    "simulate_schedule",
    "validate_schedule",
]
