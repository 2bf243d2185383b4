"""Pickles in checkpoints: what is read of them, and that hostile ones do no harm."""

import collections
import os
import pathlib
import pickle
import re
import struct
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest

from uniq_jax import interop
from uniq_jax.interop import pickles
from uniq_jax.interop.nesting import STATE_DICT_KEYS

MAGIC = struct.pack(
    "<2sBB10s1s", b"\x80\x02", 0x8A, 10, (0x1950A86A20F9469CFC6C).to_bytes(10, "little"), b"."
)
VALUES = np.arange(6, dtype=np.float32)


# Opcodes, put together by hand: the tests need what no torch.save writes.
def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    data = pickle.encode_long(value)
    return b"\x8a" + bytes([len(data)]) + data


def numbers(*values: int) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def tensor(shape=(6,), strides=(1,), offset=0, length=6, key="0", kind="FloatStorage", view=b""):
    storage = b"((" + text("storage") + f"ctorch\n{kind}\n".encode() + text(key) + text("cpu")
    storage += number(length) + view + b"tQ"
    shape, strides = numbers(*shape), numbers(*strides)
    return b"ctorch._utils\n_rebuild_tensor\n" + storage + number(offset) + shape + strides + b"tR"


def dictionary(**entries: bytes) -> bytes:
    return b"}(" + b"".join(text(name) + value for name, value in entries.items()) + b"u"


