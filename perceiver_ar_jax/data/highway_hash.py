"""HighwayHash-64 with Riegeli's key, by NumPy: the checksum of Riegeli (ArrayRecord) files.

Source: Alakuijala, Cox, Wassenberg, "Fast keyed hash/pseudo-random function using SIMD multiply and
permute", arXiv:1612.06257.
"""

import numpy as np

_KEY = np.frombuffer(b"Riegeli/records\n" * 2, np.uint64)
_MUL0 = np.array(
    [0xDBE6D5D5FE4CCE2F, 0xA4093822299F31D0, 0x13198A2E03707344, 0x243F6A8885A308D3], np.uint64
)
_MUL1 = np.array(
    [0x3BD39E10CB0EF593, 0xC0ACF169B5F18A8C, 0xBE5466CF34E90C6C, 0x452821E638D01377], np.uint64
)
_ZIPPER = [3, 12, 2, 5, 14, 1, 15, 0, 11, 4, 10, 13, 9, 6, 8, 7]  # of the bytes of two lanes
_ZIPPER = np.array(_ZIPPER + [byte + 16 for byte in _ZIPPER])
_SWAP_HALVES = [1, 0, 3, 2, 5, 4, 7, 6]  # of 64-bit lanes seen as 32-bit ones
_PERMUTE = [5, 4, 7, 6, 1, 0, 3, 2]
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)


def highway_hash(data: bytes) -> int:
    """The hash of `data`; takes 10 µs per 32 bytes, so it is for headers and indices."""
    state = [_KEY ^ _MUL0, _by_halves(_KEY, _SWAP_HALVES) ^ _MUL1, _MUL0, _MUL1]
    whole = len(data) // 32 * 32
    for packet in np.frombuffer(data[:whole], np.uint64).reshape(-1, 4):
        state = _update(state, packet)
    if whole < len(data):
        state = _update_remainder(state, data[whole:])
    for _ in range(4):
        state = _update(state, _by_halves(state[0], _PERMUTE))
    return int(sum(state)[0])


def _update(state, packet):
    v0, v1, mul0, mul1 = state
    v1 = v1 + mul0 + packet
    mul0 = mul0 ^ (v1 & _LOW) * (v0 >> _HALF)
    v0 = v0 + mul1
    mul1 = mul1 ^ (v0 & _LOW) * (v1 >> _HALF)
    v0 = v0 + v1.view(np.uint8)[_ZIPPER].view(np.uint64)
    v1 = v1 + v0.view(np.uint8)[_ZIPPER].view(np.uint64)
    return [v0, v1, mul0, mul1]


def _update_remainder(state, rest: bytes):
    v0, v1, mul0, mul1 = state
    size = len(rest)
    words = size & ~3
    halves = v1.view(np.uint32)
    v1 = (halves << np.uint32(size) | halves >> np.uint32(32 - size)).view(np.uint64)
    packet = bytearray(32)
    packet[:words] = rest[:words]
    if size & 16:
        packet[28:] = rest[-4:]
    elif tail := rest[words:]:
        packet[16:19] = tail[0], tail[len(tail) // 2], tail[-1]
    v0 = v0 + np.uint64((size << 32) + size)
    return _update([v0, v1, mul0, mul1], np.frombuffer(packet, np.uint64))


def _by_halves(lanes: np.ndarray, order: list[int]) -> np.ndarray:
    return lanes.view(np.uint32)[order].view(np.uint64)
