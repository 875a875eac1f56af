// Sixteen floats on every machine, and the products of small integers: the whole vocabulary of the kernels.
//
// Included by kernels.cpp once per variant. Every operation rounds once and in the same place in all variants, and
// `sum` adds in one order, so the variants agree bit for bit. Compile with -ffp-contract=off.
#pragma once
#include <cmath>
#include <cstring>

#include "layout.h"

#if defined(HEADRACE_AVX512) || defined(HEADRACE_AVX2)
#include <immintrin.h>
#endif

namespace headrace {
namespace {

#define INLINE static inline __attribute__((always_inline))

INLINE float of_half(uint16_t half) {  // exact, subnormal numbers included
    uint32_t sign = uint32_t(half & 0x8000) << 16, rest = half & 0x7fff;
    float value;
    uint32_t bits = (rest << 13) + ((rest >= 0x7c00 ? 255 - 31 : 127 - 15) << 23);
    std::memcpy(&value, &bits, 4);
    if (rest < 0x400) value = float(rest) * 0x1p-24f;
    return sign ? -value : value;
}

#if defined(HEADRACE_AVX512)

struct Vec { __m512 v; };
INLINE Vec zero() { return {_mm512_setzero_ps()}; }
INLINE Vec all(float x) { return {_mm512_set1_ps(x)}; }
INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
INLINE void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
INLINE Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
INLINE Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
INLINE Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
INLINE Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
INLINE Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
INLINE Vec abs(Vec a) { return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(a.v), _mm512_set1_epi32(0x7fffffff)))}; }
INLINE Vec where_above(Vec a, Vec limit, Vec value) { return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a.v, limit.v, _CMP_GT_OQ), value.v)}; }
INLINE uint32_t at_least(Vec a, Vec limit) { return _mm512_cmp_ps_mask(a.v, limit.v, _CMP_GE_OQ); }  // a bit per lane
INLINE Vec times_two_to(Vec a, Vec n) { return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a.v), _mm512_slli_epi32(_mm512_cvtps_epi32(n.v), 23)))}; }
INLINE Vec load_half(const uint8_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
INLINE Vec load_bf16(const uint8_t* p) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16))}; }
INLINE Vec load_int8(const uint8_t* p) { return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)))}; }
INLINE void store_rounded(int32_t* p, Vec a) { _mm512_storeu_si512(p, _mm512_cvtps_epi32(a.v)); }
INLINE int32_t store_bytes(int8_t* p, Vec a) {  // rounded; returns their sum
    __m512i whole = _mm512_cvtps_epi32(a.v);
    _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(whole));
    return _mm512_reduce_add_epi32(whole);
}
INLINE __m256 eight(Vec a) {
    return _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a.v), 1)));
}
INLINE __m256 eight_max(Vec a) {
    return _mm256_max_ps(_mm512_castps512_ps256(a.v), _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a.v), 1)));
}

#elif defined(HEADRACE_AVX2)