def in_zip(path, *opcodes: bytes, storages=(VALUES,), compression=zipfile.ZIP_STORED):
    """A file of today's format with the object that the opcodes make."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("any name/data.pkl", b"\x80\x02" + b"".join(opcodes) + b".")
        for key, storage in enumerate(storages):
            archive.writestr(f"any name/data/{key}", storage.tobytes())
    return path


def in_legacy(path, *opcodes: bytes, keys=("0",), storages=(VALUES,)):
    """The same in the format before PyTorch 1.6."""
    parts = [MAGIC, pickle.dumps(1001, 2), pickle.dumps({"little_endian": True}, 2)]
    parts += [b"\x80\x02", *opcodes, b".", pickle.dumps(list(keys), 2)]
    parts += [struct.pack("<q", storage.size) + storage.tobytes() for storage in storages]
    path.write_bytes(b"".join(parts))
    return path


def refused(path, message: str) -> None:
    """Reading is a ValueError that names the file, and takes no time."""
    start = time.monotonic()
    with pytest.raises(ValueError, match=message) as error:
        interop.read_state_dict(path)
    assert str(error.value).startswith(f"{path} ")
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("write", [in_zip, in_legacy])
def test_the_hand_made_files_are_right(tmp_path, write):
    views = {"b": tensor((2, 2), (1, 2), 1), "c": tensor((1, 6), (2**62, 1))}
    path = write(tmp_path / "x.pth", dictionary(a=tensor(), **views))
    found = interop.read_state_dict(path)
    np.testing.assert_array_equal(found["a"], VALUES)
    np.testing.assert_array_equal(found["b"], [[1, 3], [2, 4]])
    # The stride of an axis of one element means nothing.
    np.testing.assert_array_equal(found["c"], VALUES[None])


def nested(*keys: str, offset: int) -> bytes:
    """A tensor of one element under the keys: 'offset' tells which it is."""
    tree = dictionary(weight=tensor((1,), offset=offset))
    for key in reversed(keys):
        tree = dictionary(**{key: tree})
    return tree


@pytest.mark.parametrize(
    ("tree", "found"),
    [
        (dictionary(weight=tensor((1,), offset=1)), 1),
        *((nested(key, offset=2), 2) for key in STATE_DICT_KEYS),
        (nested("model", "state_dict", offset=3), 3),
        (nested("generator", offset=4), 4),
        # In this order, whatever the file's.
        (dictionary(ema=nested(offset=1), model=nested(offset=2), net=nested(offset=3)), 3),
        (dictionary(state_dict=nested(offset=1), model=nested(offset=2)), 1),
        # A known key goes before tensors beside it, these before an unknown one.
        (dictionary(best=tensor(()[:0], ()), net=nested(offset=2)), 2),
        (dictionary(weight=tensor((1,), offset=1), other=nested(offset=2)), 1),
        (dictionary(net=dictionary(net=b"N"), other=nested(offset=5)), 5),
    ],
)
def test_which_dictionary_is_the_state_dict(tmp_path, tree, found):
    state_dict = interop.read_state_dict(in_zip(tmp_path / "x.pth", tree))
    assert state_dict.keys() == {"weight"}
    assert state_dict["weight"] == found


# The last holds itself.
@pytest.mark.parametrize(
    "opcodes", [b"}", dictionary(a=number(3), b=b"]N\x86"), b"}q\x00(" + text("net") + b"h\x00u"]
)
def test_files_without_a_tensor(tmp_path, opcodes):
    refused(in_zip(tmp_path / "x.pth", opcodes), "has no tensor")


def test_what_python_2_and_early_pytorch_wrote(tmp_path):
    pairs = b"](](" + b"U\x01a" + tensor() + b"e](" + b"U\x01b" + tensor((2,)) + b"ee"
    opcodes = b"ccollections\nOrderedDict\n" + pairs + b"\x85R"
    found = interop.read_state_dict(in_legacy(tmp_path / "x.pth", opcodes))
    assert list(found) == ["a", "b"]
    # A storage that is a view of another: (its key, offset, length).
    view = b"(" + text("1") + number(2) + number(3) + b"t"
    path = in_legacy(tmp_path / "x.pth", dictionary(a=tensor((2,), offset=1, view=view)))
    np.testing.assert_array_equal(interop.read_state_dict(path)["a"], VALUES[3:5])
    refused(
        in_legacy(tmp_path / "x.pth", dictionary(a=tensor((3,), offset=1, view=view))),
        "needs 16 bytes of a storage of 12",
    )


class Trap:
    """Unpickled, it calls what it is given."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def traps(path: pathlib.Path) -> list[Trap]:
    python = f"open({str(path)!r}, 'w').close()"
    return [
        Trap(os.system, f"touch {path}"),
        Trap(eval, python),
        Trap(exec, python),
        Trap(open, str(path), "w"),
        Trap(subprocess.check_call, ["touch", str(path)]),
        Trap(pathlib.Path.touch, path),
    ]


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("i", range(6))
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("write", [in_zip, in_legacy])
def test_nothing_in_a_file_is_called(tmp_path, i, protocol, write):
    data = pickle.dumps(traps(tmp_path / "sprung")[i], protocol)
    # As opcodes after PROTO, without STOP; a trap as a value, an argument, a key, a state, an item.
    trap = data[2:-1]
    tree = dictionary(before=trap, a=tensor(), after=b"]" + trap + b"a")
    tree += b"(" + trap + b"Nu" + trap + b"b"
    found = interop.read_state_dict(write(tmp_path / "x.pth", tree))
    np.testing.assert_array_equal(found["a"], VALUES)
    assert not (tmp_path / "sprung").exists()
    # The traps work.
    pickle.loads(data)
    assert (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    "call",
    [
        b"cthis\ns\n(" + text("x") + b"tR",
        b"cthis\ns\n(" + text("x") + b"t\x81",
        b"cthis\ns\n)}\x92",
        b"(cthis\ns\n" + text("x") + b"o",
        text("this") + text("s") + b"\x93)R",
        b"cthis\ns\n}(" + text("x") + b"Nub",
        b"ccollections\nOrderedDict\n}(" + text("spoiled") + b"Nub",
        b"ctorch._utils\n_rebuild_tensor\nN}(" + text("__code__") + b"Nu\x86b",
    ],
)
def test_nothing_that_a_file_names_is_imported_or_changed(tmp_path, call):
    path = in_zip(tmp_path / "x.pth", dictionary(before=call, a=tensor(), after=tensor()))
    assert interop.read_state_dict(path).keys() == {"a", "after"}
    assert "this" not in sys.modules
    assert not hasattr(collections.OrderedDict, "spoiled")


