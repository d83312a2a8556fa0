"""Parse whether a pair shows one person, from the words and numbers used in files."""

_SAME = ("true", "yes", "y", "t", "same", "match", "matched", "positive", "pos", "genuine", "mated")
_OTHERS = (
    *("false", "no", "n", "f", "different", "diff", "mismatch", "mismatched", "nonmatch"),
    *("non-match", "notsame", "not same", "negative", "neg", "impostor", "imposter", "nonmated"),
)
_KNOWN = dict.fromkeys(_SAME, True) | dict.fromkeys(_OTHERS, False)


def parse(value: object) -> bool | None:
    """Parses a flag: true for 1, 1.0, "True", b"same"; false for 0, -1, "False", b"0"; else None.

    Args:
      value: text, bytes, a number or a boolean, of Python or NumPy.
    """
    if isinstance(value, bytes):
        value = value.decode("latin-1")
    if isinstance(value, str):
        word = value.strip().lower()
        if word in _KNOWN:
            return _KNOWN[word]
        try:
            value = float(word)
        except ValueError:
            return None
    try:
        number = float(value)  # pyright: ignore[reportArgumentType]  # else a TypeError
    except (TypeError, ValueError):
        return None
    return {1.0: True, 0.0: False, -1.0: False}.get(number)
