"""Random numbers of the device, drawn from a CPU generator that follows the device's one.

The stream is that of a CPU generator with the same seed. It is not the stream of real hardware.
"""

from __future__ import annotations

import struct

import torch

_SEED_BITS = (1 << 63) - 1
_POSITIONS = 64
"""How many positions per seed can be returned to with ``set_state``."""


class GeneratorMirror:
    """CPU generators, one per seed and position of a device generator.

    A device generator's state is its seed and an offset. Each draw moves the offset on, so a saved and restored state
    gives the same numbers again.
    """

    def __init__(self) -> None:
        self._states: dict[int, dict[int, torch.Tensor]] = {}
        self._begun = (0, 0)
        self._captures = 0

    def begin(self, generator: torch.Generator) -> torch.Generator:
        """The CPU generator that stands where the device's generator stands; to be called before a kernel moves it."""
        seed, offset = _seed_and_offset(generator)
        mirror = torch.Generator()
        known = self._states.get(seed, {}).get(offset)
        if known is not None and offset:
            mirror.set_state(known)
        else:
            mirror.manual_seed(seed if not offset else hash((seed, offset)) & _SEED_BITS)
        self._begun = seed, offset
        return mirror

    def captured(self) -> torch.Generator:
        """A CPU generator for a draw inside a graph: each replay draws on. The device's state cannot be read then."""
        self._captures += 1
        return torch.Generator().manual_seed(hash((*self._begun, self._captures)) & _SEED_BITS)

    def end(self, generator: torch.Generator, mirror: torch.Generator) -> None:
        """Remember where the CPU generator stands; where no kernel has moved the device's one, move it."""
        seed, offset = _seed_and_offset(generator)
        if (seed, offset) == self._begun:
            offset += 4
            state = bytearray(generator.get_state().numpy().tobytes())
            state[-8:] = struct.pack("<q", offset)
            generator.set_state(torch.frombuffer(state, dtype=torch.uint8))
        positions = self._states.setdefault(seed, {})
        positions[offset] = mirror.get_state()
        while len(positions) > _POSITIONS:
            del positions[next(iter(positions))]


def _seed_and_offset(generator: torch.Generator) -> tuple[int, int]:
    state = generator.get_state().numpy().tobytes()
    seed, offset = struct.unpack("<Qq", state[-16:])
    return int(seed) & _SEED_BITS, int(offset)