@pytest.mark.parametrize("code", b"IVSFPpgi\x82\x83\x84\x97\x98")
def test_opcodes_that_pytorch_never_writes(tmp_path, code):
    path = in_zip(tmp_path / "x.pth", bytes([code]), b"0\n0\n")
    refused(path, rf"the opcode {re.escape(repr(bytes([code])))}, which torch\.save never writes")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (tensor(length=7), "storage of 24"),
        (tensor((7,)), "needs 28 bytes of a storage of 24"),
        (tensor((2, 2), (6, 1)), "needs 32 bytes"),
        (tensor(offset=1), "needs 28 bytes"),
        (tensor(offset=2**62), "needs .* bytes"),
        (tensor(offset=2**64), "is no number of elements"),
        (tensor(offset=-1), "is no number of elements"),
        (tensor((-6,)), "is no number of elements"),
        (tensor((2,), (-1,)), "is no number of elements"),
        (tensor((2, 3)), "2 axes and 1 strides"),
        (tensor((1,) * 65, (1,) * 65), "65 axes"),
        (tensor((2**50,), (0,)), "is larger than the whole file"),
        (tensor((0, 2**50), (0, 0)), "is larger than the whole file"),
        (tensor(kind="DoubleStorage"), "storage of 24"),
        (tensor(kind="QInt8Storage"), r"torch\.QInt8Storage, which must be one of"),
        (tensor(length=-1), "describes no storage"),
        (tensor(key="1"), "without the entry 'any name/data/1'"),
        (tensor(key="../data.pkl", length=1), "without the entry"),
    ],
)
def test_tensors_that_are_not_within_their_storage(tmp_path, bad, message):
    refused(in_zip(tmp_path / "x.pth", dictionary(a=tensor(), b=bad)), message)


@pytest.mark.parametrize(
    ("keys", "storages", "message"),
    [
        ((), (), "has no storage '0'"),
        (("1",), (VALUES,), "storage '1' that no tensor uses"),
        (("0",), (VALUES[:5],), "is truncated"),
        (("0",), (np.ones(7),), "storage '0' of 7 elements"),
        ((0,), (VALUES,), "keys of storages are no list of text"),
    ],
)
def test_storages_of_the_old_format_that_disagree(tmp_path, keys, storages, message):
    path = in_legacy(tmp_path / "x.pth", dictionary(a=tensor()), keys=keys, storages=storages)
    refused(path, message)


def test_two_kinds_under_one_key_of_the_old_format(tmp_path):
    tree = dictionary(a=tensor(), b=tensor(kind="IntStorage"))
    refused(in_legacy(tmp_path / "x.pth", tree), "two storages under the key '0'")


def test_archives_that_unpack_to_more_than_they_are(tmp_path):
    tree = dictionary(a=tensor())
    path = in_zip(tmp_path / "x.pth", tree, compression=zipfile.ZIP_DEFLATED)
    refused(path, "compressed entries")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02" + tree + b".")
        archive.writestr("x/data/0", bytes(10_000))
        archive.filelist += [archive.getinfo("x/data/0")] * 2  # one content, several entries
    refused(path, "(entries are together larger than the file|Overlapped entries)")


def bomb_of_tuples() -> bytes:
    """A tuple of two of a tuple of two of …: its hash and its text take forever."""
    return b")q\x00" + b"h\x00h\x00\x86q\x00" * 200


