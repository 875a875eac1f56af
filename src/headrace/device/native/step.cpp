// A step, or some layers of one: which kernels run on which rows and panels, phase by phase. Nothing is allocated once
// the largest step has been seen.
//
//   [embed]  { norm | qkv | turn, store | attend | out | norm | gate, up | down } * layers      norm | head
//
// Between two bars all chunks of the one are done before the other begins; all KV writes of a layer come before its
// attention, so requests of a step may share blocks that the step fills.
#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "layout.h"
#include "pool.h"

namespace headrace {

#if defined(__x86_64__)
extern const Kernels avx512bf16, avx512, avx2;
#endif
extern const Kernels portable;

namespace {

enum Kind : int32_t { EMBED, NORM_ATTENTION, QKV, TURN, ATTEND, FILL, OUT, NORM_FFN, GATE_UP, DOWN, SETTLE, NORM_HEAD, HEAD, DRAW, KINDS };

constexpr int64_t ROW_CHUNK = 4;  // rows of one chunk where rows are independent

bool can_run(const Kernels& kernels) {
    if (&kernels == &portable) return true;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool eight = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (&kernels == &avx2) return eight;
    if (&kernels == &avx512bf16) return can_run(avx512) && __builtin_cpu_supports("avx512bf16");
    return eight && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
#endif
    return false;
}

const Kernels* kernels_called(const char* name) {
    const Kernels* all[] = {
#if defined(__x86_64__)
        &avx512bf16, &avx512, &avx2,
#endif
        &portable};
    for (const Kernels* each : all)
        if (can_run(*each) && (!name || !std::strcmp(name, each->name))) return each;
    return nullptr;
}

template <class T>
T* grown(std::vector<T>& memory, size_t count) {
    if (memory.size() < count) memory.resize(count);
    return memory.data();
}

// One set of inputs of linear layers, grown to the widest and longest step.
class InputMemory {
  public:
    Inputs get(int64_t rows, int64_t width, int wanted) {
        width = ceil_div(width, GROUP) * GROUP;
        const size_t all = size_t(rows * width), groups = all / GROUP;
        Inputs in{};
        in.width = width;
        if (wanted & PLAIN) in.plain = grown(plain_, all);
        if (wanted & (BYTES | PAIRS)) {
            in.bytes = grown(bytes_, all);
            in.scales = grown(scales_, groups);
            in.totals = grown(totals_, groups);
            in.sums = grown(sums_, groups);
        }
        if (wanted & PAIRS) in.pairs = grown(pairs_, all);
        return in;
    }

  private:
    std::vector<float> plain_, scales_, totals_;
    std::vector<int8_t> bytes_;
    std::vector<int16_t> pairs_;
    std::vector<int32_t> sums_;
};

struct Tile {  // rows that attend together: members are requests that decode, or one request's consecutive positions
    int32_t span, members, row, count, shared_tiles;
};

class Runner {
  public:
    Runner(const Config& config, const Cache& cache, const Kernels& kernels, int threads, const int32_t* cores)
        : config_(config), cache_(cache), kernels_(kernels), pool_(threads, cores), group_(config.heads / config.kv_heads) {
        const int64_t per_thread = ATTEND_SCRATCH(config.head_dim) + QUERY_ROWS * config.head_dim + 2 * widest();
        per_thread_ = ceil_div(per_thread, 64) * 64;
        scratch_.resize(size_t(per_thread_ * threads));
    }

    void layers(const Step& step) {
        step_ = step;
        lay_out();
        phases_.clear();
        const int32_t rows = int32_t(ceil_div(step.rows, ROW_CHUNK)), blocks = int32_t(ceil_div(step.rows, ROW_BLOCK));
        auto then = [&](Kind kind, int32_t layer, int64_t chunks, const Matrix* ahead) {
            phases_.push_back({kind, layer, int32_t(chunks), ahead ? ahead->panels : nullptr, ahead ? ahead->bytes() : 0});
        };
        if (step.first == 0) then(EMBED, 0, rows, nullptr);
        for (int32_t index = step.first; index < step.last; index++) {
            const Layer& layer = config_.layer[index];
            const Matrix* next = index + 1 < config_.layers ? &config_.layer[index + 1].q : &config_.head;
            then(NORM_ATTENTION, index, rows, &layer.q);
            then(QKV, index, blocks * (layer.q.count() + layer.k.count() + layer.v.count()), nullptr);
            then(TURN, index, rows, &layer.out);
            then(ATTEND, index, int64_t(tiles_.size()) * config_.kv_heads, &layer.out);
            if (config_.head_dim % GROUP) then(FILL, index, rows, &layer.out);
            then(OUT, index, blocks * layer.out.count(), &layer.gate);
            then(NORM_FFN, index, rows, &layer.gate);
            then(GATE_UP, index, blocks * layer.gate.count(), &layer.down);
            then(DOWN, index, blocks * layer.down.count(), next);
            if (layer.after_ffn) then(SETTLE, index, rows, next);
        }
        pool_.run(phases_, work, this, spent_);
    }

