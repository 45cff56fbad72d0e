"""How a fused region is cut into programs: rows, columns and threads, from widths and the device.

A program holds a few rows, whole where sums over rows need them. A row that does not fit into the
registers is gone over in blocks instead, once more for every sum that waits for another one.

Source: for bytes on their way, Little's law: bandwidth times latency (Volkov 2016, "Understanding
Latency Hiding on GPUs").

Legend: ``R`` rows, ``W`` columns of a row.
"""

from dataclasses import dataclass

from memopt.device import DeviceSpec
from memopt.rows.ir import Reduce, RowProgram

# Registers of a program that may hold entries; about as many again are for the rest.
_REGISTERS = 48 * 1024
_MOST_THREADS = 512
_ENTRIES_PER_THREAD = 8  # 128 bits of bfloat16
_LATENCY_SECONDS = 7e-7
_PROGRAMS_PER_PROCESSOR = 4
_BLOCKS = (2048, 1024, 512, 256)
_LOOPED_BLOCKS = (2048, 1024)  # of 4096, 512 threads have half the registers each, and spill
_MOST_WASTE = 1.125


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiling:
    """One configuration of a kernel.

    Attributes:
        rows: that a program holds at a time; a power of two.
        block: columns of each that it holds; a power of two.
        threads: of the program; a power of two.
    """

    rows: int
    block: int
    threads: int


def is_looped(program: RowProgram) -> bool:
    """Whether rows are gone over in blocks, because they do not fit into registers."""
    whole = power_of_two(program.space.width)
    return has_row_sums(program) and whole * program.live_tiles() > _REGISTERS


def tilings(program: RowProgram, device: DeviceSpec) -> tuple[Tiling, ...]:
    """Configurations to try, the likely best one first."""
    live, least = max(1, program.live_tiles()), _largest_group(program)
    if is_looped(program):
        return tuple(_tiling(1, max(block, least)) for block in _LOOPED_BLOCKS)
    whole = power_of_two(program.space.width)
    if has_row_sums(program) or whole <= _BLOCKS[-1]:
        block = whole
    else:
        padded = {b: -(-program.space.width // b) * b for b in _BLOCKS if b <= whole}
        least_padded = min(padded.values())
        block = next(b for b, w in padded.items() if w <= _MOST_WASTE * least_padded)
    block = max(block, least)
    entries = _entries(program, device)
    choices = [max(1, n // block) for n in (entries, 2 * entries, entries // 2)]
    fitting = [r for r in dict.fromkeys(choices) if r * block * live <= _REGISTERS]
    return tuple(_tiling(rows, block) for rows in fitting or [1])


def _tiling(rows: int, block: int) -> Tiling:
    threads = min(_MOST_THREADS, max(32, rows * block // _ENTRIES_PER_THREAD))
    return Tiling(rows=rows, block=block, threads=threads)


def _entries(program: RowProgram, device: DeviceSpec) -> int:
    """Entries of a program, so that those on a processor keep memory busy."""
    lane_bytes = sum(
        t.dtype.itemsize
        for load in program.loads()
        for t in program.arguments
        if t.name == load.tensor and load.extent.rows and load.extent.group == 1
    )
    in_flight_bytes = device.bandwidth * _LATENCY_SECONDS / device.processors
    share = in_flight_bytes / _PROGRAMS_PER_PROCESSOR / max(1, lane_bytes)
    return min(4096, max(1024, power_of_two(int(share))))


def has_row_sums(program: RowProgram) -> bool:
    """Whether something needs the whole of a row."""
    return any(isinstance(value, Reduce) and value.of_row for value in program.body)


def _largest_group(program: RowProgram) -> int:
    return max((value.extent.group for value in program.body), default=1)


def power_of_two(number: int) -> int:
    """The number, or the next one above it that is a power of two."""
    return 1 << max(0, number - 1).bit_length()