@pytest.mark.parametrize(
    "bomb",
    [
        bomb_of_tuples(),
        b"}(" + bomb_of_tuples() + b"Nu",  # as a key
        b"\x8f(" + bomb_of_tuples() + b"\x90",  # in a set
        b"(" + bomb_of_tuples() + b"\x91",  # in a frozen set
        b"cargparse\nNamespace\n(" + bomb_of_tuples() + b"tR",
        b"](" * 100_000 + b"e" * 100_000,
        b"Nr\xff\xff\xff\xff",
    ],
)
def test_objects_that_take_long_to_look_at_are_not_looked_at(tmp_path, bomb):
    path = in_zip(tmp_path / "x.pth", dictionary(a=tensor(), bomb=bomb))
    start = time.monotonic()
    assert interop.read_state_dict(path).keys() == {"a"}
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("write", [in_zip, in_legacy])
@pytest.mark.parametrize(
    ("bomb", "message"),
    [
        (b"B\xff\xff\xff\x7f", "expected 2147483647 bytes"),
        (b"\x8e" + struct.pack("<Q", 2**62), "expected 4611686018427387904 bytes"),
        (b"\x96" + struct.pack("<Q", 2**40), "expected 1099511627776 bytes"),
        (b"\x8b\xff\xff\xff\x7f", "not enough data"),
        (b"c" + b"a" * 2000 + b"\nb\n", "a text too long"),
        (b"R", "takes an object where there is none"),
        (b"t", "back to a mark where there is none"),
        (b"NNR", "calls an object of type NoneType"),
        (b"NNa", "appends to an object of type NoneType"),
        (b"NNNs", "sets an entry of an object of type NoneType"),
        (b"}(Nu", "a key without a value"),
        (b"NN\x93", "by what is no text"),
        (b"h\x05", "fetches object 5"),
        (b"NQ", "describes no storage"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n)R", "makes a tensor of what"),
        (b"ctorch._utils\n_rebuild_tensor_v3\n)R", "makes a tensor without a dtype"),
        (b"ctorch._utils\n_rebuild_parameter\n)R", "makes a parameter of what is no tensor"),
        (b"ctorch._tensor\n_rebuild_from_type_v2\n)R", "subclass without its parts"),
        (b"ctorch\nSize\nN\x85R", r"makes a torch\.Size of what is no tuple"),
        (b"ccollections\nOrderedDict\nN\x85R", "makes a dictionary of what are no pairs"),
    ],
)
def test_damaged_pickles(tmp_path, write, bomb, message):
    path = write(tmp_path / "x.pth", bomb)
    refused(path, rf"has a damaged pickle \(byte \d+\): .*{message}")


def numpy_array(shape=b"K\x02\x85", code="f4", order="<", data=b"C\x08" + bytes(8)) -> bytes:
    dtype = b"cnumpy\ndtype\n(" + text(code) + b"\x89\x88tR(K\x03" + text(order) + b"tb"
    start = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85C\x01btR"
    return start + b"(K\x01" + shape + dtype + b"\x89" + data + b"tb"


def test_arrays_of_numpy(tmp_path):
    path = in_zip(
        tmp_path / "x.pth", dictionary(a=numpy_array(), b=numpy_array(b"K\x00\x85", data=b"N"))
    )
    found = interop.read_state_dict(path)
    assert [(a.shape, a.dtype) for a in found.values()] == [((2,), "f4"), ((0,), "f4")]
    for bad, message in [
        (numpy_array(b"K\x03\x85"), r"of shape \(3,\) without its 12 bytes"),
        (numpy_array(numbers(-2) + b""), "whose shape is none"),
        (numpy_array(numbers(2**62, 2**62)), "without its"),
        (numpy_array(order="!"), "unknown byte order"),
        (numpy_array(code="O8"), "'a' that is a NumPy array whose elements are no numbers"),
    ]:
        refused(in_zip(tmp_path / "x.pth", dictionary(a=bad)), message)


def test_limits_of_work(tmp_path, monkeypatch):
    copies = (b"c_codecs\nencode\nh\x00" + text("latin1") + b"\x86R0") * 20
    path = in_zip(tmp_path / "x.pth", text("x" * 500), b"q\x000", copies, dictionary(a=tensor()))
    assert interop.read_state_dict(path).keys() == {"a"}
    monkeypatch.setattr(pickles, "MAX_CALL_WORK", 9_000)
    refused(path, "hands more to its calls than any checkpoint needs")
    monkeypatch.undo()
    monkeypatch.setattr(pickles, "MAX_OPCODES", 100)
    refused(path, "a pickle of more than 100 opcodes")
