"""What a pickle would ask for, read off its operations without loading it."""

import pickletools
from typing import Any, BinaryIO

from megatron.errors import CheckpointError

_MOST_VALUES = 10_000  # on one tuple


def names_in(file: BinaryIO, size: int) -> set[str]:
    """Every global that one pickle mentions, without loading it."""
    names, strings, values = set(), [], _Values()
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name in ("GLOBAL", "INST"):
            names.add(argument.replace(" ", "."))
        elif opcode.name == "STACK_GLOBAL":
            names.add(".".join(strings[-2:]))
        elif opcode.name.startswith("EXT"):
            raise CheckpointError("refused: it uses registered extension codes")
        elif opcode.name.endswith("PUT") and int(argument) > size:
            raise CheckpointError("refused: its memo is larger than the file")
        elif isinstance(argument, str):
            strings.append(argument)
        values.follow(opcode, argument)
    return names


class _Values:
    """How many values hang on each object on a pickle's stack, followed without making any.

    Tuples may be keys, and a key is hashed: one that is nested deeply, or refers to itself twice and so on, takes more
    stack or time to hash than there is.
    """

    def __init__(self) -> None:
        self._stack: list[list[int]] = []  # boxes, so that what is memoized grows with what it stands for
        self._memo: dict[int, list[int]] = {}

    def follow(self, opcode: pickletools.OpcodeInfo, argument: Any) -> None:
        """Take one operation, as `pickletools.genops` gives it."""
        if opcode.name.endswith("GET"):
            self._stack.append(self._memo[int(argument)])
        elif opcode.name.endswith("PUT"):
            self._memo[int(argument)] = self._stack[-1]
        elif opcode.name == "MEMOIZE":
            self._memo[len(self._memo)] = self._stack[-1]
        elif opcode.name == "DUP":
            self._stack.append(self._stack[-1])
        elif opcode.name == "MARK":
            self._stack.append(_MARK)
        else:
            taken = self._take(opcode.stack_before)
            if opcode.name in _GROWS:  # the first stays where it is
                taken[0][0] += sum(count for (count,) in taken[1:])
                self._stack.append(taken[0])
            elif opcode.stack_after:
                self._make(1 + sum(count for (count,) in taken))

    def _make(self, count: int) -> None:
        if count > _MOST_VALUES:
            raise CheckpointError(f"refused: it nests or repeats values more than {_MOST_VALUES:,}-fold")
        self._stack.append([count])

    def _take(self, before: list[pickletools.StackObject]) -> list[list[int]]:
        """Pop what an operation needs: single values, above them perhaps a mark and all that stands on it."""
        taken: list[list[int]] = []
        single = len(before)
        if pickletools.markobject in before:
            single = before.index(pickletools.markobject)
            while (box := self._stack.pop()) is not _MARK:
                taken.append(box)
        taken += [self._stack.pop() for _ in range(single)]
        return taken[::-1]


_MARK: list[int] = []
_GROWS = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"}
