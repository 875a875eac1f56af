// The layout of every array that crosses a boundary: Python to C++, loading to stepping, one kernel to the next.
//
// A *vector* is sixteen floats on every machine (vector.h), and sums run in an order that this file and the kernels
// state, so all variants of the kernels give a row the same bits, whoever else is in the step.
//
// Weights. A matrix [outputs, inputs] is cut into panels of 32 outputs, each one contiguous stretch of memory that is
// read front to back. Outputs lie side by side, so that a sum over inputs never crosses lanes:
//
//   FP32, BF16   for each input:    32 weights
//   Q8           for each group of 32 inputs:  32 scales (half) | 8 quads of 4 inputs
//                a quad:   output 0: 4 bytes | output 1: 4 bytes | ... | output 31        weight = scale * (byte - 128)
//   Q4           for each group of 32 inputs:  32 scales (half) | 32 minima (half) | 8 quads of 4 inputs
//                a quad:   64 bytes: low nibbles as above for outputs 0 to 15, high nibbles for outputs 16 to 31
//                                                                                         weight = scale * nibble + minimum
//   The last panel is filled up with zeros, and so are the inputs of the last group.
//
// KV. The plane of a layer is [kv_heads][blocks][strips of 16 tokens], a block holding block_tokens / 16 strips:
//
//   a strip of K:  [head_dim][16 tokens]  a score of 16 keys is a sum over rows    | INT8: 16 scales (float) follow
//   a strip of V:  [16 tokens][head_dim]  a weighted value is a sum over rows      | INT8: 16 scales (float) follow
//   BF16, two rows side by side:  K [head_dim / 2][16 tokens][2]   V [8][head_dim][2 tokens]
//                                 queries and weights of the softmax are rounded to bf16 before they meet these
#pragma once
#include <cstddef>
#include <cstdint>

