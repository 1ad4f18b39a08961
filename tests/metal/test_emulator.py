"""The emulator notices faults, and runs kernels that mlx-lm ships as plain MLX would."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from .emulator import EmulationError, Emulator, need_compiler
from .shipped import load_shipped


@pytest.fixture(autouse=True)
def compiler():
    need_compiler()


def run(source, inputs, shape, *, header="", template=(), grid=None, group=(32, 1, 1), **options):
    """One run of a kernel with inputs a, b, ... and the output `out`, float32."""
    arrays = [x if isinstance(x, mx.array) else mx.array(x) for x in inputs]
    kernel = Emulator().metal_kernel(
        "case", list("abcdefgh")[: len(arrays)], ["out"], source, header, **options
    )
    return kernel(
        inputs=arrays,
        output_shapes=[shape],
        output_dtypes=[mx.float32],
        grid=grid or (int(np.prod(shape)), 1, 1),
        threadgroup=group,
        template=template,
    )[0]


def fails(message, *args, **options):
    with pytest.raises(EmulationError, match=message):
        run(*args, **options)


X = mx.arange(40, dtype=mx.float32)
COPY = "uint i = thread_position_in_grid.x; out[i] = a[i];"


class TestFaults:
    def test_none(self):
        assert mx.array_equal(run(COPY, [X], (40,)), X)

    def test_read_out_of_bounds(self):
        fails("out of bounds: a", COPY, [X], (41,))
        fails("out of bounds: a", COPY.replace("a[i]", "a[i - 1]"), [X], (40,))

    def test_write_out_of_bounds(self):
        fails("out of bounds: out", COPY, [X], (39,), grid=(40, 1, 1))

    def test_output_unwritten(self):
        fails("4 bytes of out unwritten, from 156", COPY, [X], (40,), grid=(39, 1, 1))

    REVERSE = """
        threadgroup float box[64];
        uint i = thread_position_in_threadgroup.x;
        box[i] = a[i];
        threadgroup_barrier(mem_flags::mem_threadgroup);
        out[i] = box[39 - i];
    """

    def test_missing_barrier(self):
        assert mx.array_equal(run(self.REVERSE, [X], (40,), group=(64, 1, 1)), X[::-1])
        without = self.REVERSE.replace("threadgroup_barrier(mem_flags::mem_threadgroup);", "")
        fails("race|order", without, [X], (40,), group=(64, 1, 1))

    def test_missing_barrier_seen_by_order_alone(self):
        # Threads of one simdgroup hand values on through the output, which no shadow watches.
        source = """
            uint i = thread_position_in_grid.x;
            out[i] = 1.0f;
            out[i] = i > 0 ? out[i - 1] + 1.0f : 0.0f;
        """
        fails("order", source, [X], (32,))

    def test_write_after_read_without_barrier(self):
        source = self.REVERSE + "box[i] = 0.0f;"
        fails("race", source, [X], (40,), group=(64, 1, 1))

    def test_barrier_that_some_miss(self):
        source = COPY + "if (i != 5) threadgroup_barrier(mem_flags::mem_threadgroup);"
        fails("barrier that some", source, [X], (40,), group=(64, 1, 1))

    def test_barrier_of_other_memory(self):
        fails(
            "order threadgroup", self.REVERSE.replace("mem_threadgroup)", "mem_none)"), [X], (40,)
        )

    def test_simdgroup_operation_that_some_miss(self):
        source = (
            "uint i = thread_position_in_grid.x; out[i] = a[i]; if (i > 3) out[i] = simd_sum(1.0f);"
        )
        fails("some lanes do not reach", source, [X], (32,))

    def test_threadgroup_array_out_of_bounds(self):
        fails("threadgroup access", self.REVERSE.replace("39 - i", "64 - i"), [X], (40,))

    def test_threadgroup_memory_starts_undefined(self):
        source = "threadgroup float box[4]; out[thread_position_in_grid.x] = box[0];"
        assert np.isnan(np.array(run(source, [X], (3,)))).all()

    def test_threadgroup_memory_limit(self):
        source = "threadgroup float box[{}]; box[0] = 0.0f;" + COPY
        run(source.format(8192), [X], (1,))
        fails("32 KB", source.format(8193), [X], (1,))

    def test_kernels_of_one_signature_do_not_share_memory(self):
        template = [("N", 64)]
        source = self.REVERSE.replace("box[64]", "box[N]")
        for change in ("", "// another kernel", "// and another"):
            out = run(source + change, [X], (40,), group=(64, 1, 1), template=template)
            assert mx.array_equal(out, X[::-1])

    def test_unqualified_pointer(self):
        header = "inline float first(const float* p) { return p[0]; }"
        fails("refused", COPY.replace("a[i]", "first(a)"), [X], (40,), header=header)

    def test_later_language(self):
        fails("refused", "if constexpr (true) {" + COPY + "}", [X], (40,))

    def test_no_compiler_is_a_skip_but_not_in_ci(self, monkeypatch):
        monkeypatch.setenv("PATH", "")
        monkeypatch.delenv("CI", raising=False)
        with pytest.raises(pytest.skip.Exception, match="g\\+\\+"):
            need_compiler()
        monkeypatch.setenv("CI", "true")
        with pytest.raises(AssertionError):
            need_compiler()


class TestCallingConvention:
    def test_zero_dimensions_are_a_reference_and_sizes_seven_and_eight_pointers(self):
        assert run("out[0] = a + 1.0f;", [2.0], (1,)).item() == 3.0
        fails("refused", "out[0] = a[0];", [2.0], (1,))
        for size in (1, 7, 8):
            assert run("out[0] = a[a_shape[0] - 1];", [X[:size]], (1,)).item() == size - 1

    def test_few_elements_are_constant(self):
        header = """
            inline float first(const constant float* p) { return p[0]; }
        """
        assert run("out[0] = first(a);", [X[:7]], (1,), header=header).item() == 0
        fails("refused", "out[0] = first(a);", [X[:8]], (1,), header=header)

    def test_grid_counts_threads_and_its_edge_is_ragged(self):
        source = """
            uint3 p = thread_position_in_grid, g = threads_per_threadgroup;
            uint group = threadgroup_position_in_grid.x;
            out[(p.z * 3 + p.y) * 50 + p.x] = g.x + 100 * g.y + 1000 * group;
        """
        out = np.array(run(source, [X], (2, 3, 50), grid=(50, 3, 2), group=(32, 2, 1)))
        assert out[0, 0, 0] == 232 and out[0, 2, 0] == 132 and out[1, 2, 49] == 1118

    def test_strides_are_followed_without_a_copy_and_copied_by_default(self):
        source = """
            uint i = thread_position_in_grid.x;
            out[i] = a[i / 4 * a_strides[0] + i % 4 * a_strides[1]] + 100 * (a_strides[1] == 1);
        """
        x = X[:12].reshape(3, 4)
        view = X[:12].reshape(4, 3).T
        plain = run(source, [view], (12,), ensure_row_contiguous=False)
        assert mx.array_equal(plain.reshape(3, 4), view)
        assert mx.array_equal(run(source, [x], (12,)).reshape(3, 4), x + 100)
        assert mx.array_equal(run(source, [view], (12,)).reshape(3, 4), view + 100)

    @pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
    def test_sixteen_bit_floats_round_as_mlx_rounds(self, dtype):
        x = mx.random.normal((512,), key=mx.random.key(1)) * 1e-3
        y = mx.random.normal((512,), key=mx.random.key(2))
        source = """
            uint i = thread_position_in_grid.x;
            T x = static_cast<T>(a[i]), y = static_cast<T>(b[i]);
            out[i] = static_cast<float>(x * y + x);
        """
        out = run(source, [x, y], (512,), template=[("T", dtype)])
        small, other = x.astype(dtype), y.astype(dtype)
        assert mx.array_equal(out, (small * other + small).astype(mx.float32))

    def test_simdgroup_matrix_product(self):
        source = """
            uint lane = thread_index_in_simdgroup;
            int row = lane / 16 * 4 + lane / 2 % 4, column = lane / 8 % 2 * 4 + lane % 2 * 2;
            simdgroup_matrix<float, 8, 8> x, y, z(0.5f);
            for (int e = 0; e < 2; e++) {
                x.thread_elements()[e] = a[row * 8 + column + e];
                y.thread_elements()[e] = b[row * 8 + column + e];
            }
            simdgroup_multiply_accumulate(z, x, y, z);
            for (int e = 0; e < 2; e++) {
                out[row * 8 + column + e] = z.thread_elements()[e];
            }
        """
        x, y = (mx.random.normal((8, 8), key=mx.random.key(k)) for k in (1, 2))
        out = run(source, [x, y], (8, 8), grid=(32, 1, 1))
        assert mx.allclose(out, x @ y + 0.5 * mx.eye(8), atol=1e-5)

    def test_bytes_are_counted(self):
        emulator = Emulator()
        kernel = emulator.metal_kernel("count", ["a"], ["out"], COPY)
        kernel(
            inputs=[X],
            output_shapes=[(40,)],
            output_dtypes=[mx.float32],
            grid=(40, 1, 1),
            threadgroup=(32, 1, 1),
        )
        assert emulator.traffic == {("count", "a"): (160, 0), ("count", "out"): (0, 160)}
        assert emulator.calls == {"count": 1}


def normal(*shape, seed):
    return mx.random.normal(shape, key=mx.random.key(seed))


class TestShippedKernels:
    """Unmodified kernels of mlx-lm against plain MLX."""

    def test_expert_routing(self):
        routing = load_shipped("kernels.expert_routing", Emulator()).expert_routing
        logits, bias = normal(5, 40, seed=1), normal(40, seed=2)
        experts, weights = routing(
            logits, bias, top_k=4, multiplier=1.5, score_eps=1e-6, route_scale=2.0
        )
        scores = mx.sigmoid(logits * 1.5)
        expected = mx.argsort(-(scores + bias), axis=-1)[:, :4]
        assert mx.array_equal(experts, expected)
        chosen = mx.take_along_axis(scores, expected, axis=-1)
        chosen = chosen / (chosen.sum(axis=-1, keepdims=True) + 1e-6) * 2.0
        assert mx.allclose(weights, chosen, atol=1e-6)

    @pytest.mark.parametrize("dim", [64, 200, 640])
    def test_norm_add_norm(self, dim):
        kernel = load_shipped("kernels.norm_add_norm", Emulator()).norm_add_norm
        branch, stream = normal(3, dim, seed=1), normal(3, dim, seed=2)
        alpha, beta = normal(dim, seed=3), normal(dim, seed=4)
        norm = nn.RMSNorm(dim, eps=1e-5)
        norm.weight = normal(dim, seed=5)
        out, normed = kernel(
            branch,
            stream,
            alpha=alpha,
            beta=beta,
            post_weight=None,
            post_eps=1e-6,
            next_norm=norm,
        )
        expected = alpha * stream + beta * mx.fast.rms_norm(branch, None, 1e-6)
        assert mx.allclose(out, expected, atol=1e-5)
        assert mx.allclose(normed, norm(expected), atol=1e-4)

    def test_qk_norm_rope(self):
        kernel = load_shipped("kernels.qk_norm_rope", Emulator()).qk_norm_rope
        qkvg = normal(1, 5, 2 * 3 * 64, seed=1)
        q, k = kernel(
            qkvg,
            n_heads=2,
            n_kv_heads=1,
            head_dim=64,
            eps=1e-6,
            query_scale=0.125,
            rope_base=10000.0,
            offset=7,
        )
        for got, part, scale in ((q, qkvg[..., :128], 0.125), (k, qkvg[..., 128:192], 1.0)):
            heads = part.reshape(1, 5, -1, 64).transpose(0, 2, 1, 3)
            normed = mx.fast.rms_norm(heads, None, 1e-6) * scale
            expected = mx.fast.rope(normed, 64, traditional=True, base=10000.0, scale=1.0, offset=7)
            assert mx.allclose(got, expected.transpose(0, 2, 1, 3), atol=2e-5)

    def test_post_expert_norm_combine(self):
        kernel = load_shipped("kernels.post_expert_norm_combine", Emulator())
        experts, weights = normal(2, 3, 4, 96, seed=1), normal(2, 3, 4, seed=2)
        out = kernel.post_expert_norm_combine(
            experts, weights, norm_weight=1 + normal(96, seed=3), eps=1e-6
        )
        scaled = experts * (1 + normal(96, seed=3))
        expected = (mx.fast.rms_norm(scaled, None, 1e-6) * weights[..., None]).sum(axis=-2)
        assert mx.allclose(out, expected, atol=1e-5)

    @pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
    @pytest.mark.parametrize("masked", [False, True])
    def test_gated_delta(self, dtype, masked):
        module = load_shipped("models.gated_delta", Emulator())
        batch, length, heads, dim = 2, 5, 2, 64
        q, k, v = (
            (normal(batch, length, heads, dim, seed=s) * dim**-0.5).astype(dtype) for s in (1, 2, 3)
        )
        g = mx.sigmoid(normal(batch, length, heads, seed=4))
        beta = mx.sigmoid(normal(batch, length, heads, seed=5)).astype(dtype)
        state = normal(batch, heads, dim, dim, seed=6)
        mask = mx.array([[True] * 5, [False, False, True, True, True]]) if masked else None
        y, after = module.gated_delta_kernel(q, k, v, g, beta, state, mask)
        expected, expected_state = module.gated_delta_ops(q, k, v, g, beta, state, mask)
        if mask is not None:  # outputs of masked steps are not used
            y, expected = y * mask[..., None, None], expected * mask[..., None, None]
        tolerance = 1e-5 if dtype == mx.float32 else 2e-2
        assert mx.allclose(y.astype(mx.float32), expected.astype(mx.float32), atol=tolerance)
        assert mx.allclose(after, expected_state, atol=tolerance)

    def test_ssm(self):
        module = load_shipped("models.ssm", Emulator())
        heads, dim, states = 4, 8, 64
        x = normal(1, 1, heads, dim, seed=1)
        a_log, d, bias = (normal(heads, seed=s) for s in (2, 3, 4))
        b, c = normal(1, 1, 1, states, seed=5), normal(1, 1, 1, states, seed=6)
        dt, state = normal(1, 1, heads, seed=7), normal(1, heads, dim, states, seed=8)
        limits = (0.001, 100.0)
        y, after = module.ssm_update_kernel(x, a_log, b, c, d, dt, bias, state, limits)
        step = module.compute_dt(dt, bias, limits).reshape(1, heads, 1, 1)
        decay = mx.exp(-mx.exp(a_log).reshape(1, heads, 1, 1) * step)
        expected_state = decay * state + step * x.reshape(1, heads, dim, 1) * b.reshape(
            1, 1, 1, states
        )
        expected = (expected_state * c.reshape(1, 1, 1, states)).sum(axis=-1)
        expected = expected + x.reshape(1, heads, dim) * d.reshape(1, heads, 1)
        assert mx.allclose(after, expected_state, atol=1e-5)
        assert mx.allclose(y.reshape(1, heads, dim), expected, atol=1e-4)