    // logits[i][vocab] of rows[i] of x; and, if `draws` says how, a token for each
    void logits(const float* x, const int32_t* rows, int32_t count, float* logits, Draw* draws) {
        if (!count) return;
        asked_ = rows;
        logits_ = logits;
        step_ = Step{};
        step_.rows = count;
        step_.x = const_cast<float*>(x);
        head_in_ = of_hidden_.get(count, config_.hidden, wanted(config_.head));
        phases_.clear();
        const Matrix& head = config_.head;
        phases_.push_back({NORM_HEAD, 0, int32_t(ceil_div(count, ROW_CHUNK)), head.panels, head.bytes()});
        phases_.push_back({HEAD, 0, int32_t(ceil_div(count, ROW_BLOCK) * head.count()), nullptr, 0});
        if (draws) then_draw(count, draws);
        pool_.run(phases_, work, this, spent_);
    }

    // A token for each row of logits.
    void draw(float* logits, int32_t count, Draw* draws) {
        if (!count) return;
        logits_ = logits;
        phases_.clear();
        then_draw(count, draws);
        pool_.run(phases_, work, this, spent_);
    }

    // Seconds since the last call: linear layers, attention, output head, drawing, the rest.
    void times(double* seconds) {
        const int64_t linear = spent_[QKV] + spent_[OUT] + spent_[GATE_UP] + spent_[DOWN];
        const int64_t attention = spent_[TURN] + spent_[ATTEND];
        const int64_t head = spent_[NORM_HEAD] + spent_[HEAD];
        int64_t all = 0;
        for (int64_t each : spent_) all += each;
        const int64_t parts[] = {linear, attention, head, spent_[DRAW], all - linear - attention - head - spent_[DRAW]};
        for (int i = 0; i < 5; i++) seconds[i] = double(parts[i]) * 1e-9;
        std::fill(std::begin(spent_), std::end(spent_), 0);
    }

  private:
    int64_t widest() const { return std::max({config_.hidden, config_.heads * config_.head_dim, config_.ffn}) + GROUP; }
    int64_t qkv_width() const { return int64_t(config_.heads + 2 * config_.kv_heads) * config_.head_dim; }
    float* scratch(int worker) { return scratch_.data() + worker * per_thread_; }

    int wanted(const Matrix& m) const {
        if (m.format == Q8) return BYTES | kernels_.wanted_for_q8;
        return m.format == Q4 ? BYTES : PLAIN;
    }

    void then_draw(int32_t count, Draw* draws) {
        draws_ = draws;
        grown(draw_scratch_, size_t(draw_scratch(config_.vocab) * pool_.threads()));
        phases_.push_back({DRAW, 0, count, nullptr, 0});
    }

