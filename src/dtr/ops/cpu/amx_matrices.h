// Small matrices for kernels of one x86 processor with AMX: bfloat16 in products, float32 sums.
//
// Matrices are row by row unless they are called packed: the right-hand side of a product, [depth / 2][columns][2], as
// AMX wants it. All numbers of rows and columns are multiples of 32.

#pragma once

#include <cstdint>
#include <immintrin.h>

namespace {

using bf16 = uint16_t;

// ---- vectors of 16 -------------------------------------------------------------------------------------------------

inline __m512 load(const float *x) { return _mm512_loadu_ps(x); }

inline __m512 load(const bf16 *x) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(x));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

inline void store(float *y, __m512 x) { _mm512_storeu_ps(y, x); }

inline void store(bf16 *y, __m512 x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(y), (__m256i)_mm512_cvtneps_pbh(x));
}

inline __m512 all(float x) { return _mm512_set1_ps(x); }

// exp of numbers that are not above 88, to about one unit in the last place; NaN stays NaN.
inline __m512 exp16(__m512 x) {
    x = _mm512_max_ps(all(-200.f), x);
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, all(1.44269504f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, all(0.693145752f), x);
    r = _mm512_fnmadd_ps(n, all(1.42860677e-6f), r);
    __m512 p = all(1.f / 5040);
    constexpr float factors[] = {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1.f, 1.f};
    for (const float factor : factors) p = _mm512_fmadd_ps(p, r, all(factor));
    return _mm512_scalef_ps(p, n);
}

// y = f(i, j) for each 16 columns from j on of each of R rows.
template <int R, int W, class T, class F> inline void fill(T *y, F f) {
    for (int i = 0; i < R; ++i)
        for (int j = 0; j < W; j += 16) store(y + i * W + j, f(i, j));
}

template <int R, int W> inline void narrow(const float *x, bf16 *y) {
    fill<R, W>(y, [=](int i, int j) { return load(x + i * W + j); });
}

// y_i = factor_i x_i
template <int R, int W, class T, class U> inline void scale_rows(const T *x, const float *factor, U *y) {
    fill<R, W>(y, [=](int i, int j) { return _mm512_mul_ps(load(x + i * W + j), all(factor[i])); });
}

// x_i . y_i
template <int W, class T, class U> inline float dot(const T *x, const U *y) {
    __m512 sum = _mm512_setzero_ps();
    for (int j = 0; j < W; j += 16) sum = _mm512_fmadd_ps(load(x + j), load(y + j), sum);
    return _mm512_reduce_add_ps(sum);
}

// ---- packing -------------------------------------------------------------------------------------------------------

// [D, N] to packed.
template <int D, int N> void pack(const bf16 *x, bf16 *y) {
    alignas(64) static constexpr uint16_t low[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                     8,  40, 9,  41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i first = _mm512_load_si512(low), second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
    for (int d = 0; d < D; d += 2)
        for (int n = 0; n < N; n += 32) {
            const __m512i even = _mm512_loadu_si512(x + d * N + n), odd = _mm512_loadu_si512(x + (d + 1) * N + n);
            _mm512_storeu_si512(y + d * N + 2 * n, _mm512_permutex2var_epi16(even, first, odd));
            _mm512_storeu_si512(y + d * N + 2 * n + 32, _mm512_permutex2var_epi16(even, second, odd));
        }
}

// [R, Q] to [Q, R], of 32 bits.
template <int R, int Q> void transpose32(const void *source, void *target) {
    const uint32_t *x = static_cast<const uint32_t *>(source);
    uint32_t *y = static_cast<uint32_t *>(target);
    for (int row = 0; row < R; row += 16)
        for (int column = 0; column < Q; column += 16) {
            __m512i r[16], t[16];
            for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(x + (row + i) * Q + column);
            for (int i = 0; i < 16; i += 2) {
                t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
                t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
            }
            for (int i = 0; i < 16; i += 4) {
                r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
                r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
                r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
                r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
            }
            for (int i = 0; i < 4; ++i)
                for (int half = 0; half < 16; half += 8) {
                    t[half + i] = _mm512_shuffle_i32x4(r[half + i], r[half + i + 4], 0x88);
                    t[half + i + 4] = _mm512_shuffle_i32x4(r[half + i], r[half + i + 4], 0xdd);
                }
            for (int i = 0; i < 8; ++i) {
                _mm512_storeu_si512(y + (column + i) * R + row, _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88));
                _mm512_storeu_si512(y + (column + i + 8) * R + row, _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd));
            }
        }
}