struct Vec { __m256 a, b; };
INLINE Vec zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
INLINE Vec all(float x) { __m256 v = _mm256_set1_ps(x); return {v, v}; }
INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
INLINE void store(float* p, Vec a) { _mm256_storeu_ps(p, a.a); _mm256_storeu_ps(p + 8, a.b); }
INLINE Vec operator+(Vec x, Vec y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
INLINE Vec operator-(Vec x, Vec y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
INLINE Vec operator*(Vec x, Vec y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
INLINE Vec operator/(Vec x, Vec y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
INLINE Vec fma(Vec x, Vec y, Vec z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
INLINE Vec max(Vec x, Vec y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
INLINE Vec min(Vec x, Vec y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
INLINE Vec abs(Vec x) { __m256 m = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff)); return {_mm256_and_ps(x.a, m), _mm256_and_ps(x.b, m)}; }
INLINE Vec where_above(Vec x, Vec limit, Vec value) {
    return {_mm256_and_ps(_mm256_cmp_ps(x.a, limit.a, _CMP_GT_OQ), value.a), _mm256_and_ps(_mm256_cmp_ps(x.b, limit.b, _CMP_GT_OQ), value.b)};
}
INLINE uint32_t at_least(Vec x, Vec limit) {
    return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(x.a, limit.a, _CMP_GE_OQ)) | _mm256_movemask_ps(_mm256_cmp_ps(x.b, limit.b, _CMP_GE_OQ)) << 8);
}
INLINE __m256 two_to(__m256 x, __m256 n) { return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23))); }
INLINE Vec times_two_to(Vec x, Vec n) { return {two_to(x.a, n.a), two_to(x.b, n.b)}; }
INLINE Vec load_half(const uint8_t* p) { return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 16)))}; }
INLINE __m256 eight_bf16(const uint8_t* p) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16)); }
INLINE Vec load_bf16(const uint8_t* p) { return {eight_bf16(p), eight_bf16(p + 16)}; }
INLINE __m256 eight_int8(const uint8_t* p) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p))); }
INLINE Vec load_int8(const uint8_t* p) { return {eight_int8(p), eight_int8(p + 8)}; }
INLINE void store_rounded(int32_t* p, Vec x) { _mm256_storeu_si256((__m256i*)p, _mm256_cvtps_epi32(x.a)); _mm256_storeu_si256((__m256i*)(p + 8), _mm256_cvtps_epi32(x.b)); }
INLINE __m256 eight(Vec x) { return _mm256_add_ps(x.a, x.b); }
INLINE __m256 eight_max(Vec x) { return _mm256_max_ps(x.a, x.b); }

#else

struct Vec { float v[LANES]; };
#define EACH for (int i = 0; i < LANES; i++)
INLINE Vec zero() { return {}; }
INLINE Vec all(float x) { Vec r; EACH r.v[i] = x; return r; }
INLINE Vec load(const float* p) { Vec r; std::memcpy(r.v, p, sizeof r.v); return r; }
INLINE void store(float* p, Vec a) { std::memcpy(p, a.v, sizeof a.v); }
INLINE Vec operator+(Vec a, Vec b) { EACH a.v[i] += b.v[i]; return a; }
INLINE Vec operator-(Vec a, Vec b) { EACH a.v[i] -= b.v[i]; return a; }
INLINE Vec operator*(Vec a, Vec b) { EACH a.v[i] *= b.v[i]; return a; }
INLINE Vec operator/(Vec a, Vec b) { EACH a.v[i] /= b.v[i]; return a; }
INLINE Vec fma(Vec a, Vec b, Vec c) { EACH a.v[i] = std::fma(a.v[i], b.v[i], c.v[i]); return a; }
INLINE Vec max(Vec a, Vec b) { EACH a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i]; return a; }
INLINE Vec min(Vec a, Vec b) { EACH a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i]; return a; }
INLINE Vec abs(Vec a) { EACH a.v[i] = std::fabs(a.v[i]); return a; }
INLINE Vec where_above(Vec a, Vec limit, Vec value) { EACH value.v[i] = a.v[i] > limit.v[i] ? value.v[i] : 0.0f; return value; }
INLINE uint32_t at_least(Vec a, Vec limit) { uint32_t bits = 0; EACH bits |= uint32_t(a.v[i] >= limit.v[i]) << i; return bits; }
INLINE Vec times_two_to(Vec a, Vec n) {
    EACH {
        uint32_t bits;
        std::memcpy(&bits, &a.v[i], 4);
        bits += uint32_t(int32_t(n.v[i])) << 23;
        std::memcpy(&a.v[i], &bits, 4);
    }
    return a;
}
INLINE uint16_t word_at(const uint8_t* p, int i) { uint16_t w; std::memcpy(&w, p + 2 * i, 2); return w; }
INLINE Vec load_half(const uint8_t* p) { Vec r; EACH r.v[i] = of_half(word_at(p, i)); return r; }
INLINE Vec load_bf16(const uint8_t* p) { Vec r; EACH { uint32_t bits = uint32_t(word_at(p, i)) << 16; std::memcpy(&r.v[i], &bits, 4); } return r; }
INLINE Vec load_int8(const uint8_t* p) { Vec r; EACH r.v[i] = float(int8_t(p[i])); return r; }
INLINE void store_rounded(int32_t* p, Vec a) { EACH p[i] = int32_t((a.v[i] + 0x1.8p23f) - 0x1.8p23f); }

#endif