    // What the step's rows are, and memory for them.
    void lay_out() {
        const int64_t rows = step_.rows;
        int32_t* positions = grown(positions_, rows);
        int32_t* tables = grown(tables_, rows);
        tiles_.clear();
        const int32_t each = QUERY_ROWS / group_;
        for (int32_t s = 0; s < step_.spans; s++) {
            const Span& span = step_.span[s];
            for (int32_t i = 0; i < span.count; i++) {
                positions[span.row + i] = span.start + i;
                tables[span.row + i] = span.table;
            }
            const int32_t shared = step_.shared ? step_.shared[s] : 0;
            if (shared && !tiles_.empty() && tiles_.back().members < each) {
                Tile& tile = tiles_.back();
                tile.shared_tiles = tile.members++ == 1 ? shared : std::min(tile.shared_tiles, shared);
                continue;
            }
            for (int32_t i = 0; i < span.count; i += each) tiles_.push_back({s, 1, span.row + i, std::min(each, span.count - i), 0});
        }
        const Layer& layer = config_.layer[0];
        int hidden_wanted = 0, out_wanted = 0, down_wanted = 0;
        for (int32_t i = step_.first; i < step_.last; i++) {
            const Layer& at = config_.layer[i];
            for (const Matrix* m : {&at.q, &at.k, &at.v, &at.gate, &at.up}) hidden_wanted |= wanted(*m);
            out_wanted |= wanted(at.out);
            down_wanted |= wanted(at.down);
        }
        wanted_hidden_ = hidden_wanted;
        wanted_out_ = out_wanted;
        wanted_down_ = down_wanted;
        hidden_in_ = of_hidden_.get(rows, config_.hidden, hidden_wanted);
        out_in_ = of_others_.get(rows, config_.heads * config_.head_dim, out_wanted);
        down_in_ = of_others_.get(rows, config_.ffn, down_wanted);
        out_in_ = of_others_.get(rows, config_.heads * config_.head_dim, out_wanted);  // again: the memory may have moved
        grown(qkv_, size_t(rows * qkv_width()));
        if (layer.after_attention) grown(branch_, size_t(rows * config_.hidden));
    }

    static void work(void* context, const Phase& phase, int32_t chunk, int worker) {
        static_cast<Runner*>(context)->chunk(phase, chunk, worker);
    }

    void chunk(const Phase& phase, int32_t chunk, int worker) {
        const Layer& layer = config_.layer[phase.layer];
        switch (phase.kind) {
            case QKV: return qkv(layer, chunk);
            case ATTEND: return attend(phase.layer, chunk, worker);
            case OUT: return into_stream(layer.out, out_in_, chunk, layer.after_attention);
            case GATE_UP: return gate_up(layer, chunk);
            case DOWN: return into_stream(layer.down, down_in_, chunk, layer.after_ffn);
            case HEAD: return head(chunk);
            case DRAW: return draw(chunk, worker);
        }
        const int64_t last = std::min<int64_t>(step_.rows, (chunk + 1) * ROW_CHUNK);
        for (int64_t row = chunk * ROW_CHUNK; row < last; row++) one_row(phase, layer, row, worker);
    }

    void one_row(const Phase& phase, const Layer& layer, int64_t row, int worker) {
        float *x = step_.x + row * config_.hidden, *normed = scratch(worker);
        switch (phase.kind) {
            case EMBED: return kernels_.column(config_.embedding, step_.ids[row], config_.embedding_scale, x);
            case TURN: return turn(phase.layer, row);
            case FILL: return kernels_.fill(qkv(row), config_.heads * config_.head_dim, wanted_out_, out_in_, row, 0);
            case SETTLE: return settle(layer.after_ffn, row, worker);
            case NORM_FFN:
                if (layer.after_attention) settle(layer.after_attention, row, worker);
                kernels_.norm(x, layer.before_ffn, config_.hidden, config_.norm_eps, normed);
                return kernels_.fill(normed, config_.hidden, wanted_hidden_, hidden_in_, row, 0);
            case NORM_ATTENTION:
                kernels_.norm(x, layer.before_attention, config_.hidden, config_.norm_eps, normed);
                return kernels_.fill(normed, config_.hidden, wanted_hidden_, hidden_in_, row, 0);
            default:
                kernels_.norm(step_.x + int64_t(asked_[row]) * config_.hidden, config_.norm, config_.hidden, config_.norm_eps, normed);
                kernels_.fill(normed, config_.hidden, wanted(config_.head), head_in_, row, 0);
        }
    }

    float* qkv(int64_t row) { return qkv_.data() + row * qkv_width(); }

    // The rows and the panel of a chunk; calls f(row, 32 results, how many of them count).
    template <class F>
    void panel_rows(const Matrix& m, int64_t panel, int64_t block, const Inputs& in, F f) {
        alignas(64) float results[ROW_BLOCK * PANEL];
        const int64_t first = block * ROW_BLOCK, last = std::min<int64_t>(step_.rows, first + ROW_BLOCK);
        kernels_.panel(m, panel, in, first, last, results);
        const int64_t count = std::min<int64_t>(PANEL, m.outputs - panel * PANEL);
        for (int64_t row = first; row < last; row++) f(row, results + (row - first) * PANEL, count);
    }

