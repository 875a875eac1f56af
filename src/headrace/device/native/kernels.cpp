// The kernels, compiled once per variant with HEADRACE_VARIANT and the flags of its machine (setup.py).
//
// A row's arithmetic is fixed: tiles of several rows and outputs only keep weights in registers while several rows use
// them. So a row has the same bits alone, in a batch, in a chunk of a prompt.
#include <type_traits>

#include "draw.h"
#include "vector.h"

namespace headrace {
namespace {

constexpr int64_t AHEAD = 2048;  // bytes of a panel that are fetched ahead: the hardware does not go beyond a page by itself
constexpr int CHAIN = 64;  // inputs added up in one chain of FP32 and BF16 products: shorter chains err less

INLINE void fetch(const uint8_t* at, int64_t bytes) {
    for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(at + line);
}

// ---- linear layers: some rows times one panel -----------------------------------------------------------------------

struct Q8Panel : Q8Dot {
    static constexpr int64_t HEAD = PANEL * 2, QUAD = PANEL * 4;
    INLINE Vec with_minimum(Vec sum, const uint8_t*, int, float) { return sum; }
};
struct Q4Panel : Q4Dot {
    static constexpr int64_t HEAD = PANEL * 4, QUAD = PANEL * 2;
    INLINE Vec with_minimum(Vec sum, const uint8_t* group, int h, float total) {
        return fma(load_half(group + PANEL * 2 + h * 2 * LANES), all(total), sum);
    }
};

// R rows times H * 16 outputs, from output 16 * half of the panel on. Sums of a group are exact; groups are added in order.
template <class P, int R, int H>
INLINE void integer_tile(const uint8_t* panel, int64_t groups, const Inputs& in, int64_t row, int half, float* out) {
    Vec total[R][H];
    for (int r = 0; r < R; r++)
        for (int h = 0; h < H; h++) total[r][h] = zero();
    const int64_t per_row = in.width / GROUP;
    for (int64_t g = 0; g < groups; g++, panel += P::HEAD + P::QUAD * QUADS) {
        typename P::S sums[R][H];
        for (int r = 0; r < R; r++)
            for (int h = 0; h < H; h++) sums[r][h] = P::begin(in.sums[(row + r) * per_row + g]);
        const uint8_t* quads = panel + P::HEAD;
        fetch(panel + AHEAD, P::HEAD + P::QUAD * QUADS);
#pragma GCC unroll 8
        for (int quad = 0; quad < QUADS; quad++) {
            typename P::W weights[H];
            for (int h = 0; h < H; h++) weights[h] = P::weights(quads + quad * P::QUAD, half + h);
            for (int r = 0; r < R; r++)
                for (int h = 0; h < H; h++) P::dot(sums[r][h], weights[h], in, (row + r) * in.width + g * GROUP + quad * 4);
        }
        for (int h = 0; h < H; h++) {
            Vec scale = load_half(panel + (half + h) * 2 * LANES);
            for (int r = 0; r < R; r++) {
                const int64_t at = (row + r) * per_row + g;
                total[r][h] = fma(P::end(sums[r][h]), scale * all(in.scales[at]), total[r][h]);
                total[r][h] = P::with_minimum(total[r][h], panel, half + h, in.totals[at]);
            }
        }
    }
    for (int r = 0; r < R; r++)
        for (int h = 0; h < H; h++) store(out + r * PANEL + (half + h) * LANES, total[r][h]);
}

template <class P, int R>
void integer_rows(const uint8_t* panel, int64_t groups, const Inputs& in, int64_t row, float* out) {
    if constexpr (R <= 2 || INT_WIDE == 2) {
        integer_tile<P, R, 2>(panel, groups, in, row, 0, out);
    } else {
        integer_tile<P, R, 1>(panel, groups, in, row, 0, out);
        integer_tile<P, R, 1>(panel, groups, in, row, 1, out);
    }
}

// How sixteen weights, keys or values are read, and what they are multiplied with: one number, or two side by side.
struct Single {
    using X = float;
    using W = Vec;
    static constexpr int STEP = 1;
    INLINE Vec spread(const float* x) { return all(*x); }
    INLINE Vec dot(Vec sum, Vec x, Vec weights) { return fma(x, weights, sum); }
};
struct Plain : Single {
    static constexpr int64_t SIZE = 4;
    INLINE Vec at(const uint8_t* p) { return load((const float*)p); }
};
struct Brain : Single {
    static constexpr int64_t SIZE = 2;
    INLINE Vec at(const uint8_t* p) { return load_bf16(p); }
};
struct Small : Single {
    static constexpr int64_t SIZE = 1;
    INLINE Vec at(const uint8_t* p) { return load_int8(p); }
};
struct Paired {
    using X = Bf16;
    using W = Pairs;
    static constexpr int STEP = 2;
    static constexpr int64_t SIZE = 4;  // of a pair
    INLINE Pairs at(const uint8_t* p) { return load_pairs(p); }
    INLINE Pairs spread(const Bf16* x) { return all_pairs(x); }
    INLINE Vec dot(Vec sum, const Pairs& x, const Pairs& weights) { return headrace::dot(sum, x, weights); }
};

// sums[r][c] += a[r][0] * b[c][0] + a[r][1] * b[c][1] + ..., in this order; the vectors of a b[c] lie `stride` elements
// apart. R * C chains at once hide the time that one multiplication takes; what lies at `ahead` is fetched meanwhile.
template <class L, int R, int C>
INLINE void chain(Vec (&sums)[R][C], const typename L::X* const (&a)[R], int64_t begin, int64_t count, const uint8_t* const (&b)[C],
                  int64_t stride, const uint8_t* const (&ahead)[C]) {
#pragma GCC unroll 4
    for (int64_t k = 0; k * L::STEP < count; k++) {
        typename L::W row[C];
        for (int c = 0; c < C; c++) {
            row[c] = L::at(b[c] + k * stride * L::SIZE);
            __builtin_prefetch(ahead[c] + k * stride * L::SIZE);
        }
        for (int r = 0; r < R; r++) {
            const auto x = L::spread(a[r] + begin + k * L::STEP);
            for (int c = 0; c < C; c++) sums[r][c] = L::dot(sums[r][c], x, row[c]);
        }
    }
}

template <class L, int R, int C>
INLINE void float_tile(const uint8_t* panel, int64_t inputs, const float* const (&a)[R], int half, float* out) {
    Vec total[R][C];
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) total[r][c] = zero();
    for (int64_t k = 0; k < inputs; k += CHAIN) {
        Vec sums[R][C];
        const uint8_t *b[C], *ahead[C];
        for (int c = 0; c < C; c++) {
            b[c] = panel + (k * PANEL + (half + c) * LANES) * L::SIZE;
            ahead[c] = b[c] + AHEAD;
            for (int r = 0; r < R; r++) sums[r][c] = zero();
        }
        chain<L, R, C>(sums, a, k, inputs - k < CHAIN ? inputs - k : CHAIN, b, PANEL, ahead);
        for (int r = 0; r < R; r++)
            for (int c = 0; c < C; c++) total[r][c] = total[r][c] + sums[r][c];
    }
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) store(out + r * PANEL + (half + c) * LANES, total[r][c]);
}

