"""How every command ends: errors meant for the user are one message on standard error, and an exit code."""

import sys
from collections.abc import Callable

from megatron.errors import EELLMError


def run_guarded(body: Callable[[], None], interrupted: str = "interrupted") -> int:
    """Run a command's body; returns the process's exit code. `interrupted` is said after Ctrl-C."""
    try:
        body()
    except EELLMError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write(f"{interrupted}\n")
        return 130
    return 0
