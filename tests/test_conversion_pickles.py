import pickle
import time
import tracemalloc

import pytest
from torch_zip import text

from perceiver_ar_jax.conversion.pickles import MAX_BYTES, Inert, read_pickle

CONSTRUCTORS = {"collections.OrderedDict": lambda: {}, "torch._utils._rebuild_tensor_v2": tuple}


def load(data: bytes):
    return read_pickle(data, constructors=CONSTRUCTORS, persistent_load=lambda pid: None)


@pytest.mark.parametrize("protocol", range(6))
def test_plain_data_comes_out_as_pickle_reads_it(protocol):
    value = {
        "ints": [0, -1, 255, 70_000, 2**40, -(2**70), True, False, None],
        "floats": (1.5, float("inf"), -0.0),
        "texts": ["", "naïve", "\n\\", b"bytes" * 100],
        "nested": {"a": {"b": [[], (), {}, (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)]}},
    }
    value["again"] = value["nested"]
    if protocol < 3:  # bytes are made by _codecs.encode there, a function that is not called
        value["texts"].pop()
    assert load(pickle.dumps(value, protocol)) == value


@pytest.mark.parametrize("protocol", range(6))
def test_objects_of_unknown_classes_become_inert(protocol):
    loaded = load(pickle.dumps({"x": pytest.approx(3), "y": 4}, protocol))
    assert isinstance(loaded["x"], Inert)
    assert loaded["y"] == 4


HARMFUL = [
    "posix.system", "nt.system", "os.system", "os.popen", "subprocess.Popen",
    "subprocess.check_output", "builtins.eval", "builtins.exec", "builtins.compile",
    "builtins.open", "builtins.getattr", "builtins.__import__", "__builtin__.eval",
    "importlib.import_module", "runpy._run_code", "pickle.loads", "_pickle.loads",
    "shutil.rmtree", "socket.socket", "webbrowser.open", "operator.attrgetter",
    "types.FunctionType", "ctypes.CDLL", "sys.exit", "pty.spawn", "pdb.run", "asyncio.run",
    "multiprocessing.Process", "os.path.join", "timeit.timeit", "code.interact",
    "urllib.request.urlopen", "http.client.HTTPConnection",
]  # fmt: skip


@pytest.mark.parametrize("name", HARMFUL)
def test_what_could_do_harm_is_refused_by_name(name):
    module, function = name.rsplit(".", 1)
    by_global = f"c{module}\n{function}\n(S'echo'\ntR.".encode()
    by_inst = f"(S'echo'\ni{module}\n{function}\n.".encode()
    by_stack = b"\x80\x04" + text(module) + text(function) + b"\x93" + text("echo") + b"\x85R."
    for data in (by_global, by_inst, by_stack):
        with pytest.raises(ValueError, match=f"refused: its pickle names {name}"):
            load(data)


def test_a_function_of_an_unknown_module_is_not_called():
    class Failing:
        def __reduce__(self):
            return (pytest.fail, ("it was called",))

    assert isinstance(load(pickle.dumps(Failing())), Inert)


def test_dicts_keep_str_keys_and_sets_become_lists():
    assert load(pickle.dumps({"a": 1, 2: "b", (3,): "c"})) == {"a": 1}
    assert sorted(load(pickle.dumps({"s": {1, 2}, "f": frozenset([3])}, 4))["s"]) == [1, 2]


NESTED_TUPLES = b"(" + b")\x85q\x00" + b"h\x00h\x00\x86q\x00" * 60
BOMBS = {
    "a dict key that takes 2**60 steps to hash": b"}" + NESTED_TUPLES + b"K\x01s.",
    "a set of such": b"\x80\x04\x8f(" + NESTED_TUPLES + b"\x90.",
    "a long list copied a thousand times": (
        b"("
        + b"K\x01" * 10_000
        + b"lq\x00"
        + b"ccollections\nOrderedDict\nh\x00\x85R" * 1000
        + b"."
    ),
    "colliding keys": (
        b"}("
        + b"".join(
            b"\x8a\x0a" + (i * (2**61 - 1)).to_bytes(10, "little") + b"N" for i in range(20_000)
        )
        + b"u."
    ),
    "nesting a hundred thousand deep": b"]" * 100_000 + b"a" * 99_999 + b".",
    "bytes of a claimed terabyte": b"\x8e" + (2**40).to_bytes(8, "little") + b"x.",
    "a bytearray of a claimed terabyte": b"\x96" + (2**40).to_bytes(8, "little") + b"x.",
    "text of a claimed terabyte": b"\x8d" + (2**40).to_bytes(8, "little") + b"x.",
    "an int of a claimed gigabyte": b"\x8b" + (2**30).to_bytes(4, "little") + b"x.",
    "a far place in the memo": b"Nr\xff\xff\xff\xff.",
    "a frame of a claimed exabyte": b"\x80\x04\x95" + (2**60).to_bytes(8, "little") + b"N.",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_cost_no_more_than_their_size(bomb):
    data = BOMBS[bomb]
    tracemalloc.start()
    start = time.process_time()
    try:
        load(data)
    except ValueError:
        pass
    finally:
        seconds = time.process_time() - start
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 2**20 + 150 * len(data)
    assert seconds < 1 + len(data) * 2e-5


def test_a_pickle_beyond_all_need_is_refused_unread():
    with pytest.raises(ValueError, match="far fewer"):
        load(b"N" * (MAX_BYTES + 1))
