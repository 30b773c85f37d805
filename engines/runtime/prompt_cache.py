"""What the text encoders made of recent prompts, least recently used out first."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor

Entry = tuple[Tensor, ...]
"""One prompt's rows of what the denoiser is told: embedding (L, D), and mask (L,) or pooled vector (P,)."""


class PromptCache:
    """A prompt's embedding is the same every time, and for large text encoders costs as much as a step.

    Args:
        max_bytes: of all tensors together; one entry takes 2 MB for the published PixArt-alpha, 4 MB for
            CogVideoX, 10 kB for the demo.
    """

    def __init__(self, max_bytes: int = 256 << 20) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._entries: OrderedDict[str, Entry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, prompt: str) -> Entry | None:
        """The entry of `prompt`, which thereby counts as used."""
        entry = self._entries.get(prompt)
        if entry is not None:
            self._entries.move_to_end(prompt)
        return entry

    def put(self, prompt: str, entry: Entry) -> None:
        """Add or replace an entry, and forget the oldest ones if there is no room."""
        self._bytes += _size_bytes(entry) - _size_bytes(self._entries.get(prompt))
        self._entries[prompt] = entry
        self._entries.move_to_end(prompt)
        while self._bytes > self._max_bytes:
            _, oldest = self._entries.popitem(last=False)
            self._bytes -= _size_bytes(oldest)

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()
        self._bytes = 0


def _size_bytes(entry: Entry | None) -> int:
    return sum(tensor.nbytes for tensor in entry) if entry is not None else 0
