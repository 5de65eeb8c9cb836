"""The exceptions a user can meet, each with the exit code of the process it ends.

Raise these for what the user did or met (flags, data, checkpoints); use `assert` for our own bugs.
"""


class EELLMError(Exception):
    """Base of all errors with a message written for the user. `exit_code` ends the process."""

    exit_code = 1
    everywhere = False  # whether every process of a run meets the same one


class ConfigError(EELLMError):
    """Flags or a config file that cannot be honoured; the message names the flag and the mend."""

    exit_code = 2


class DataError(EELLMError):
    """A dataset, tokenizer or text file is missing or broken; the message names file and place."""

    exit_code = 2


class NonFiniteError(EELLMError):
    """Training met too many non-finite steps in a row."""

    exit_code = 3


class CheckpointError(EELLMError):
    """A checkpoint is missing, damaged, or of another shape than the model."""

    exit_code = 4


class StorageError(EELLMError):
    """Writing failed: disk full, read-only, no permission."""

    exit_code = 5


class RankLostError(EELLMError):
    """Another process of the run died, or didn't answer in time."""

    exit_code = 6


class ClusterError(EELLMError):
    """A check of the launched processes found one that computes wrongly, is slow, or failed; the message names it."""