template <class L, int R>
void float_rows(const uint8_t* panel, int64_t inputs, const Inputs& in, int64_t row, float* out) {
    const float* a[R];
    for (int r = 0; r < R; r++) a[r] = in.plain + (row + r) * in.width;
    if constexpr (2 * R <= FLOAT_CHAINS / 2) {
        float_tile<L, R, 2>(panel, inputs, a, 0, out);
    } else {
        float_tile<L, R, 1>(panel, inputs, a, 0, out);
        float_tile<L, R, 1>(panel, inputs, a, 1, out);
    }
}

// Calls f with a compile-time number of rows, at most MOST, until all are done.
template <int MOST, class F>
INLINE void in_tiles(int64_t first, int64_t last, F f) {
    for (; first + MOST <= last; first += MOST) f(std::integral_constant<int, MOST>(), first);
    if constexpr (MOST > 1)
        if (first < last) in_tiles<MOST - 1>(first, last, f);
}

void panel(const Matrix& m, int64_t index, const Inputs& in, int64_t first, int64_t last, float* out) {
    const uint8_t* at = m.panel(index);
    const int64_t groups = ceil_div(m.inputs, GROUP);
    auto place = [&](int64_t row) { return out + (row - first) * PANEL; };
    switch (m.format) {
        case Q4: in_tiles<INT_ROWS>(first, last, [&](auto r, int64_t row) { integer_rows<Q4Panel, r>(at, groups, in, row, place(row)); }); break;
        case Q8: in_tiles<INT_ROWS>(first, last, [&](auto r, int64_t row) { integer_rows<Q8Panel, r>(at, groups, in, row, place(row)); }); break;
        case BF16: in_tiles<FLOAT_ROWS>(first, last, [&](auto r, int64_t row) { float_rows<Brain, r>(at, m.inputs, in, row, place(row)); }); break;
        default: in_tiles<FLOAT_ROWS>(first, last, [&](auto r, int64_t row) { float_rows<Plain, r>(at, m.inputs, in, row, place(row)); });
    }
    if (!m.bias) return;
    const int64_t column = index * PANEL, count = m.outputs - column < PANEL ? m.outputs - column : PANEL;
    for (int64_t row = first; row < last; row++)
        for (int64_t j = 0; j < count; j++) place(row)[j] += m.bias[column + j];
}

