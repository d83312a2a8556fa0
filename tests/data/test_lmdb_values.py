"""Values of LMDB entries in forms that have writers of their own, kept here as they wrote them."""

import base64
import pickle
import sys
import zlib

import pytest

from arcface_jax.data import columnar, lmdb_values
from arcface_jax.errors import DataError, UserError

IMAGE = b"\xff\xd8\xff" + bytes(range(40))
# pa.serialize((IMAGE, 7)) and pa.serialize([b"0", b"1", b"22"]) of pyarrow 11, the last releases
# of which have no such function.
PAIR = (
    "c-oayT~5O=40hUV4P6)k$|z7+`L6^IW#RxFWiLoff+zOC0XP5;9AZb{06gvhJa805a1y5~Q6+?@{Mi2d*^WDa-=a|#"
    "3_w{e1qprVfxsII<ER5_0(VY3n(2K1)*7{8j`xym5w2?lRHWa}9_NPYMO$ox0pbzPE;GF6Eq+C~s|mmt=BXWSSfK5aa5"
    "1h|lf&dB+iZUO0Jdh+iL2b_jazvQ_p{@SOs<0By?;U+0utf?c7xlSi{U0F3t~(S3-o_F4C}(wxR&Tw=n+_9VqaL%`@5L"
    "DBZk|bo7WR_yhbF9XkyYbLCkIZT{Gbnb!n$(X1b)eWvy>u(7Jm&_1x5<g6~EJxSUQu+cNN1L3|bXYdSCJoCf%5fH#r^e"
    "RN6akN%1OOZS|tgV^+<KQ#Jc-s>k~B^}7s;hI|C*vz&@+xgD!Ua@~LE)S26PfpLyo1Xmtva7xyS!hJB"
)
KEYS = (
    "c-n<gF%H5o40PH6rHW7nggP=ZhKhlafq^IR0R|+Hkl-mif`JF{2%f-0*x-^lB}5gta$?74pKB9+%L{T4MA~^JDe6*(3Rn"
    ";!;S;<9r{ojQeA{Grg9_%D-!kYEI$?jeJ)SJ|?6D1oxX#kQt0C+vs;?P0HAHh@b`jSk;#xxu``goIPp)747ryH@&YQ0#"
    "EypnY3&&>A3*rxt5p5XDcSl?!Qh=%Frlfg>KBsEQk?#A<eI<NtD~d)udF856E?tdPv#Aoka$B&wx$=xew99^EhxdZ-z^"
    "jw}>jYQvo%20z`txFve3R5!Bz#u7NuO<!#`8b;{7-(s2qC^OS(1}+uVz};VK2XU-=%#xtN"
)


def stored(text: str) -> bytes:
    return zlib.decompress(base64.b85decode(text))


def test_what_pyarrow_serialized_is_read_without_its_serializer():
    pytest.importorskip("pyarrow")
    value = lmdb_values.parse(memoryview(stored(PAIR)), where="x")
    assert value is not None and (value.image, value.label) == (IMAGE, 7)
    assert stored(PAIR)[value.begin :][: len(IMAGE)] == IMAGE
    assert lmdb_values.parse_fact(stored(KEYS), where="x") == [b"0", b"1", b"22"]


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"\x80",
        b"\x92\xc4\xff",
        b"\x92" * 50,
        b"\xdd\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff" + IMAGE,
        b"\x22\xff\xff\xff\xff\x0f" + IMAGE,
        pickle.dumps([IMAGE, IMAGE]),
        pickle.dumps({"a": 1}),
        bytes(16) + b"\xff\xff\xff\xff" + bytes(40),
    ],
)
def test_other_values_are_of_no_form(value: bytes):
    assert lmdb_values.parse(value, where="x") is None


def test_a_pickle_that_asks_for_a_name_is_an_error():
    with pytest.raises(DataError, match=r"key 0: the pickle asks for .*collections\.OrderedDict"):
        from collections import OrderedDict

        lmdb_values.parse(pickle.dumps((IMAGE, OrderedDict())), where="key 0")


def test_a_serialized_value_that_expands_is_refused(monkeypatch):
    pa = pytest.importorskip("pyarrow")
    monkeypatch.setattr(columnar, "_LARGE", 1 << 16)
    column = pa.array([[IMAGE + bytes(1 << 20)]], type=pa.list_(pa.binary()))
    batch, sink = pa.record_batch([column], names=["x"]), pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_stream(sink, batch.schema, options=options) as writer:
        writer.write_batch(batch)
    with pytest.raises(DataError, match="key 3: the Arrow stream in it expands to 1,0"):
        lmdb_values.parse(bytes(16) + sink.getvalue().to_pybytes(), where="key 3")


def test_a_serialized_value_without_pyarrow_names_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="need pyarrow"):
        lmdb_values.parse(stored(PAIR), where="x")
    assert lmdb_values.parse(pickle.dumps((IMAGE, 7)), where="x") is not None
