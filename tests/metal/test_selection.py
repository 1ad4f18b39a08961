"""Proofs, verdicts and the choice, with the emulator standing in for the GPU."""

import json
import logging
import os
import signal
import subprocess
import sys
import time

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dflash_mlx.metal import block_attention, plain_block_attention, selection
from dflash_mlx.metal.attention_class import CONTEXTS, LENGTHS, USES, AttentionClass
from dflash_mlx.metal.attention_class import attention_class as class_of
from dflash_mlx.metal.catalogue import parse
from dflash_mlx.metal.proof import TOLERANCE, Timing, compare, difference, prove
from dflash_mlx.metal.prover import Prover
from dflash_mlx.metal.quantized_rows import BITS, GROUP_SIZES, MAX_FEW
from dflash_mlx.metal.rows_class import INNER, OUTPUTS, ROWS, RowsClass, rows_class
from dflash_mlx.metal.selection import Selection
from dflash_mlx.metal.shape_class import DTYPE_NAMES
from dflash_mlx.metal.verdicts import OUTCOMES, Verdict, VerdictBook, book_path

from .cases import Case
from .emulator import Emulator, need_compiler

SHAPE = AttentionClass("draft", dim=32, dtype="float32", length=4, context=512, ratio=1)
VERIFY = AttentionClass("verify", dim=32, dtype="float32", length=4, context=512, ratio=1)
PRODUCT = RowsClass("float32", rows=8, outputs=4096, inner=1024, group_size=64, bits=4)
CALL = SHAPE.call(3, 300, seed=1, kv_heads=1)


def child(behaviour: str, time_limit: float = 60) -> Prover:
    return Prover((sys.executable, "-m", "tests.metal.proof_child", behaviour), time_limit)


@pytest.fixture
def emulator():
    need_compiler()
    return Emulator(orders=("forward",))


@pytest.fixture
def select(emulator, tmp_path):
    """Puts a selection in place whose GPU is the emulator; the old one comes back after."""
    before = selection.use(None)

    def make(behaviour="right", mode="auto", time_limit=60.0, path=tmp_path / "book.json"):
        chosen = Selection(
            mode,
            ready=lambda: True,
            make=emulator.metal_kernel,
            book=VerdictBook(path),
            prover=child(behaviour, time_limit),
        )
        selection.use(chosen)
        return chosen

    yield make
    selection.use(before)


def wait_for_verdict(chosen: Selection) -> Verdict:
    for _ in range(1200):
        if verdict := chosen.book.get(SHAPE.key):
            return verdict
        time.sleep(0.1)
    raise AssertionError("no verdict came")