    void qkv(const Layer& layer, int64_t chunk) {
        const int64_t all = layer.q.count() + layer.k.count() + layer.v.count(), block = chunk / all;
        int64_t panel = chunk % all, column = 0;
        const Matrix* m = &layer.q;
        for (const Matrix* next : {&layer.k, &layer.v}) {
            if (panel < m->count()) break;
            panel -= m->count();
            column += m->outputs;
            m = next;
        }
        panel_rows(*m, panel, block, hidden_in_, [&](int64_t row, const float* results, int64_t count) {
            std::memcpy(qkv(row) + column + panel * PANEL, results, count * sizeof(float));
        });
    }

    // Norms and turns q and k of a row, and stores its k and v.
    void turn(int32_t index, int64_t row) {
        const Layer& layer = config_.layer[index];
        const int64_t width = config_.head_dim, position = positions_[row];
        const float* angles = layer.rope < 0 ? nullptr : step_.angles[layer.rope] + position * width;
        float* at = qkv(row);
        for (int64_t head = 0; head < config_.heads + config_.kv_heads; head++) {
            float* one = at + head * width;
            if (layer.head_norms) kernels_.norm(one, layer.head_norms + head * width, width, config_.norm_eps, one);
            if (angles) kernels_.turn(one, angles, width);
        }
        for (int64_t i = 0; i < config_.heads * width; i++) at[i] *= config_.attention_scale;
        const int64_t strip = strip_bytes(cache_.kind, width), per_block = cache_.block_tokens / STRIP;
        const int64_t block = step_.tables[tables_[row] + position / cache_.block_tokens];
        const int64_t slot = position % cache_.block_tokens;
        const float *k = at + config_.heads * width, *v = k + config_.kv_heads * width;
        for (int64_t head = 0; head < config_.kv_heads; head++) {
            const int64_t offset = ((head * cache_.blocks + block) * per_block + slot / STRIP) * strip;
            kernels_.store_kv(cache_.kind, k + head * width, v + head * width, width, cache_.keys[index] + offset,
                              cache_.values[index] + offset, int(slot % STRIP));
        }
    }

    Heads heads(int32_t index, int64_t head) const {
        const int64_t plane = head * cache_.blocks * (cache_.block_tokens / STRIP) * strip_bytes(cache_.kind, config_.head_dim);
        return {cache_.kind, cache_.block_tokens, config_.head_dim, config_.layer[index].window, cache_.keys[index] + plane,
                cache_.values[index] + plane};
    }

    // What the first member of a tile reads.
    Keys keys(int32_t index, const Tile& tile) const {
        const Span& span = step_.span[tile.span];
        return {step_.tables + span.table, first_key(positions_[tile.row], config_.layer[index].window),
                positions_[tile.row + (tile.members > 1 ? 1 : tile.count) - 1]};
    }

    void attend(int32_t index, int64_t chunk, int worker) {
        const int64_t head = chunk % config_.kv_heads, width = config_.head_dim;
        const Tile& tile = tiles_[chunk / config_.kv_heads];
        const int64_t after = std::min<int64_t>(chunk + 1, int64_t(tiles_.size()) * config_.kv_heads - 1);
        float* out = scratch(worker) + ATTEND_SCRATCH(width);
        Queries queries{};
        queries.per_member = tile.count * group_;
        queries.shared_tiles = tile.shared_tiles;
        for (int32_t member = 0; member < tile.members; member++) {
            queries.table[queries.members++] = step_.tables + step_.span[tile.span + member].table;
            for (int32_t i = 0; i < tile.count; i++) {
                const int64_t row = tile.row + member + i;
                for (int64_t g = 0; g < group_; g++) {
                    queries.q[queries.count] = qkv(row) + (head * group_ + g) * width;
                    queries.position[queries.count] = positions_[row];
                    queries.out[queries.count] = out + queries.count * width;
                    queries.count++;
                }
            }
        }
        queries.next_heads = heads(index, after % config_.kv_heads);
        queries.next = keys(index, tiles_[after / config_.kv_heads]);
        kernels_.attend(heads(index, head), queries, scratch(worker));
        for (int i = 0; i < queries.count; i++) {
            const int64_t row = tile.row + i / group_, column = (head * group_ + i % group_) * width;
            if (width % GROUP) std::memcpy(qkv(row) + column, queries.out[i], width * sizeof(float));
            else kernels_.fill(queries.out[i], width, wanted_out_, out_in_, row, column);
        }
    }