// One output's weights times `scale`: a row of the embedding.
void column(const Matrix& m, int64_t output, float scale, float* out) {
    const uint8_t* at = m.panel(output / PANEL);
    const int64_t j = output % PANEL;
    auto half = [](const uint8_t* p) { uint16_t w; std::memcpy(&w, p, 2); return of_half(w); };
    for (int64_t i = 0; i < m.inputs; i++) {
        const int64_t g = i / GROUP, quad = i % GROUP / 4;
        float weight;
        if (m.format == FP32) {
            std::memcpy(&weight, at + (i * PANEL + j) * 4, 4);
        } else if (m.format == BF16) {
            uint32_t bits = 0;
            std::memcpy((uint8_t*)&bits + 2, at + (i * PANEL + j) * 2, 2);
            std::memcpy(&weight, &bits, 4);
        } else if (m.format == Q8) {
            const uint8_t* group = at + g * (PANEL * 2 + PANEL * GROUP);
            weight = half(group + j * 2) * float(int(group[PANEL * 2 + quad * PANEL * 4 + j * 4 + i % 4]) - 128);
        } else {
            const uint8_t* group = at + g * (PANEL * 4 + PANEL * GROUP / 2);
            const uint8_t both = group[PANEL * 4 + quad * PANEL * 2 + j % LANES * 4 + i % 4];
            weight = half(group + j * 2) * float(j < LANES ? both & 15 : both >> 4) + half(group + PANEL * 2 + j * 2);
        }
        out[i] = weight * scale;
    }
}

// ---- rows -----------------------------------------------------------------------------------------------------------