class TestProof:
    """Verdicts from child processes."""

    @pytest.mark.parametrize(
        ("shape", "behaviour", "outcome", "detail"),
        [
            (SHAPE, "right", "faster", ""),
            (SHAPE, "slow", "slower", ""),  # the emulator, timed in earnest
            (SHAPE, "faster-at-first", "slower", ""),
            (SHAPE, "wrong", "wrong", ""),
            (SHAPE, "infinite", "wrong", "no finite numbers"),
            (SHAPE, "does-not-compile", "failed", "EmulationError"),
            (SHAPE, "out-of-bounds", "failed", "out of bounds"),
            (SHAPE, "crashes", "failed", "a message from below"),
            (SHAPE, "babbles", "failed", "no message"),
            (VERIFY, "right", "faster", ""),
            (PRODUCT, "right", "faster", ""),
            (PRODUCT, "wrong", "wrong", ""),
            (PRODUCT, "does-not-compile", "failed", "EmulationError"),
            (PRODUCT, "out-of-bounds", "failed", "out of bounds"),
        ],
    )
    def test_outcome(self, emulator, shape, behaviour, outcome, detail):
        verdict = child(behaviour).prove(shape)
        assert verdict.outcome == outcome and detail in verdict.detail, verdict
        if outcome in ("faster", "slower"):
            assert verdict.error is not None and verdict.error <= TOLERANCE["float32"]
            assert verdict.speed is not None and (verdict.speed > 1) == (outcome == "faster")
            assert verdict.plain_ms and verdict.kernel_ms
            assert verdict.bit_equal is (False if shape is PRODUCT else None)
        if behaviour == "wrong":
            assert verdict.error is not None and verdict.error > TOLERANCE["float32"]

    def test_one_that_hangs_is_killed(self, emulator, monkeypatch):
        started = []

        class Kept(subprocess.Popen):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                started.append(self)

        monkeypatch.setattr(subprocess, "Popen", Kept)
        assert child("hangs", time_limit=3).prove(SHAPE).outcome == "stalled"
        assert [process.returncode for process in started] == [-signal.SIGKILL]

    def test_an_abandoned_child_ends_itself(self, emulator):
        command = [sys.executable, "-m", "tests.metal.proof_child", "hangs", SHAPE.key, "2"]
        path = os.pathsep.join(p for p in sys.path if p)
        run = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, timeout=60)
        assert run.returncode == -14  # by the alarm that it set

    def test_the_command_of_users(self):
        verdict = Prover().prove(SHAPE)
        if mx.metal.is_available():
            assert verdict.correct, verdict
        else:
            assert verdict.outcome == "failed" and "No Metal back-end" in verdict.detail

    def test_a_program_that_cannot_start(self):
        assert Prover(("/no/such/program",)).prove(SHAPE).outcome == "failed"

    def test_differences(self):
        one = mx.array([1.0, 2.0])
        assert difference(one, one + 0.5) == 0.5
        nan = difference(one, mx.array([1.0, float("nan")]))
        assert nan != nan
        other = difference(one, mx.array([1.0]))
        assert other != other

    def test_speed_is_the_median_ratio(self):
        plain_seconds = iter([3.0, 30.0, 3.0, 3.0, 0.1, 3.0, 3.0])

        def stopwatch(run, calls):
            return 2.0 if run is plain_block_attention else next(plain_seconds)

        found = compare(SHAPE, plain_block_attention, [], stopwatch)
        assert found == Timing(speed=1.5, plain=3.0, kernel=2.0)

    def test_the_slowest_of_a_class_counts_and_only_gains_are_tried_under_load(self):
        class Shape:
            dtype, trials, bit_equal = "float32", lambda self: [], lambda self, kernel: True

            def timed(self):
                return iter([["few"], ["many"], ["never"]])

            def plain(self, **call):
                raise AssertionError

        asked = []

        def stopwatch(run, calls):
            asked.append(calls[0])
            return 1.0 if run == "kernel" else {"few": 2.0, "many": 1.0}[calls[0]]

        verdict = prove(Shape(), "kernel", stopwatch, load_seconds=0.05)
        assert (verdict.outcome, verdict.speed, verdict.bit_equal) == ("slower", 1.0, True)
        assert asked.count("many") == 14 < 28 < asked.count("few")

    def test_settling(self, emulator):
        prover = child("right")
        done = []
        assert prover.settle(0) and not prover.busy
        prover.request(SHAPE, lambda shape, verdict: done.append(verdict))
        assert prover.busy and not prover.settle(0)
        assert prover.settle(60) and done[0].outcome == "faster" and not prover.busy