    // A branch's results, added to the stream, or kept to be normed first.
    void into_stream(const Matrix& m, const Inputs& in, int64_t chunk, const float* after) {
        const int64_t panel = chunk % m.count();
        panel_rows(m, panel, chunk / m.count(), in, [&](int64_t row, const float* results, int64_t count) {
            const int64_t at = row * config_.hidden + panel * PANEL;
            if (after) std::memcpy(branch_.data() + at, results, count * sizeof(float));
            else kernels_.add(step_.x + at, results, count);
        });
    }

    void settle(const float* weight, int64_t row, int worker) {
        float* normed = scratch(worker);
        kernels_.norm(branch_.data() + row * config_.hidden, weight, config_.hidden, config_.norm_eps, normed);
        kernels_.add(step_.x + row * config_.hidden, normed, config_.hidden);
    }

    void gate_up(const Layer& layer, int64_t chunk) {
        const int64_t panel = chunk % layer.gate.count(), block = chunk / layer.gate.count();
        alignas(64) float gates[ROW_BLOCK * PANEL], joined[PANEL];
        kernels_.panel(layer.gate, panel, hidden_in_, block * ROW_BLOCK, std::min<int64_t>(step_.rows, (block + 1) * ROW_BLOCK), gates);
        panel_rows(layer.up, panel, block, hidden_in_, [&](int64_t row, const float* up, int64_t count) {
            kernels_.gate(gates + (row - block * ROW_BLOCK) * PANEL, up, config_.activation, PANEL, joined);
            kernels_.fill(joined, count, wanted_down_, down_in_, row, panel * PANEL);
        });
    }

    void head(int64_t chunk) {
        const int64_t panel = chunk % config_.head.count();
        panel_rows(config_.head, panel, chunk / config_.head.count(), head_in_, [&](int64_t row, const float* results, int64_t count) {
            std::memcpy(logits_ + row * config_.vocab + panel * PANEL, results, count * sizeof(float));
        });
    }

    void draw(int64_t row, int worker) {
        float* scratch = draw_scratch_.data() + worker * draw_scratch(config_.vocab);
        draws_[row].token = draw_token(kernels_, logits_ + row * config_.vocab, config_.vocab, draws_[row], scratch);
    }

    const Config config_;
    const Cache cache_;
    const Kernels& kernels_;
    Pool pool_;
    const int32_t group_;
    int64_t per_thread_;
    Step step_{};
    const int32_t* asked_ = nullptr;
    float* logits_ = nullptr;
    Draw* draws_ = nullptr;
    int wanted_hidden_ = 0, wanted_out_ = 0, wanted_down_ = 0;
    InputMemory of_hidden_, of_others_;
    Inputs hidden_in_{}, out_in_{}, down_in_{}, head_in_{};
    std::vector<float> scratch_, draw_scratch_, qkv_, branch_;
    std::vector<int32_t> positions_, tables_;
    std::vector<Tile> tiles_;
    std::vector<Phase> phases_;
    int64_t spent_[KINDS] = {};
};

}  // namespace
}  // namespace headrace

using namespace headrace;

extern "C" {
#pragma GCC visibility push(default)

const char* headrace_variant(const char* name) {  // of that name, or the best; null if this machine cannot run it
    const Kernels* found = kernels_called(name);
    return found ? found->name : nullptr;
}

// `config`, its layers and weights, and the planes of `cache` stay where they are while the runner lives.
void* headrace_open(const Config* config, const Cache* cache, const char* variant, int32_t threads, const int32_t* cores) {
    const Kernels* kernels = kernels_called(variant);
    return kernels ? new Runner(*config, *cache, *kernels, threads, cores) : nullptr;
}

void headrace_close(void* runner) { delete static_cast<Runner*>(runner); }
void headrace_layers(void* runner, const Step* step) { static_cast<Runner*>(runner)->layers(*step); }
void headrace_times(void* runner, double* seconds) { static_cast<Runner*>(runner)->times(seconds); }

void headrace_logits(void* runner, const float* x, const int32_t* rows, int32_t count, float* logits, Draw* draws) {
    static_cast<Runner*>(runner)->logits(x, rows, count, logits, draws);
}

// A token for each of `count` rows of logits, which may change.
void headrace_draw(void* runner, float* logits, int32_t count, Draw* draws) {
    static_cast<Runner*>(runner)->draw(logits, count, draws);
}
}