#if !defined(HEADRACE_AVX512)
INLINE int32_t store_bytes(int8_t* p, Vec a) {
    alignas(64) int32_t whole[LANES];
    store_rounded(whole, a);
    int32_t total = 0;
    for (int i = 0; i < LANES; i++) {
        p[i] = int8_t(whole[i]);
        total += whole[i];
    }
    return total;
}
#endif

// The same tree everywhere: sixteen to eight, to four, to two, to one.
#if defined(HEADRACE_AVX512) || defined(HEADRACE_AVX2)
INLINE float sum(Vec x) {
    __m256 e = eight(x);
    __m128 f = _mm_add_ps(_mm256_castps256_ps128(e), _mm256_extractf128_ps(e, 1));
    f = _mm_add_ps(f, _mm_movehl_ps(f, f));
    return _mm_cvtss_f32(_mm_add_ss(f, _mm_movehdup_ps(f)));
}
INLINE float largest(Vec x) {
    __m256 e = eight_max(x);
    __m128 f = _mm_max_ps(_mm256_castps256_ps128(e), _mm256_extractf128_ps(e, 1));
    f = _mm_max_ps(f, _mm_movehl_ps(f, f));
    return _mm_cvtss_f32(_mm_max_ss(f, _mm_movehdup_ps(f)));
}
#else
INLINE float sum(Vec a) {
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) a.v[i] += a.v[i + half];
    return a.v[0];
}
INLINE float largest(Vec a) {
    float most = a.v[0];
    EACH most = most > a.v[i] ? most : a.v[i];
    return most;
}
#endif

// exp for arguments up to 87, and exactly 0 below -87; within 2 units in the last place. exp(0) is exactly 1.
INLINE Vec exp(Vec x) {
    const Vec lowest = all(-87.0f), round = all(0x1.8p23f);
    Vec clamped = min(max(x, lowest), all(87.0f));
    Vec n = fma(clamped, all(1.44269504088896341f), round) - round;
    Vec r = fma(n, all(-0.693359375f), clamped);
    r = fma(n, all(2.12194440e-4f), r);
    Vec p = fma(all(1.9875691500e-4f), r, all(1.3981999507e-3f));
    p = fma(p, r, all(8.3334519073e-3f));
    p = fma(p, r, all(4.1665795894e-2f));
    p = fma(p, r, all(1.6666665459e-1f));
    p = fma(p, r, all(5.0000001201e-1f));
    p = fma(p, r * r, r + all(1.0f));
    return where_above(x, lowest, times_two_to(p, n));
}

// Products of bf16, two at a time: sum + odd * odd + even * even, with one rounding for each of the two additions. Where
// the machine has no such instruction, both halves are multiplied as floats that bf16 can hold.

#if defined(__AVX512BF16__)

using Bf16 = uint16_t;
struct Pairs { __m512bh v; };
INLINE Pairs load_pairs(const uint8_t* p) { return {(__m512bh)_mm512_loadu_si512(p)}; }
INLINE Pairs all_pairs(const Bf16* p) {
    int32_t both;
    std::memcpy(&both, p, 4);
    return {(__m512bh)_mm512_set1_epi32(both)};
}
INLINE Vec dot(Vec sum, Pairs x, Pairs y) { return {_mm512_dpbf16_ps(sum.v, x.v, y.v)}; }
INLINE void narrow(const float* from, int64_t count, float* to) {  // may be the same memory
    for (int64_t i = 0; i < count; i += LANES)
        _mm256_storeu_si256((__m256i*)((uint8_t*)to + 2 * i), (__m256i)_mm512_cvtneps_pbh(load(from + i).v));
}

#else