// [N, D], whose transpose is the right-hand side, to packed.
template <int N, int D> void pack_transpose(const bf16 *x, bf16 *y) { transpose32<N, D / 2>(x, y); }

// ---- products ------------------------------------------------------------------------------------------------------

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes_per_row[16] = {};
    uint8_t rows[16] = {};
};

// Tiles of 16 x 64 bytes while it lives; then what other libraries had set.
class Tiles {
  public:
    Tiles() {
        _tile_storeconfig(&before_);
        TileConfig ours;
        for (int i = 0; i < 8; ++i) ours.bytes_per_row[i] = 64, ours.rows[i] = 16;
        _tile_loadconfig(&ours);
    }
    ~Tiles() {
        if (before_.palette) _tile_loadconfig(&before_);
        else _tile_release();
    }

  private:
    TileConfig before_;
};

// y [M, N] = x [M, D] times packed [D, N], added to what is in y if `add`.
template <int M, int N, int D> void product(const bf16 *x, const bf16 *packed, float *y, bool add = false) {
    // GCC's tile loads do not say that they read memory.
    asm volatile("" ::: "memory");
    for (int i = 0; i < M; i += 32)
        for (int j = 0; j < N; j += 32) {
            float *upper = y + i * N + j, *lower = upper + 16 * N;
            if (add) {
                _tile_loadd(0, upper, 4 * N);
                _tile_loadd(1, upper + 16, 4 * N);
                _tile_loadd(2, lower, 4 * N);
                _tile_loadd(3, lower + 16, 4 * N);
            } else {
                _tile_zero(0);
                _tile_zero(1);
                _tile_zero(2);
                _tile_zero(3);
            }
            for (int d = 0; d < D; d += 32) {
                _tile_loadd(4, x + i * D + d, 2 * D);
                _tile_loadd(5, x + (i + 16) * D + d, 2 * D);
                _tile_loadd(6, packed + d * N + 2 * j, 4 * N);
                _tile_loadd(7, packed + d * N + 2 * j + 32, 4 * N);
                _tile_dpbf16ps(0, 4, 6);
                _tile_dpbf16ps(1, 4, 7);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
            _tile_stored(0, upper, 4 * N);
            _tile_stored(1, upper + 16, 4 * N);
            _tile_stored(2, lower, 4 * N);
            _tile_stored(3, lower + 16, 4 * N);
        }
    asm volatile("" ::: "memory");
}

// Inverse of I + (the part of `a` below the diagonal), row by row; the inverse's part above the diagonal is zero.
template <int C> void unit_lower_inverse(const float *a, float *inverse) {
    for (int i = 0; i < C; ++i) {
        for (int column = 0; column < C; column += 16) {
            __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
            // Rows have nothing right of their diagonal.
            for (int j = column; j < i; j += 2) {
                even = _mm512_fnmadd_ps(all(a[i * C + j]), load(inverse + j * C + column), even);
                if (j + 1 < i) odd = _mm512_fnmadd_ps(all(a[i * C + j + 1]), load(inverse + (j + 1) * C + column), odd);
            }
            store(inverse + i * C + column, _mm512_add_ps(even, odd));
        }
        inverse[i * C + i] = 1.f;
    }
}

} // namespace