class TestChoice:
    def test_plain_until_the_proof_ends_then_the_kernel(self, select, emulator):
        chosen = select("right")
        expected = plain_block_attention(**CALL)
        assert mx.array_equal(block_attention(**CALL), expected)
        assert not emulator.calls
        assert wait_for_verdict(chosen).outcome == "faster"
        out = block_attention(**CALL)
        assert emulator.calls == {"block_attention": 1, "block_attention_merge": 1}
        assert difference(out, expected) < 1e-5
        # The next process finds the verdict in the file.
        again = select("crashes")
        block_attention(**CALL)
        assert emulator.calls["block_attention"] == 2
        assert not again.prover.busy

    @pytest.mark.parametrize("behaviour", ["wrong", "does-not-compile", "slow"])
    def test_a_kernel_that_gives_way_says_so_in_one_line(self, select, emulator, behaviour, caplog):
        caplog.set_level(logging.INFO, "dflash_mlx.metal")
        chosen = select(behaviour)
        block_attention(**CALL)
        wait_for_verdict(chosen)
        for _ in range(2):
            assert mx.array_equal(block_attention(**CALL), plain_block_attention(**CALL))
        assert not emulator.calls
        (record,) = caplog.records
        assert SHAPE.key in record.getMessage() and "\n" not in record.getMessage()
        # That MLX is as fast for some shapes is no news.
        assert record.levelno == (logging.INFO if behaviour == "slow" else logging.WARNING)

    def test_nothing_waits_for_a_proof_that_hangs(self, select, emulator, caplog):
        chosen = select("hangs", time_limit=4)
        assert mx.array_equal(block_attention(**CALL), plain_block_attention(**CALL))
        assert chosen.book.get(SHAPE.key) is None  # the proof is still running
        assert wait_for_verdict(chosen).outcome == "stalled"
        block_attention(**CALL)
        assert not emulator.calls and "stalled" in caplog.text

    def test_each_class_is_asked_for_once(self, select):
        asked = []
        chosen = select()
        chosen.prover.request = lambda shape, done: asked.append(shape)
        for call in (CALL, CALL, SHAPE.call(4, 600, seed=1), SHAPE.call(5, 600, seed=1)):
            block_attention(**call)
        assert [shape.length for shape in asked] == [4, 8]

    @pytest.mark.parametrize(
        ("mode", "outcome", "kernel"),
        [
            ("off", "faster", False),
            ("auto", "faster", True),
            ("auto", "slower", False),
            ("on", "slower", True),
            ("on", "wrong", False),
            ("on", "stalled", False),
            ("auto", "failed", False),
        ],
    )
    def test_modes(self, select, emulator, mode, outcome, kernel):
        select(mode=mode).book.put(SHAPE.key, Verdict(outcome))
        block_attention(**CALL)
        assert bool(emulator.calls) == kernel

    @pytest.mark.parametrize(
        "call",
        [
            Case(length=33, dim=32, context_length=300).arrays(),
            Case(length=3, dim=48, context_length=300).arrays(),
            Case(length=3, dim=32, context_length=100).arrays(),
            Case(length=3, dim=32, context_length=900, window=50).arrays(),
        ],
    )
    def test_unfit_or_small_calls_are_never_asked_for(self, select, call):
        chosen = select()
        chosen.prover.request = None
        block_attention(**call)

    def test_a_use_that_is_left_out(self, select, emulator):
        chosen = select()
        chosen.book.put(SHAPE.key, Verdict("faster"))
        assert chosen.kernel_for(SHAPE) is not None
        chosen.uses = frozenset({"rows"})
        assert chosen.kernel_for(SHAPE) is None
        block_attention(**CALL)
        assert not emulator.calls

    def test_without_metal_nothing_is_asked_for(self, select):
        chosen = select()
        chosen.ready = selection.gpu_ready
        chosen.prover.request = None
        if not mx.metal.is_available():
            block_attention(**CALL)

    def test_gradient_is_that_of_plain_mlx(self, select, emulator):
        select().book.put(SHAPE.key, Verdict("faster"))
        rest = {k: v for k, v in CALL.items() if k != "queries"}
        sinks = mx.array([0.5])

        def loss(attention):
            return lambda queries, sinks: (attention(queries, sinks=sinks, **rest) ** 2).sum()

        got = mx.grad(loss(block_attention), argnums=(0, 1))(CALL["queries"], sinks)
        assert emulator.calls
        expected = mx.grad(loss(plain_block_attention), argnums=(0, 1))(CALL["queries"], sinks)
        for one, other in zip(got, expected, strict=True):
            assert mx.allclose(one, other, atol=1e-4) and mx.abs(other).max().item() > 0

    def test_environment(self, monkeypatch):
        for value, mode in (("off", "off"), ("ON", "on"), ("", "auto")):
            monkeypatch.setenv("DFLASH_MLX_KERNELS", value)
            assert Selection().mode == mode
        monkeypatch.delenv("DFLASH_MLX_KERNELS")
        assert Selection().mode == "auto"
        monkeypatch.setenv("DFLASH_MLX_KERNELS", "yes")
        with pytest.raises(ValueError, match="off, auto or on"):
            Selection()


