// The chunked gated delta rule for one x86 processor with AMX: matrices in bfloat16, sums, states and decays in float32.
//
// The maths and the names are those of `_Chunked` in gated_delta.py, where the identities of the backward pass are
// explained. Here one thread takes one sequence of one head through all of its chunks, so that whatever lies between
// the inputs and the output stays in its cache. Built and called by gated_delta_amx.py.
//
// Shapes: B batch, T tokens, H heads, N chunks, C tokens of a chunk, K key dim, V value dim.

#include "amx_matrices.h"

#include <cstring>
#include <memory>
#include <sys/syscall.h>
#include <unistd.h>

namespace {

constexpr int C = 64;

constexpr int largest(int a, int b) { return a > b ? a : b; }

// What the caller hands over: inputs [B, T, H, ...] and, by chunk, what the backward pass needs again.
struct Call {
    const bf16 *q, *k, *v;
    const float *g, *beta, *state; // state: [B, H, K, V], or null for zeros
    bf16 *o;
    float *final;
    bf16 *states, *x, *inverses; // [B, H, N, ...] of [K, V], [C, V], [C, C]
    const bf16 *grad_o;
    const float *grad_final; // or null
    bf16 *dq, *dk, *dv;
    float *dg, *dbeta, *dstate;
    float scale;
    int64_t B, T, H;
};

// One chunk's inputs, with zeros after the sequence's end, and its decays.
template <int K, int V> struct alignas(64) Chunk {
    bf16 q[C * K], k[C * K], v[C * V];
    float beta[C], from_start[C], to_end[C], negative[C], decay[C * C]; // negative: -from_start beta
    float matrix[C * C];
    bf16 scores[C * C], packed[C * largest(C, K)];
    int64_t first, num_tokens, num_heads;

    template <int W, class T> static void gather(const T *x, int64_t stride, int64_t count, T *y) {
        for (int64_t i = 0; i < count; ++i) std::memcpy(y + i * W, x + i * stride, W * sizeof(T));
        std::memset(y + count * W, 0, (C - count) * W * sizeof(T));
    }

    template <int W, class T> void scatter(const T *x, T *y) const {
        for (int64_t i = 0; i < num_tokens; ++i)
            std::memcpy(y + (first + i * num_heads) * W, x + i * W, W * sizeof(T));
    }

    void read(const Call &call, int64_t sequence, int64_t start) {
        num_heads = call.H, num_tokens = call.T - start < C ? call.T - start : C;
        first = (sequence / call.H * call.T + start) * call.H + sequence % call.H;
        gather<K>(call.q + first * K, call.H * K, num_tokens, q);
        gather<K>(call.k + first * K, call.H * K, num_tokens, k);
        gather<V>(call.v + first * V, call.H * V, num_tokens, v);
        gather<1>(call.beta + first, call.H, num_tokens, beta);
        float g[C];
        gather<1>(call.g + first, call.H, num_tokens, g);
        set_decays(g);
    }

    // Running sums as two numbers each: their difference would lose its digits after one strong decay.
    void set_decays(const float *g) {
        alignas(64) float high[C], low[C];
        double sum = 0;
        for (int i = 0; i < C; ++i) sum += g[i], high[i] = float(sum), low[i] = float(sum - double(high[i]));
        for (int i = 0; i < C; ++i)
            for (int j = 0; j < C; j += 16) {
                const int count = i - j + 1; // of these 16 columns, those that are not right of the diagonal
                const __mmask16 kept = count <= 0 ? 0 : count >= 16 ? 0xffff : (1u << count) - 1;
                const __m512 exact = _mm512_add_ps(_mm512_sub_ps(all(high[i]), load(high + j)),
                                                   _mm512_sub_ps(all(low[i]), load(low + j)));
                store(decay + i * C + j, kept ? _mm512_maskz_mov_ps(kept, exp16(exact)) : _mm512_setzero_ps());
            }
        for (int j = 0; j < C; j += 16) {
            store(from_start + j, exp16(load(high + j)));
            store(to_end + j, load(decay + (C - 1) * C + j));
        }
        for (int i = 0; i < C; ++i) negative[i] = -from_start[i] * beta[i];
    }

    // scores = factor (q k^T * decay); leaves k packed as it is needed for that.
    void set_scores(float factor) {
        pack_transpose<C, K>(k, packed);
        product<C, C, K>(q, packed, matrix);
        fill<C, C>(scores, [&](int i, int j) {
            return _mm512_mul_ps(load(matrix + i * C + j), _mm512_mul_ps(load(decay + i * C + j), all(factor)));
        });
    }
};

template <int K, int V> struct alignas(64) Forward {
    static constexpr int W = largest(C, largest(K, V));
    Chunk<K, V> chunk;
    float state[K * V], sums[W * W], inverse[C * C];
    bf16 left[W * W], turned[W * W], packed[W * W], packed_state[K * V];

    void run(const Call &call, int64_t sequence) {
        const int64_t num_chunks = (call.T + C - 1) / C;
        if (call.state) std::memcpy(state, call.state + sequence * K * V, sizeof state);
        else std::memset(state, 0, sizeof state);
        for (int64_t n = 0; n < num_chunks; ++n) {
            const int64_t at = sequence * num_chunks + n;
            chunk.read(call, sequence, n * C);
            step(call, call.states + at * K * V, call.x + at * C * V, call.inverses + at * C * C);
        }
        std::memcpy(call.final + sequence * K * V, state, sizeof state);
    }

    void step(const Call &call, bf16 *state_low, bf16 *x, bf16 *inverse_low) {
        chunk.set_scores(call.scale);
        product<C, C, K>(chunk.k, chunk.packed, sums);
        fill<C, C>(sums, [&](int i, int j) {
            const __m512 decay = _mm512_mul_ps(load(chunk.decay + i * C + j), all(chunk.beta[i]));
            return _mm512_mul_ps(load(sums + i * C + j), decay);
        });
        unit_lower_inverse<C>(sums, inverse);
        narrow<C, C>(inverse, inverse_low);

        narrow<K, V>(state, state_low);
        pack<K, V>(state_low, packed_state);
        // What is asked to be written: beta v - (exp(c) beta k) S.
        scale_rows<C, V>(chunk.v, chunk.beta, sums);
        scale_rows<C, K>(chunk.k, chunk.negative, left);
        product<C, V, K>(left, packed_state, sums, true);
        narrow<C, V>(sums, left);
        pack<C, V>(left, packed);
        product<C, V, C>(inverse_low, packed, sums);
        narrow<C, V>(sums, x);
        pack<C, V>(x, packed);

        const float total = chunk.from_start[C - 1];
        fill<K, V>(state, [&](int i, int j) { return _mm512_mul_ps(load(state + i * V + j), all(total)); });
        scale_rows<C, K>(chunk.k, chunk.to_end, left);
        pack<C, K>(left, turned);
        transpose32<C / 2, K>(turned, left);
        product<K, V, C>(left, packed, state, true);

        fill<C, K>(left, [&](int i, int j) {
            return _mm512_mul_ps(load(chunk.q + i * K + j), all(chunk.from_start[i] * call.scale));
        });
        product<C, V, K>(left, packed_state, sums);
        product<C, V, C>(chunk.scores, packed, sums, true);
        narrow<C, V>(sums, left);
        chunk.template scatter<V>(left, call.o);
    }
};

template <int K, int V> struct alignas(64) Backward {
    static constexpr int W = largest(C, largest(K, V));
    Chunk<K, V> chunk;
    float grad_state[K * V], sums[W * W], dq[C * K], dk_reader[C * K], dk_memory[C * K];
    bf16 grad_state_low[K * V], left[W * W], turned[W * W], packed[W * W];
    bf16 grad_o[C * V], packed_grad_o[C * V], z[C * V], packed_z[C * V], packed_x[C * V], packed_k[C * K];
    bf16 packed_state[K * V], grad_scores[C * C], grad_a[C * C];
    float dot_reader[C], dc[C], dbeta[C];

    void run(const Call &call, int64_t sequence) {
        const int64_t num_chunks = (call.T + C - 1) / C;
        if (call.grad_final) std::memcpy(grad_state, call.grad_final + sequence * K * V, sizeof grad_state);
        else std::memset(grad_state, 0, sizeof grad_state);
        for (int64_t n = num_chunks - 1; n >= 0; --n) {
            const int64_t at = sequence * num_chunks + n;
            const bf16 *state = call.states + at * K * V, *x = call.x + at * C * V;
            chunk.read(call, sequence, n * C);
            narrow<K, V>(grad_state, grad_state_low);
            // In the decay of the state, before its gradient goes on to the chunk before.
            float kept = 0;
            for (int i = 0; i < K; ++i) kept += dot<V>(state + i * V, grad_state_low + i * V);
            solve(call, call.inverses + at * C * C);
            key_gradients(state, x);
            write_gradients(call, kept);
            previous_state();
        }
        std::memcpy(call.dstate + sequence * K * V, grad_state, sizeof grad_state);
    }

    // z, the gradient of what was asked to be written.
    void solve(const Call &call, const bf16 *inverse) {
        chunk.template gather<V>(call.grad_o + chunk.first * V, call.H * V, chunk.num_tokens, grad_o);
        fill<C, V>(grad_o, [&](int i, int j) { return _mm512_mul_ps(load(grad_o + i * V + j), all(call.scale)); });
        pack<C, V>(grad_o, packed_grad_o);
        chunk.set_scores(1.f);
        pack<C, C>(chunk.scores, turned);
        transpose32<C / 2, C>(turned, left);
        product<C, V, C>(left, packed_grad_o, sums);
        scale_rows<C, K>(chunk.k, chunk.to_end, left);
        pack<K, V>(grad_state_low, packed);
        product<C, V, K>(left, packed, sums, true);
        narrow<C, V>(sums, left);
        pack<C, V>(left, packed);
        pack<C, C>(inverse, turned);
        transpose32<C / 2, C>(turned, left);
        product<C, V, C>(left, packed, sums);
        narrow<C, V>(sums, z);
        pack<C, V>(z, packed_z);
    }

    // dq, dk_reader (per unit of beta, with the other sign), dk_memory, and grad_scores and grad_a on the way.
    void key_gradients(const bf16 *state, const bf16 *x) {
        const auto scaled_product = [&](const bf16 *rows, const float *factor, float *y) {
            product<C, K, V>(rows, packed_state, y);
            scale_rows<C, K>(y, factor, y);
        };
        const auto pair_gradients = [&](const bf16 *rows, bf16 *y) {
            product<C, C, V>(rows, packed_x, sums);
            fill<C, C>(y, [&](int i, int j) {
                return _mm512_mul_ps(load(sums + i * C + j), load(chunk.decay + i * C + j));
            });
        };
        pack_transpose<C, V>(x, packed_x);
        pack_transpose<K, V>(state, packed_state);
        pack<C, K>(chunk.k, packed_k);
        pair_gradients(grad_o, grad_scores);
        scaled_product(grad_o, chunk.from_start, dq);
        product<C, K, C>(grad_scores, packed_k, dq, true);
        pair_gradients(z, grad_a);
        for (int i = 0; i < C; ++i) grad_a[i * C + i] = 0;
        scaled_product(z, chunk.from_start, dk_reader);
        product<C, K, C>(grad_a, packed_k, dk_reader, true);
        pack_transpose<K, V>(grad_state_low, packed_state);
        scaled_product(x, chunk.to_end, dk_memory);
    }

    void write_gradients(const Call &call, float kept) {
        float last = chunk.from_start[C - 1] * kept;
        for (int i = 0; i < C; ++i) {
            dot_reader[i] = -dot<K>(chunk.k + i * K, dk_reader + i * K);
            dbeta[i] = dot_reader[i] + dot<V>(chunk.v + i * V, z + i * V);
            last += dot<K>(chunk.k + i * K, dk_memory + i * K);
        }
        pack<C, C>(grad_scores, turned);
        transpose32<C / 2, C>(turned, left);
        pack<C, K>(chunk.q, packed);
        product<C, K, C>(left, packed, dk_memory, true);
        fill<C, C>(left, [&](int i, int j) { return _mm512_mul_ps(load(grad_a + i * C + j), all(-chunk.beta[i])); });
        pack<C, C>(left, turned);
        transpose32<C / 2, C>(turned, left);
        product<C, K, C>(left, packed_k, dk_memory, true);

        for (int i = 0; i < C; ++i)
            dc[i] = chunk.beta[i] * dot_reader[i] + dot<K>(chunk.q + i * K, dq + i * K) -
                    dot<K>(chunk.k + i * K, dk_memory + i * K);
        dc[C - 1] += last;
        for (int i = C - 2; i >= 0; --i) dc[i] += dc[i + 1];
        chunk.template scatter<1>(dc, call.dg);
        chunk.template scatter<1>(dbeta, call.dbeta);
        narrow<C, K>(dq, left);
        chunk.template scatter<K>(left, call.dq);
        fill<C, K>(left, [&](int i, int j) {
            return _mm512_fnmadd_ps(load(dk_reader + i * K + j), all(chunk.beta[i]), load(dk_memory + i * K + j));
        });
        chunk.template scatter<K>(left, call.dk);
        scale_rows<C, V>(z, chunk.beta, left);
        chunk.template scatter<V>(left, call.dv);
    }

    void previous_state() {
        const float total = chunk.from_start[C - 1];
        fill<K, V>(grad_state, [&](int i, int j) { return _mm512_mul_ps(load(grad_state + i * V + j), all(total)); });
        scale_rows<C, K>(chunk.q, chunk.from_start, left);
        pack<C, K>(left, turned);
        transpose32<C / 2, K>(turned, left);
        product<K, V, C>(left, packed_grad_o, grad_state, true);
        scale_rows<C, K>(chunk.k, chunk.negative, left);
        pack<C, K>(left, turned);
        transpose32<C / 2, K>(turned, left);
        product<K, V, C>(left, packed_z, grad_state, true);
    }
};

template <class Work> void run_all(const Call &call, int num_threads) {
#pragma omp parallel num_threads(num_threads)
    {
        const Tiles tiles;
        const std::unique_ptr<Work> work(new Work);
#pragma omp for schedule(dynamic)
        for (int64_t sequence = 0; sequence < call.B * call.H; ++sequence) work->run(call, sequence);
    }
}

} // namespace

extern "C" {

// Whether the system lets this process use AMX.
int gated_delta_amx_permitted() {
    constexpr long request_permission = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

// Returns whether there is a kernel for these dims.
int gated_delta_amx_run(const Call *call, int key_dim, int value_dim, int backward, int num_threads) {
    if (key_dim == 64 && value_dim == 64)
        backward ? run_all<Backward<64, 64>>(*call, num_threads) : run_all<Forward<64, 64>>(*call, num_threads);
    else if (key_dim == 128 && value_dim == 128)
        backward ? run_all<Backward<128, 128>>(*call, num_threads) : run_all<Forward<128, 128>>(*call, num_threads);
    else
        return 0;
    return 1;
}
}