using Bf16 = float;
struct Pairs { Vec even, odd; };
#if defined(HEADRACE_AVX512)
INLINE Pairs load_pairs(const uint8_t* p) {
    __m512i both = _mm512_loadu_si512(p);
    return {{_mm512_castsi512_ps(_mm512_slli_epi32(both, 16))}, {_mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(int32_t(0xffff0000))))}};
}
#elif defined(HEADRACE_AVX2)
INLINE __m256 evens(const uint8_t* p) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256((const __m256i*)p), 16)); }
INLINE __m256 odds(const uint8_t* p) { return _mm256_castsi256_ps(_mm256_and_si256(_mm256_loadu_si256((const __m256i*)p), _mm256_set1_epi32(int32_t(0xffff0000)))); }
INLINE Pairs load_pairs(const uint8_t* p) { return {{evens(p), evens(p + 32)}, {odds(p), odds(p + 32)}}; }
#else
INLINE Pairs load_pairs(const uint8_t* p) {
    Pairs r;
    EACH {
        uint32_t even = uint32_t(word_at(p, 2 * i)) << 16, odd = uint32_t(word_at(p, 2 * i + 1)) << 16;
        std::memcpy(&r.even.v[i], &even, 4);
        std::memcpy(&r.odd.v[i], &odd, 4);
    }
    return r;
}
#endif
INLINE Pairs all_pairs(const Bf16* p) { return {all(p[0]), all(p[1])}; }
INLINE Vec dot(Vec sum, const Pairs& x, const Pairs& y) { return fma(x.even, y.even, fma(x.odd, y.odd, sum)); }
INLINE void narrow(const float* from, int64_t count, float* to) {
    for (int64_t i = 0; i < count; i++) {
        uint32_t bits;
        std::memcpy(&bits, from + i, 4);
        bits = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000;
        std::memcpy(to + i, &bits, 4);
    }
}

#endif

// Products of unsigned weights and signed inputs, four at a time, for sixteen outputs: exact in 32 bits.
//
// AVX2 has no such instruction that cannot overflow 16 bits for Q8, so there weights are spread to 16 bits and inputs
// come in `pairs`. For Q4 eight products of at most 15 * 127, two by two, fit: 16 * 15 * 127 = 30,480.

#if defined(HEADRACE_AVX512)

struct Sums { __m512i v; };
struct Quad { __m512i v; };
INLINE Sums start(int32_t value) { return {_mm512_set1_epi32(value)}; }
INLINE Quad q8_quad(const uint8_t* quad, int h) { return {_mm512_loadu_si512(quad + 64 * h)}; }
INLINE Quad q4_quad(const uint8_t* quad, int h) {
    __m512i both = _mm512_loadu_si512(quad);
    return {_mm512_and_si512(h ? _mm512_srli_epi16(both, 4) : both, _mm512_set1_epi8(15))};
}
INLINE void multiply(Sums& sums, Quad weights, const int8_t* bytes) {
    int32_t four;
    std::memcpy(&four, bytes, 4);
    sums.v = _mm512_dpbusd_epi32(sums.v, weights.v, _mm512_set1_epi32(four));
}
struct Q8Dot {
    using W = Quad; using S = Sums;
    static constexpr int WANTED = BYTES;
    INLINE S begin(int32_t sum) { return start(-128 * sum); }
    INLINE W weights(const uint8_t* quad, int h) { return q8_quad(quad, h); }
    INLINE void dot(S& s, W w, const Inputs& in, int64_t at) { multiply(s, w, in.bytes + at); }
    INLINE Vec end(S s) { return {_mm512_cvtepi32_ps(s.v)}; }
};
struct Q4Dot {
    using W = Quad; using S = Sums;
    INLINE S begin(int32_t) { return start(0); }
    INLINE W weights(const uint8_t* quad, int h) { return q4_quad(quad, h); }
    INLINE void dot(S& s, W w, const Inputs& in, int64_t at) { multiply(s, w, in.bytes + at); }
    INLINE Vec end(S s) { return {_mm512_cvtepi32_ps(s.v)}; }
};
constexpr int INT_ROWS = 6, INT_WIDE = 2, FLOAT_ROWS = 8, FLOAT_CHAINS = 24;

#elif defined(HEADRACE_AVX2)