class TestVerdictBook:
    KEPT = Verdict("faster", error=1e-6, speed=1.5)

    def test_kept_for_the_next_process(self, tmp_path):
        path = tmp_path / "deep" / "book.json"
        VerdictBook(path).put("a", self.KEPT)
        VerdictBook(path).put("b", Verdict("stalled", detail="no result"))
        assert VerdictBook(path).all() == {
            "a": self.KEPT,
            "b": Verdict("stalled", detail="no result"),
        }
        assert [p.name for p in path.parent.iterdir()] == ["book.json"]

    def test_two_processes_keep_each_others(self, tmp_path):
        one, other = VerdictBook(tmp_path / "b"), VerdictBook(tmp_path / "b")
        assert one.get("x") is None and other.get("x") is None
        one.put("a", self.KEPT)
        other.put("b", self.KEPT)
        assert list(VerdictBook(tmp_path / "b").all()) == ["a", "b"]

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "{",
            "[1]",
            "null",
            "\x00\xff",
            '{"a": 3}',
            '{"a": {"outcome": "good"}}',
            '{"a": {"outcome": "faster", "speed": "fast"}}',
        ],
    )
    def test_a_damaged_file_is_empty_and_written_anew(self, tmp_path, text, caplog):
        path = tmp_path / "book.json"
        path.write_bytes(text.encode("latin1"))
        book = VerdictBook(path)
        assert book.get("a") is None and book.get("a") is None
        assert len(caplog.records) == 1 and "damaged" in caplog.text
        book.put("a", self.KEPT)
        assert VerdictBook(path).get("a") == self.KEPT and book.problem is None

    def test_an_unwritable_directory_costs_one_line(self, tmp_path, caplog):
        (tmp_path / "file").write_text("")
        book = VerdictBook(tmp_path / "file" / "book.json")
        book.put("a", self.KEPT)
        book.put("b", self.KEPT)
        assert book.get("a") == book.get("b") == self.KEPT
        assert book.problem and "cannot be" in book.problem
        kept = [r for r in caplog.records if "kept" in r.getMessage()]
        assert len(kept) == 1

    def test_a_crash_while_writing_leaves_the_old_file(self, tmp_path, monkeypatch):
        path = tmp_path / "book.json"
        VerdictBook(path).put("a", self.KEPT)
        before = path.read_text()

        def crash(*args):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "replace", crash)
        book = VerdictBook(path)
        book.put("b", self.KEPT)
        assert path.read_text() == before and book.get("b") == self.KEPT
        assert [p.name for p in tmp_path.iterdir()] == ["book.json"]

    @given(
        st.builds(
            Verdict,
            st.sampled_from(OUTCOMES),
            st.none() | st.floats(0, 10),
            st.none() | st.floats(0, 10),
            st.none() | st.floats(0, 10),
            st.none() | st.floats(0, 10),
            st.none() | st.booleans(),
            st.text(max_size=20),
        )
    )
    def test_json_form(self, verdict):
        from dataclasses import asdict

        assert Verdict.read(json.loads(json.dumps(asdict(verdict)))) == verdict

    def test_path_names_machine_and_versions(self, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        path = book_path()
        assert "mlx-" in path.name and "dflash-mlx-" in path.name and " " not in path.name
        if sys.platform != "darwin":
            assert tmp_path in path.parents


ATTENTION_CLASSES = st.builds(
    AttentionClass,
    use=st.sampled_from(USES),
    dim=st.sampled_from([32, 64, 128]),
    dtype=st.sampled_from(list(DTYPE_NAMES)),
    length=st.sampled_from(LENGTHS),
    context=st.sampled_from(CONTEXTS),
    ratio=st.integers(1, 16),
)
ROWS_CLASSES = st.builds(
    RowsClass,
    dtype=st.sampled_from(list(DTYPE_NAMES)),
    rows=st.sampled_from([last for _, last in ROWS]),
    outputs=st.sampled_from(OUTPUTS),
    inner=st.sampled_from(INNER),
    group_size=st.sampled_from(GROUP_SIZES),
    bits=st.sampled_from(BITS),
)


class TestShapeClass:
    @given(ATTENTION_CLASSES | ROWS_CLASSES)
    def test_key_names_the_class(self, shape):
        assert parse(shape.key) == shape

    @pytest.mark.parametrize(
        "key",
        [
            "",
            "draft",
            "draft-float32-d33-l4-s512-g1",
            "draft-int8-d32-l4-s512-g1",
            "other-float32-d32-l4-s512-g1",
            "draft-float32-d32-l4-s512-gx",
            "rows-float32-m8-n4096-k1024-g48-b4",
            "rows-float32-m7-n4096-k1024-g64-b4",
            "rows-float32-m8-n5000-k1024-g64-b4",
        ],
    )
    def test_no_other_key(self, key):
        with pytest.raises(ValueError, match="shape class"):
            parse(key)

    @given(st.integers(1, 32), st.integers(0, 200_000))
    def test_a_call_falls_into_the_class_around_it(self, length, seen):
        shape = class_of("verify", mx.zeros((1, 4, length, 64)), 2, seen)
        if seen < 256:
            assert shape is None
            return
        assert shape is not None and shape.ratio == 2 and shape.use == "verify"
        assert length <= shape.length and (shape.length == 4 or length > shape.length // 2)
        assert shape.context // 2 <= seen
        assert seen < 2 * shape.context or shape.context == CONTEXTS[-1]

    @given(st.integers(2, 16), st.integers(1, 300_000), st.integers(32, 30_000))
    def test_a_product_falls_into_the_class_above_it(self, rows, outputs, inner):
        shape = rows_class(mx.float16, rows, outputs, inner, 64, 4)
        assert (shape is None) == (outputs < 4096 or inner < 512)
        if shape is not None:
            assert rows <= shape.rows and (rows <= MAX_FEW) == (shape.rows <= MAX_FEW)
            assert outputs <= shape.outputs or shape.outputs == OUTPUTS[-1]
            assert inner <= shape.inner or shape.inner == INNER[-1]
            assert all(n < outputs for n in OUTPUTS if n < shape.outputs)

    @pytest.mark.parametrize("use", USES)
    def test_trials_cover_what_the_class_may_compile(self, use):
        from dflash_mlx.metal.attention_kernel import row_tiles

        shape = AttentionClass(use, dim=64, dtype="float32", length=16, context=512, ratio=4)
        trials = list(shape.trials())
        tried = {row_tiles(4 * call["queries"].shape[2]) for call in trials}
        assert tried == {row_tiles(4 * n) for n in range(9, 17)}
        if use == "verify":  # MLX's own attention is right about these calls
            for call in trials[:2]:
                assert difference(shape.plain(**call), plain_block_attention(**call)) < 1e-5

    def test_trials_have_every_number_of_rows(self):
        trials = list(PRODUCT.trials())
        assert {call["x"].shape[0] for call in trials} == {6, 7, 8}
        assert {call["x"].shape[1] % 512 == 0 for call in trials} == {True, False}
        for call in trials:
            assert 0.3 < PRODUCT.plain(**call).std().item() < 3
        assert [calls[0]["x"].shape[0] for calls in PRODUCT.timed()] == [6, 8]

    def test_bit_equality(self):
        def by_rows(x, *rest, **options):
            rows = [PRODUCT.plain(x=x[i : i + 1], **options) for i in range(x.shape[0])]
            return mx.concatenate(rows)

        assert PRODUCT.bit_equal(by_rows) is True
        assert PRODUCT.bit_equal(lambda **call: by_rows(**call) * (1 + 2**-23)) is False