// x in groups of 32, from `column` on, into row `row` of the inputs, in the forms that are wanted.
void fill(const float* x, int64_t count, int wanted, const Inputs& in, int64_t row, int64_t column) {
    const int64_t base = row * in.width + column, first_group = row * (in.width / GROUP) + column / GROUP;
    if (wanted & PLAIN) std::memcpy(in.plain + base, x, count * sizeof(float));
    if (!(wanted & (BYTES | PAIRS))) return;
    for (int64_t g = 0; g * GROUP < count; g++) {
        float rest[GROUP] = {};
        const float* from = x + g * GROUP;
        if (count - g * GROUP < GROUP) from = (const float*)std::memcpy(rest, from, (count - g * GROUP) * sizeof(float));
        const Vec a = load(from), b = load(from + LANES);
        const float most = largest(max(abs(a), abs(b)));
        const Vec inverse = all(most > 0 ? 127.0f / most : 0.0f);
        int8_t* bytes = in.bytes + base + g * GROUP;
        const int32_t total = store_bytes(bytes, a * inverse) + store_bytes(bytes + LANES, b * inverse);
        if (wanted & PAIRS) {
            int16_t* pairs = in.pairs + base + g * GROUP;
            for (int i = 0; i < GROUP; i += 4) {
                pairs[i] = bytes[i];
                pairs[i + 1] = bytes[i + 2];
                pairs[i + 2] = bytes[i + 1];
                pairs[i + 3] = bytes[i + 3];
            }
        }
        in.scales[first_group + g] = most / 127.0f;
        in.sums[first_group + g] = total;
        in.totals[first_group + g] = most / 127.0f * float(total);
    }
}

// x / sqrt(mean(x^2) + eps) * weight. Lanes that do not fill a vector count as zeros.
void norm(const float* x, const float* weight, int64_t count, float eps, float* out) {
    Vec squares = zero();
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) squares = fma(load(x + i), load(x + i), squares);
    float rest[LANES] = {};
    std::memcpy(rest, x + i, (count - i) * sizeof(float));
    squares = fma(load(rest), load(rest), squares);
    const float scale = 1.0f / std::sqrt(sum(squares) / float(count) + eps);
    for (i = 0; i + LANES <= count; i += LANES) store(out + i, load(x + i) * all(scale) * load(weight + i));
    for (; i < count; i++) out[i] = x[i] * scale * weight[i];
}

// [a | b] -> [a cos - b sin | b cos + a sin]
void turn(float* head, const float* angles, int64_t head_dim) {
    const int64_t half = head_dim / 2;
    int64_t i = 0;
    for (; i + LANES <= half; i += LANES) {
        Vec a = load(head + i), b = load(head + half + i), cos = load(angles + i), sin = load(angles + half + i);
        store(head + i, a * cos - b * sin);
        store(head + half + i, b * cos + a * sin);
    }
    for (; i < half; i++) {
        const float a = head[i], b = head[half + i], cos = angles[i], sin = angles[half + i];
        const float ac = a * cos, bs = b * sin, bc = b * cos, as = a * sin;
        head[i] = ac - bs;
        head[half + i] = bc + as;
    }
}

// act(gate) * up, `count` up to a panel; both arrays are whole vectors.
void gate(const float* g, const float* up, int32_t activation, int64_t count, float* out) {
    for (int64_t i = 0; i < count; i += LANES) {
        Vec x = load(g + i), inner = x;
        // gelu: 0.5 (1 + tanh z) = 1 / (1 + exp(-2 z)) with z = sqrt(2 / pi) (x + 0.044715 x^3)
        if (activation == GELU_TANH) inner = fma(x * x, all(0.044715f), all(1.0f)) * x * all(1.5957691216057308f);
        store(out + i, x / (all(1.0f) + exp(zero() - inner)) * load(up + i));
    }
}

void add(float* to, const float* what, int64_t count) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) store(to + i, load(to + i) + load(what + i));
    for (; i < count; i++) to[i] += what[i];
}

// ---- attention ------------------------------------------------------------------------------------------------------