namespace headrace {

constexpr int LANES = 16;
constexpr int PANEL = 32;      // outputs
constexpr int GROUP = 32;      // inputs under one scale
constexpr int QUADS = GROUP / 4;
constexpr int STRIP = 16;      // tokens
constexpr int KEY_TILE = 64;   // keys under one maximum of the online softmax, at positions that are multiples of it
constexpr int QUERY_ROWS = 24; // rows (positions times heads of a group) that meet a key tile together
constexpr int ROW_BLOCK = 64;  // rows that meet a panel in one task
constexpr int STRETCH = 256;   // logits that are summed up together

enum Format : int32_t { FP32 = 0, BF16 = 1, Q8 = 2, Q4 = 3 };
enum KVKind : int32_t { KV_FP32 = 0, KV_BF16 = 1, KV_INT8 = 2 };
enum Activation : int32_t { SILU = 0, GELU_TANH = 1 };

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t panel_bytes(int32_t format, int64_t inputs) {
    switch (format) {
        case FP32: return inputs * PANEL * 4;
        case BF16: return inputs * PANEL * 2;
        case Q8: return ceil_div(inputs, GROUP) * (PANEL * 2 + PANEL * GROUP);
        default: return ceil_div(inputs, GROUP) * (PANEL * 4 + PANEL * GROUP / 2);
    }
}

struct Matrix {
    int32_t format, outputs, inputs, unused;
    const uint8_t* panels;  // null: there is no such matrix
    const float* bias;      // [outputs] or null
    int64_t count() const { return ceil_div(outputs, PANEL); }
    int64_t bytes() const { return count() * panel_bytes(format, inputs); }
    const uint8_t* panel(int64_t index) const { return panels + index * panel_bytes(format, inputs); }
};

struct Layer {
    Matrix q, k, v, out, gate, up, down;
    const float *before_attention, *after_attention, *before_ffn, *after_ffn;  // norms [hidden]; after_*: or null
    const float* head_norms;  // [heads + kv_heads][head_dim] or null
    int32_t rope;             // index into Step.angles; -1: this layer knows no positions
    int32_t window;           // tokens a row sees; 0: all that came before
};

struct Config {
    int32_t layers, hidden, heads, kv_heads, head_dim, ffn, vocab, activation;
    float norm_eps, attention_scale, embedding_scale;
    int32_t unused;
    const Layer* layer;
    Matrix embedding, head;
    const float* norm;  // [hidden]
};

struct Cache {              // the paged KV memory
    int32_t kind, block_tokens;
    int64_t blocks;
    uint8_t* const* keys;   // a plane per layer
    uint8_t* const* values;
};

struct Span {                 // consecutive rows of one request
    int32_t row, start, count;  // first row in the step, its position, rows
    int32_t table;              // where its block table begins in Step.tables
};

struct Step {
    int32_t rows, spans, first, last;  // layers first, ..., last - 1
    const int32_t* ids;                // [rows]; read when first is 0
    float* x;                          // [rows][hidden] in and out; written by the embedding when first is 0
    const Span* span;
    const int32_t* tables;
    const float* const* angles;        // per rope: [position][cos: head_dim / 2 | sin: head_dim / 2]
    const int32_t* shared;             // [spans]: key tiles that this span has in common with the one before it, or null
};

// What linear layers read: rows of inputs, plain for FP32 and BF16 weights, quantised for the others.
struct Inputs {
    float* plain;     // [row][width]
    int8_t* bytes;    // [row][width]            x = scale * byte, scale = largest / 127 of a row's group of 32
    int16_t* pairs;   // [row][width]            the same, of each quad x0 x2 x1 x3: what AVX2 multiplies with Q8 weights
    float* scales;    // [row][width / 32]
    float* totals;    // [row][width / 32]       scale * sum of the group's bytes
    int32_t* sums;    // [row][width / 32]       sum of the group's bytes
    int64_t width;    // a multiple of 32
};
enum Wanted { PLAIN = 1, BYTES = 2, PAIRS = 4 };  // which of these to fill

struct Heads {  // one KV head of one layer
    int32_t kind, block_tokens, head_dim, window;
    const uint8_t *keys, *values;  // plane of this head: [blocks][strips]
};

struct Keys {  // of one request, from the beginning of a tile to the last one that counts
    const int32_t* table;
    int64_t first, last;
};

inline int64_t first_key(int32_t position, int32_t window) {  // of the tile with the oldest key that a position sees
    const int64_t oldest = window ? int64_t(position) - window + 1 : 0;
    return oldest > 0 ? oldest / KEY_TILE * KEY_TILE : 0;
}

// Rows that attend with one KV head together. A member is a request: `per_member` rows of its heads and positions.
// The first `shared_tiles` key tiles of all members lie in the same blocks and are read once for all of them.
struct Queries {
    const float* q[QUERY_ROWS];  // [head_dim], scaled
    int32_t position[QUERY_ROWS];
    float* out[QUERY_ROWS];      // [head_dim]
    const int32_t* table[QUERY_ROWS];  // of each member
    int count, members, per_member, shared_tiles;
    Heads next_heads;  // what will be read after these: its first tile is fetched in the meantime
    Keys next;
};

struct Draw {                 // how the token of a row of logits is drawn, and which it was
    float temperature, point;  // 0: the likeliest; the draw itself, uniform in [0, 1]
    double top_p, min_p;       // 1, 0: off
    const uint32_t* allowed;   // a bit for each token, or null: all of them
    int32_t top_k;             // 0: off
    int32_t token;             // out
};
constexpr int32_t NOT_A_NUMBER = -1;  // `token` where some logit is none

struct Candidate {
    float weight;  // 1 for the likeliest
    int32_t token;
};

// One variant of everything that is worth vectorising.
struct Kernels {
    const char* name;
    int wanted_for_q8;  // Wanted
    // out[row - first][32] = inputs of `row` times one panel, rows first, ..., last - 1 (at most ROW_BLOCK)
    void (*panel)(const Matrix&, int64_t panel, const Inputs&, int64_t first, int64_t last, float* out);
    void (*fill)(const float* x, int64_t count, int wanted, const Inputs&, int64_t row, int64_t column);
    void (*norm)(const float* x, const float* weight, int64_t count, float eps, float* out);
    void (*turn)(float* head, const float* angles, int64_t head_dim);
    void (*gate)(const float* gate, const float* up, int32_t activation, int64_t count, float* out);
    void (*add)(float* to, const float* what, int64_t count);
    void (*store_kv)(int32_t kind, const float* k, const float* v, int64_t head_dim, uint8_t* k_strip, uint8_t* v_strip, int slot);
    void (*attend)(const Heads&, const Queries&, float* scratch);
    void (*column)(const Matrix&, int64_t output, float scale, float* out);
    bool (*peaks)(const float* logits, int64_t vocab, float* peaks);
    void (*weigh)(const float* logits, int64_t vocab, float most, float temperature, float* weights, float* sums);
    int64_t (*heavy)(const float* weights, int64_t vocab, float least, Candidate* found);
};
constexpr int64_t ATTEND_SCRATCH(int64_t head_dim) { return QUERY_ROWS * (2 * head_dim + KEY_TILE + 3 * LANES); }

inline int64_t strip_bytes(int32_t kind, int64_t head_dim) {
    return kind == KV_FP32 ? STRIP * head_dim * 4 : kind == KV_BF16 ? STRIP * head_dim * 2 : STRIP * (head_dim + 4);
}

// draw.cpp; may change the logits.
int32_t draw_token(const Kernels&, float* logits, int64_t vocab, const Draw&, float* scratch);
inline int64_t draw_scratch(int64_t vocab) { return 2 * ceil_div(vocab, STRETCH) + 3 * ceil_div(vocab, LANES) * LANES; }

}  // namespace headrace
