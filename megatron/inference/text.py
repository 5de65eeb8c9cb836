"""Text from a stream of ids: characters appear as soon as all their bytes are there."""

from megatron.tokenizer.base import Tokenizer

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what decoders put where a character's bytes are not all there


class TextStream:
    """Decodes ids one by one. The parts together are the text of all ids.

    Only a short window is decoded again each time: the ids of the last part and what followed it, because some
    tokenizers (SentencePiece) drop the blank before whatever comes first.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._shown: list[int] = []
        self._new: list[int] = []

    def push(self, token: int) -> str:
        """The text that `token` completes; empty while a character is incomplete."""
        self._new.append(token)
        part = self._part()
        if not part or part.endswith(_INCOMPLETE):
            return ""
        self._shown, self._new = self._new, []
        return part

    def finish(self) -> str:
        """What is left at the end, incomplete characters included."""
        part = self._part()
        self._shown, self._new = self._new, []
        return part

    def _part(self) -> str:
        before = self._tokenizer.detokenize(self._shown)
        return self._tokenizer.detokenize(self._shown + self._new)[len(before) :]
