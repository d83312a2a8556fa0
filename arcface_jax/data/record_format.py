"""The numbers of RecordIO's layout, which recordio.py describes."""

import struct

MAGIC = 0xCED7230A
MAGIC_BYTES = struct.pack("<I", MAGIC)
FRAME = struct.Struct("<II")
"""Magic; the part's place in the record in the top 3 bits, its length in the others."""
HEADER = struct.Struct("<IfQQ")
"""How many labels follow, the label where none do, two ids."""
LENGTH_BITS = 29
LENGTH_MASK = (1 << LENGTH_BITS) - 1
WHOLE, FIRST, MIDDLE, LAST = range(4)
