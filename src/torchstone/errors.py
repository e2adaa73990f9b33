"""Typed errors, and the exit code that each one gives the command line.

Every error is for a person: one paragraph that says what was given, what is allowed and what to do.
`assert` stays for programmers' mistakes. Exit codes: 0 done, 2 user, 3 data, 4 non-finite, 75 interrupted
("resume me", the convention of sysexits' EX_TEMPFAIL).
"""

from __future__ import annotations


class TorchstoneError(ValueError):
    """Base of all errors that a user can cause and mend."""

    exit_code = 2


class ConfigError(TorchstoneError):
    """A recipe, an override or a command-line value cannot be used."""


class BudgetError(TorchstoneError):
    """A budget cannot be met, or two arms cannot be matched within the tolerance."""


class DependencyError(TorchstoneError):
    """An optional package is missing; the message holds the install line."""


class StudyError(TorchstoneError):
    """A study, a claim or a stored result cannot be used as asked."""


class DataError(TorchstoneError):
    """Input data is missing, damaged or not what the recipe says; names file and line where there is one."""

    exit_code = 3


class CheckpointError(TorchstoneError):
    """A checkpoint is missing, damaged, hostile or does not fit the recipe."""

    exit_code = 3


class NonFiniteError(TorchstoneError):
    """Loss or gradient is not finite; raised before the update, after the crash bundle is written."""

    exit_code = 4


class InterruptedRun(TorchstoneError):
    """A signal asked the run to stop; its checkpoint is complete and the same command continues."""

    exit_code = 75


class WorkerError(TorchstoneError):
    """A child process died; names the item and the last exception."""