INLINE uint16_t to_bf16(float x) {  // to nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

INLINE float int8_scale(const float* x, int64_t count) {
    Vec most = zero();
    for (int64_t i = 0; i < count; i += LANES) most = max(most, abs(load(x + i)));
    return largest(most) / 127.0f;
}

void store_kv(int32_t kind, const float* k, const float* v, int64_t head_dim, uint8_t* k_strip, uint8_t* v_strip, int slot) {
    if (kind == KV_FP32) {
        for (int64_t d = 0; d < head_dim; d++) ((float*)k_strip)[d * STRIP + slot] = k[d];
        std::memcpy((float*)v_strip + slot * head_dim, v, head_dim * sizeof(float));
    } else if (kind == KV_BF16) {
        uint16_t *keys = (uint16_t*)k_strip + 2 * slot, *values = (uint16_t*)v_strip + slot / 2 * 2 * head_dim + slot % 2;
        for (int64_t d = 0; d < head_dim; d++) keys[d / 2 * 2 * STRIP + d % 2] = to_bf16(k[d]);
        for (int64_t d = 0; d < head_dim; d++) values[2 * d] = to_bf16(v[d]);
    } else {
        const float ks = int8_scale(k, head_dim), vs = int8_scale(v, head_dim);
        alignas(64) int32_t whole[LANES];
        for (int64_t d = 0; d < head_dim; d += LANES) {
            store_rounded(whole, load(k + d) * all(ks > 0 ? 1.0f / ks : 0.0f));
            for (int i = 0; i < LANES; i++) ((int8_t*)k_strip)[(d + i) * STRIP + slot] = int8_t(whole[i]);
            store_rounded(whole, load(v + d) * all(vs > 0 ? 1.0f / vs : 0.0f));
            for (int i = 0; i < LANES; i++) ((int8_t*)v_strip)[slot * head_dim + d + i] = int8_t(whole[i]);
        }
        ((float*)(k_strip + STRIP * head_dim))[slot] = ks;
        ((float*)(v_strip + STRIP * head_dim))[slot] = vs;
    }
}

// Everything of one key tile. Values behind the last token that any row may see are not read (but one, with weight 0,
// where two lie side by side). A strip that has no such token is the first one again, and its scores are masked.
struct KeyTile {
    const uint8_t *keys[KEY_TILE / STRIP], *values[KEY_TILE / STRIP];
    int64_t tokens;
};

// Vectors that R rows meet at once.
constexpr int beside(int rows) { return 4 * rows <= FLOAT_CHAINS ? 4 : 2 * rows <= FLOAT_CHAINS ? 2 : 1; }

// score[r][64] of R rows: a sum over head_dim in order.
template <class L, int R>
INLINE void score_rows(const KeyTile& tile, const KeyTile& ahead, const typename L::X* const (&q)[R], int64_t head_dim, float* score) {
    constexpr int C = beside(R);
    for (int s = 0; s < KEY_TILE / STRIP; s += C) {
        Vec sums[R][C];
        const uint8_t *keys[C], *next[C];
        for (int c = 0; c < C; c++) {
            keys[c] = tile.keys[s + c];
            next[c] = ahead.keys[s + c];
            for (int r = 0; r < R; r++) sums[r][c] = zero();
        }
        chain<L, R, C>(sums, q, 0, head_dim, keys, STRIP, next);
        for (int c = 0; c < C; c++) {
            if constexpr (L::SIZE == 1) {
                const Vec scale = load((const float*)(keys[c] + STRIP * head_dim));
                for (int r = 0; r < R; r++) sums[r][c] = sums[r][c] * scale;
            }
            for (int r = 0; r < R; r++) store(score + r * KEY_TILE + (s + c) * STRIP, sums[r][c]);
        }
    }
}

// value[r][C vectors] += weights[r][64] * V of the tile, keys in order.
template <class L, int R, int C>
INLINE void value_tile(const KeyTile& tile, const KeyTile& ahead, const typename L::X* const (&weights)[R], int64_t head_dim, int64_t d, float* value) {
    Vec sums[R][C];
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) sums[r][c] = load(value + r * head_dim + d + c * LANES);
    for (int64_t token = 0; token < tile.tokens; token += STRIP) {
        const uint8_t *values[C], *next[C];
        for (int c = 0; c < C; c++) {
            const int64_t offset = (d + c * LANES) * L::SIZE;
            values[c] = tile.values[token / STRIP] + offset;
            next[c] = ahead.values[token / STRIP] + offset;
        }
        chain<L, R, C>(sums, weights, token, tile.tokens - token < STRIP ? tile.tokens - token : STRIP, values, head_dim, next);
    }
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) store(value + r * head_dim + d + c * LANES, sums[r][c]);
}

