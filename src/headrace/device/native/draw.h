// The passes over whole rows of logits from which draw.cpp draws tokens. Included by kernels.cpp once per variant.
#pragma once
#include "vector.h"

namespace headrace {
namespace {

INLINE Vec sixteen(const float* x, int64_t at, int64_t count) {  // -inf beyond the end
    if (at + LANES <= count) return load(x + at);
    alignas(64) float rest[LANES];
    for (int i = 0; i < LANES; i++) rest[i] = at + i < count ? x[at + i] : -INFINITY;
    return load(rest);
}

// The largest logit of each stretch. False if one of them all is not a number.
bool peaks(const float* logits, int64_t vocab, float* peak) {
    uint32_t numbers = (1u << LANES) - 1;
    for (int64_t begin = 0; begin < vocab; begin += STRETCH) {
        const int64_t end = begin + STRETCH < vocab ? begin + STRETCH : vocab;
        Vec most = all(-INFINITY);
        for (int64_t at = begin; at < end; at += LANES) {
            const Vec x = sixteen(logits, at, vocab);
            numbers &= at_least(x, all(-INFINITY));
            most = max(most, x);
        }
        peak[begin / STRETCH] = largest(most);
    }
    return numbers == (1u << LANES) - 1;
}

// exp((logit - most) / temperature), and the sum of each stretch of them.
void weigh(const float* logits, int64_t vocab, float most, float temperature, float* weights, float* sums) {
    const Vec by = all(temperature), top = all(most / temperature);
    for (int64_t begin = 0; begin < vocab; begin += STRETCH) {
        const int64_t end = begin + STRETCH < vocab ? begin + STRETCH : vocab;
        Vec total = zero();
        for (int64_t at = begin; at < end; at += LANES) {
            const Vec weight = exp(sixteen(logits, at, vocab) / by - top);
            store(weights + at, weight);
            total = total + weight;
        }
        sums[begin / STRETCH] = sum(total);
    }
}

// Tokens of at least this weight, in order, and how many they are.
int64_t heavy(const float* weights, int64_t vocab, float least, Candidate* found) {
    int64_t count = 0;
    for (int64_t at = 0; at < vocab; at += LANES)
        for (uint32_t which = at_least(load(weights + at), all(least)); which; which &= which - 1) {
            const int64_t token = at + __builtin_ctz(which);
            found[count++] = {weights[token], int32_t(token)};
        }
    return count;
}

}  // namespace
}  // namespace headrace