// Keeps a sum in its register: without this gcc 12 does all products of a group first and spills every one of them.
#define HELD(x) asm("" : "+x"(x))
INLINE __m256i eight_ints(const void* p) { int32_t v; std::memcpy(&v, p, 4); return _mm256_set1_epi32(v); }
INLINE __m256i bytes_at(const uint8_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
struct Q8Dot {
    struct W { __m256i even_a, odd_a, even_b, odd_b; };
    struct S { __m256i a, b; };
    static constexpr int WANTED = PAIRS;
    INLINE S begin(int32_t sum) { __m256i v = _mm256_set1_epi32(-128 * sum); return {v, v}; }
    INLINE W weights(const uint8_t* quad, int h) {
        __m256i a = bytes_at(quad + 64 * h), b = bytes_at(quad + 64 * h + 32), low = _mm256_set1_epi16(255);
        return {_mm256_and_si256(a, low), _mm256_srli_epi16(a, 8), _mm256_and_si256(b, low), _mm256_srli_epi16(b, 8)};
    }
    INLINE void dot(S& s, const W& w, const Inputs& in, int64_t at) {
        __m256i even = eight_ints(in.pairs + at), odd = eight_ints(in.pairs + at + 2);
        s.a = _mm256_add_epi32(s.a, _mm256_add_epi32(_mm256_madd_epi16(w.even_a, even), _mm256_madd_epi16(w.odd_a, odd)));
        s.b = _mm256_add_epi32(s.b, _mm256_add_epi32(_mm256_madd_epi16(w.even_b, even), _mm256_madd_epi16(w.odd_b, odd)));
        HELD(s.a);
        HELD(s.b);
    }
    INLINE Vec end(S s) { return {_mm256_cvtepi32_ps(s.a), _mm256_cvtepi32_ps(s.b)}; }
};
struct Q4Dot {
    struct W { __m256i a, b; };
    struct S { __m256i a, b; };  // sixteen sums of 16 bits each
    INLINE S begin(int32_t) { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
    INLINE W weights(const uint8_t* quad, int h) {
        __m256i a = bytes_at(quad), b = bytes_at(quad + 32), low = _mm256_set1_epi8(15);
        if (h) { a = _mm256_srli_epi16(a, 4); b = _mm256_srli_epi16(b, 4); }
        return {_mm256_and_si256(a, low), _mm256_and_si256(b, low)};
    }
    INLINE void dot(S& s, const W& w, const Inputs& in, int64_t at) {
        __m256i four = eight_ints(in.bytes + at);
        s.a = _mm256_add_epi16(s.a, _mm256_maddubs_epi16(w.a, four));
        s.b = _mm256_add_epi16(s.b, _mm256_maddubs_epi16(w.b, four));
        HELD(s.a);
        HELD(s.b);
    }
    INLINE Vec end(S s) {
        __m256i ones = _mm256_set1_epi16(1);
        return {_mm256_cvtepi32_ps(_mm256_madd_epi16(s.a, ones)), _mm256_cvtepi32_ps(_mm256_madd_epi16(s.b, ones))};
    }
};
constexpr int INT_ROWS = 4, INT_WIDE = 1, FLOAT_ROWS = 6, FLOAT_CHAINS = 4;

#else

struct Q8Dot {
    struct W { uint8_t v[4 * LANES]; };
    struct S { int32_t v[LANES]; };
    static constexpr int WANTED = BYTES;
    INLINE S begin(int32_t sum) { S s; EACH s.v[i] = -128 * sum; return s; }
    INLINE W weights(const uint8_t* quad, int h) { W w; std::memcpy(w.v, quad + 64 * h, sizeof w.v); return w; }
    INLINE void dot(S& s, const W& w, const Inputs& in, int64_t at) {
        EACH for (int j = 0; j < 4; j++) s.v[i] += int32_t(w.v[4 * i + j]) * in.bytes[at + j];
    }
    INLINE Vec end(S s) { Vec r; EACH r.v[i] = float(s.v[i]); return r; }
};
struct Q4Dot {
    using W = Q8Dot::W; using S = Q8Dot::S;
    INLINE S begin(int32_t) { return {}; }
    INLINE W weights(const uint8_t* quad, int h) {
        W w;
        for (int i = 0; i < 4 * LANES; i++) w.v[i] = h ? quad[i] >> 4 : quad[i] & 15;
        return w;
    }
    INLINE void dot(S& s, const W& w, const Inputs& in, int64_t at) { Q8Dot::dot(s, w, in, at); }
    INLINE Vec end(S s) { return Q8Dot::end(s); }
};
constexpr int INT_ROWS = 2, INT_WIDE = 1, FLOAT_ROWS = 2, FLOAT_CHAINS = 2;

#endif

}  // namespace
}  // namespace headrace