template <class L, int R>
INLINE void value_rows(const KeyTile& tile, const KeyTile& ahead, const typename L::X* const (&weights)[R], int64_t head_dim, float* value) {
    constexpr int C = beside(R);
    int64_t d = 0;
    for (; d + C * LANES <= head_dim; d += C * LANES) value_tile<L, R, C>(tile, ahead, weights, head_dim, d, value);
    if constexpr (C > 1)
        for (; d < head_dim; d += LANES) value_tile<L, R, 1>(tile, ahead, weights, head_dim, d, value);
}

// The online softmax of one row over one tile: scores become weights. `state`: maximum, sum of each lane.
INLINE void soften(float* score, int64_t first_key, int32_t position, int32_t window, float* state, float* value, int64_t head_dim) {
    const int64_t oldest = window ? int64_t(position) - window + 1 : 0;
    if (first_key + KEY_TILE - 1 > position || first_key < oldest)
        for (int64_t k = 0; k < KEY_TILE; k++)
            if (first_key + k > position || first_key + k < oldest) score[k] = -INFINITY;
    Vec s[KEY_TILE / STRIP];
    for (int i = 0; i < KEY_TILE / STRIP; i++) s[i] = load(score + i * STRIP);
    const float before = state[0], most = std::fmax(before, largest(max(max(s[0], s[1]), max(s[2], s[3]))));
    Vec total = load(state + LANES);
    if (most != before) {
        Vec kept = exp(all(before - most));
        total = total * kept;
        for (int64_t d = 0; d < head_dim; d += LANES) store(value + d, load(value + d) * kept);
        state[0] = most;
    }
    for (int i = 0; i < KEY_TILE / STRIP; i++) {
        s[i] = exp(s[i] - all(most));
        store(score + i * STRIP, s[i]);
    }
    store(state + LANES, total + ((s[0] + s[1]) + (s[2] + s[3])));
}

// Sums of int8 values carry the scale of each token, so it goes into the weights.
INLINE void scale_weights(const KeyTile& tile, int64_t head_dim, float* weights) {
    for (int s = 0; s < KEY_TILE / STRIP; s++) {
        const float* scale = (const float*)(tile.values[s] + STRIP * head_dim);
        store(weights + s * STRIP, load(weights + s * STRIP) * load(scale));
    }
}

struct Scratch {  // of the rows of one call: values, weights, maximum and lane sums, and queries as they are multiplied
    float *value, *weights, *state, *queries;
};

KeyTile tile_of(const Heads& heads, const Keys& keys) {
    const int64_t strip = strip_bytes(heads.kind, heads.head_dim), per_block = heads.block_tokens / STRIP;
    KeyTile tile{{}, {}, keys.last - keys.first < KEY_TILE ? keys.last - keys.first + 1 : KEY_TILE};
    for (int s = 0; s < KEY_TILE / STRIP; s++) {
        const int64_t index = keys.first / STRIP + (s * STRIP < tile.tokens ? s : 0);
        const int64_t place = (int64_t(keys.table[index / per_block]) * per_block + index % per_block) * strip;
        tile.keys[s] = heads.keys + place;
        tile.values[s] = heads.values + place;
    }
    return tile;
}

