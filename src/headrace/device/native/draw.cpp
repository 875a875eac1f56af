// A token from a row of logits, without sorting a vocabulary and without knowing of other rows.
//
//   likeliest    the largest of the peaks of stretches of 256 logits, then the first such logit in its stretch
//   unfiltered   weights and the sum of each stretch; the stretch in which the point lies, then the token inside it
//   filtered     candidates: weights above a threshold, which falls until nothing that a filter could keep is missing.
//                Both the nucleus and the draw then ask for the likeliest candidates whose weights together reach a
//                sum, which selection finds in linear time
//
// Weights are floats and the likeliest's is 1; sums of more than a stretch are doubles. Among equals the lower token is
// the likelier one.
#include <algorithm>
#include <cmath>

#include "layout.h"

namespace headrace {
namespace {

constexpr float FIRST_THRESHOLD = 0x1p-10f, LOWERED = 0x1p-8f;
constexpr float SMALLEST = 1.2e-38f;  // every weight is larger, or 0

bool likelier(const Candidate& a, const Candidate& b) {
    return a.weight > b.weight || (a.weight == b.weight && a.token < b.token);
}

double sum_of(const Candidate* first, const Candidate* last) {
    double sum = 0;
    for (; first < last; first++) sum += first->weight;
    return sum;
}

// Brings the likeliest to the front, as many as it takes until `reached` their sum, in no order but that the least
// likely of them is the last. Returns how many; all, if that is not enough.
template <class F>
int64_t reach(Candidate* all, int64_t count, F reached) {
    int64_t low = 0, high = count;  // more than `low` are needed, and `high` suffice
    double before = 0;
    while (high - low > 1) {
        const int64_t middle = low + (high - low) / 2;
        std::nth_element(all + low, all + middle, all + high, likelier);
        const double sum = before + sum_of(all + low, all + middle);
        if (reached(sum)) {
            high = middle;
        } else {
            low = middle;
            before = sum;
        }
    }
    return high;
}

struct Row {
    const Kernels& kernels;
    float* logits;
    const int64_t vocab;
    const Draw& draw;
    float *peaks, *sums, *weights;  // sums: of stretches
    Candidate* found;
    double total = 0;
    bool cuts() const { return draw.top_k > 0 && draw.top_k < vocab; }
};

void forbid(const Row& row) {
    for (int64_t begin = 0; begin < row.vocab; begin += 32) {
        const uint32_t bits = row.draw.allowed[begin / 32];
        const int64_t count = std::min<int64_t>(32, row.vocab - begin);
        if (bits == 0xffffffff) continue;
        for (int64_t i = 0; i < count; i++)
            if (!(bits >> i & 1)) row.logits[begin + i] = -INFINITY;
    }
}

int32_t likeliest(const Row& row) {
    const int64_t stretch = std::max_element(row.peaks, row.peaks + ceil_div(row.vocab, STRETCH)) - row.peaks;
    const float* from = row.logits + stretch * STRETCH;
    return int32_t(std::find(from, (const float*)row.logits + row.vocab - 1, row.peaks[stretch]) - row.logits);
}

int32_t from_whole(const Row& row) {
    const double target = double(row.draw.point) * row.total;
    const int64_t stretches = ceil_div(row.vocab, STRETCH);
    int64_t stretch = 0;
    double sum = 0, before = 0;
    for (int64_t s = 0; s < stretches && sum <= target; s++) {
        if (row.sums[s] == 0) continue;
        stretch = s;
        before = sum;
        sum += row.sums[s];
    }
    int64_t token = 0;
    const int64_t end = std::min(row.vocab, (stretch + 1) * STRETCH);
    for (int64_t i = stretch * STRETCH; i < end && before <= target; i++) {
        if (row.weights[i] == 0) continue;
        token = i;  // rounding may leave the point behind the last that has a weight: then that one
        before += row.weights[i];
    }
    return int32_t(token);
}

// How many candidates hold all that the filters can keep; all that have a weight, at worst.
int64_t candidates(const Row& row) {
    const Draw& draw = row.draw;
    float threshold = std::max(FIRST_THRESHOLD, float(draw.min_p * (1 - 0x1p-20)));
    for (;; threshold = std::max(threshold * LOWERED, SMALLEST)) {
        const int64_t count = row.kernels.heavy(row.weights, row.vocab, threshold, row.found);
        if (threshold <= SMALLEST) return count;
        if (row.cuts() && count >= draw.top_k) return count;
        if (threshold <= draw.min_p && !(row.cuts() && draw.top_p < 1)) return count;
        if (!row.cuts() && draw.top_p < 1 && sum_of(row.found, row.found + count) >= draw.top_p * row.total) return count;
    }
}

int32_t from_filtered(const Row& row) {
    const Draw& draw = row.draw;
    Candidate* found = row.found;
    int64_t count = candidates(row);
    if (row.cuts() && draw.top_k < count) {
        std::nth_element(found, found + draw.top_k, found + count, likelier);
        count = draw.top_k;
    }
    if (draw.top_p < 1) {
        const double nucleus = draw.top_p * (row.cuts() ? sum_of(found, found + count) : row.total);
        count = reach(found, count, [&](double sum) { return sum >= nucleus; });
    }
    if (draw.min_p > 0)
        count = std::partition(found, found + count, [&](const Candidate& c) { return c.weight >= draw.min_p; }) - found;
    const double target = double(draw.point) * sum_of(found, found + count);
    return found[reach(found, count, [&](double sum) { return sum > target; }) - 1].token;
}

}  // namespace

int32_t draw_token(const Kernels& kernels, float* logits, int64_t vocab, const Draw& draw, float* scratch) {
    const int64_t stretches = ceil_div(vocab, STRETCH), padded = ceil_div(vocab, LANES) * LANES;
    float *peaks = scratch, *sums = peaks + stretches, *weights = sums + stretches;
    Row row{kernels, logits, vocab, draw, peaks, sums, weights, (Candidate*)(weights + padded)};
    if (draw.allowed) forbid(row);
    if (!kernels.peaks(logits, vocab, peaks)) return NOT_A_NUMBER;
    const int32_t best = likeliest(row);
    if (draw.temperature == 0 || !std::isfinite(logits[best] / draw.temperature)) return best;
    kernels.weigh(logits, vocab, logits[best], draw.temperature, weights, sums);
    for (int64_t s = 0; s < stretches; s++) row.total += sums[s];
    return draw.top_k > 0 || draw.top_p < 1 || draw.min_p > 0 ? from_filtered(row) : from_whole(row);
}

}  // namespace headrace