// Rows first, ..., last - 1 meet some keys, tile by tile; the next tile is fetched meanwhile, and `after` at last.
template <class L>
void meet(const Heads& heads, const Queries& queries, int first, int last, Keys keys, const KeyTile& after, Scratch at) {
    const int64_t width = heads.head_dim;
    KeyTile tile = tile_of(heads, keys), next;
    for (; keys.first <= keys.last; tile = next) {
        const int64_t begin = keys.first;
        keys.first += KEY_TILE;
        next = keys.first <= keys.last ? tile_of(heads, keys) : after;
        in_tiles<FLOAT_ROWS>(first, last, [&](auto count, int64_t row) {
            constexpr int R = count;
            const KeyTile& ahead = row == first ? next : tile;
            const typename L::X *q[R], *weights[R];
            for (int r = 0; r < R; r++) {
                q[r] = (const typename L::X*)(L::STEP > 1 ? at.queries + (row + r) * width : queries.q[row + r]);
                weights[r] = (const typename L::X*)(at.weights + (row + r) * KEY_TILE);
            }
            score_rows<L, R>(tile, ahead, q, width, at.weights + row * KEY_TILE);
            for (int64_t r = row; r < row + R; r++) {
                soften(at.weights + r * KEY_TILE, begin, queries.position[r], heads.window, at.state + r * 2 * LANES, at.value + r * width, width);
                if constexpr (L::SIZE == 1) scale_weights(tile, width, at.weights + r * KEY_TILE);
                if constexpr (L::STEP > 1) narrow(at.weights + r * KEY_TILE, KEY_TILE, at.weights + r * KEY_TILE);
            }
            value_rows<L, R>(tile, ahead, weights, width, at.value + row * width);
        });
    }
}

template <class L>
void attend_as(const Heads& heads, const Queries& queries, float* scratch) {
    const int64_t width = heads.head_dim;
    Scratch at{scratch, scratch + QUERY_ROWS * width, scratch + QUERY_ROWS * (width + KEY_TILE),
               scratch + QUERY_ROWS * (width + KEY_TILE + 2 * LANES)};
    int32_t oldest = queries.position[0];
    for (int r = 0; r < queries.count; r++) {
        oldest = queries.position[r] < oldest ? queries.position[r] : oldest;
        at.state[r * 2 * LANES] = -1e30f;  // not -inf: a row may find a whole tile masked
        store(at.state + r * 2 * LANES + LANES, zero());
        if constexpr (L::STEP > 1) narrow(queries.q[r], width, at.queries + r * width);
        for (int64_t d = 0; d < width; d += LANES) store(at.value + r * width + d, zero());
    }
    int64_t begin = first_key(oldest, heads.window);
    auto own = [&](int member) { return Keys{queries.table[member], begin, queries.position[(member + 1) * queries.per_member - 1]}; };
    if (const int64_t together = int64_t(queries.shared_tiles) * KEY_TILE; begin < together) {
        const Keys common{queries.table[0], begin, together - 1};
        begin = together;
        meet<L>(heads, queries, 0, queries.count, common, tile_of(heads, own(0)), at);
    }
    for (int member = 0, row = 0; member < queries.members; member++, row += queries.per_member) {
        const bool more = member + 1 < queries.members;
        const KeyTile after = more ? tile_of(heads, own(member + 1)) : tile_of(queries.next_heads, queries.next);
        meet<L>(heads, queries, row, row + queries.per_member, own(member), after, at);
    }
    for (int r = 0; r < queries.count; r++) {
        const Vec total = all(sum(load(at.state + r * 2 * LANES + LANES)));
        for (int64_t d = 0; d < width; d += LANES) store(queries.out[r] + d, load(at.value + r * width + d) / total);
    }
}

void attend(const Heads& heads, const Queries& queries, float* scratch) {
    if (heads.kind == KV_FP32) attend_as<Plain>(heads, queries, scratch);
    else if (heads.kind == KV_BF16) attend_as<Paired>(heads, queries, scratch);
    else attend_as<Small>(heads, queries, scratch);
}

}  // namespace

#define NAME_OF(x) #x
#define NAME(x) NAME_OF(x)
extern const Kernels HEADRACE_VARIANT;
const Kernels HEADRACE_VARIANT = {NAME(HEADRACE_VARIANT), Q8Dot::WANTED, panel, fill, norm, turn, gate, add, store_kv, attend, column, peaks, weigh, heavy};

}  // namespace headrace
