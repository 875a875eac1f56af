// From the rows of a file to panels (layout.h). A block of a GGUF file keeps its integers and its half scales: nothing is
// rounded a second time, but where floats are quantised here because the file has a format that no panel has.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <thread>
#include <vector>

#include "layout.h"

namespace headrace {
namespace {

// Numbers of the types in a GGUF file.
enum Source : int32_t { FLOATS = 0, Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q8_0 = 8 };

struct Group {  // 32 weights of one output: scale * byte + minimum
    uint16_t scale = 0, minimum = 0;
    uint8_t bytes[GROUP] = {};
};

uint16_t to_half(float x) {  // to nearest, ties to even; too large becomes infinite
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
    const float size = std::fabs(x);
    if (!(size < 65520.0f)) return uint16_t(sign | (size == size ? 0x7c00 : 0x7e00));
    if (size < 0x1p-14f) return uint16_t(sign | int32_t(std::nearbyint(size * 0x1p24f)));
    bits &= 0x7fffffff;
    return uint16_t(sign | ((bits + 0xfff + (bits >> 13 & 1) - (112u << 23)) >> 13));
}

float of_half(uint16_t half) {
    const int32_t exponent = half >> 10 & 31, fraction = half & 1023;
    const float size = exponent ? std::ldexp(float(1024 + fraction), exponent - 25) : std::ldexp(float(fraction), -24);
    return half & 0x8000 ? -size : size;
}

uint16_t half_at(const uint8_t* p) {
    uint16_t half;
    std::memcpy(&half, p, 2);
    return half;
}

void nibbles(const uint8_t* p, uint8_t* bytes) {
    for (int i = 0; i < 16; i++) bytes[i] = p[i] & 15, bytes[i + 16] = p[i] >> 4;
}

Group quantised(Format format, const float* x, int64_t count) {
    Group group;
    float low = 0, high = 0;
    for (int64_t i = 0; i < count; i++) low = std::min(low, x[i]), high = std::max(high, x[i]);
    if (format == Q4) group.minimum = to_half(low);
    const float base = format == Q4 ? of_half(group.minimum) : 0.0f;
    group.scale = to_half(format == Q4 ? (high - base) / 15 : std::max(high, -low) / 127);
    const float scale = of_half(group.scale);
    for (int64_t i = 0; i < GROUP; i++) {
        const float q = i < count && scale > 0 ? std::nearbyint((x[i] - base) / scale) : 0.0f;
        group.bytes[i] = uint8_t(format == Q4 ? std::clamp(q, 0.0f, 15.0f) : std::clamp(q, -127.0f, 127.0f) + 128);
    }
    return group;
}

int64_t block_bytes(Source source) {
    switch (source) {
        case Q4_0: return 18;
        case Q4_1: return 20;
        case Q5_0: return 22;
        case Q8_0: return 34;
        default: return GROUP * 4;
    }
}

// Group `g` of one row; `row` points to the row's blocks.
Group group_of(Format format, Source source, const uint8_t* row, int64_t g, int64_t inputs) {
    const uint8_t* block = row + g * block_bytes(source);
    if (source == FLOATS) return quantised(format, (const float*)block, std::min<int64_t>(GROUP, inputs - g * GROUP));
    Group group;
    group.scale = half_at(block);
    if (source == Q8_0) {
        for (int i = 0; i < GROUP; i++) group.bytes[i] = uint8_t(block[2 + i] ^ 0x80);
    } else if (source == Q5_0) {
        uint32_t fifth;
        std::memcpy(&fifth, block + 2, 4);
        nibbles(block + 6, group.bytes);
        for (int i = 0; i < GROUP; i++) group.bytes[i] = uint8_t((group.bytes[i] | (fifth >> i & 1) << 4) - 16 + 128);
    } else {
        nibbles(block + (source == Q4_1 ? 4 : 2), group.bytes);
        group.minimum = source == Q4_1 ? half_at(block + 2) : to_half(-8 * of_half(group.scale));
    }
    return group;
}

void put(Format format, const Group& group, int64_t j, uint8_t* to) {
    std::memcpy(to + 2 * j, &group.scale, 2);
    if (format == Q8) {
        for (int i = 0; i < GROUP; i++) to[PANEL * 2 + i / 4 * PANEL * 4 + j * 4 + i % 4] = group.bytes[i];
        return;
    }
    std::memcpy(to + PANEL * 2 + 2 * j, &group.minimum, 2);
    for (int i = 0; i < GROUP; i++)
        to[PANEL * 4 + i / 4 * PANEL * 2 + j % LANES * 4 + i % 4] |= uint8_t(group.bytes[i] << (j < LANES ? 0 : 4));
}

uint16_t to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

void one_panel(Format format, Source source, const uint8_t* rows, int64_t row_bytes, int64_t outputs, int64_t inputs, uint8_t* to) {
    std::memset(to, 0, size_t(panel_bytes(format, inputs)));
    for (int64_t j = 0; j < std::min<int64_t>(outputs, PANEL); j++) {
        const uint8_t* row = rows + j * row_bytes;
        const float* floats = (const float*)row;
        if (format == FP32) {
            for (int64_t i = 0; i < inputs; i++) ((float*)to)[i * PANEL + j] = floats[i];
        } else if (format == BF16) {
            for (int64_t i = 0; i < inputs; i++) ((uint16_t*)to)[i * PANEL + j] = to_bf16(floats[i]);
        } else {
            const int64_t bytes = panel_bytes(format, GROUP);
            for (int64_t g = 0; g < ceil_div(inputs, GROUP); g++) put(format, group_of(format, source, row, g, inputs), j, to + g * bytes);
        }
    }
}

}  // namespace
}  // namespace headrace

extern "C" {
#pragma GCC visibility push(default)

int64_t headrace_packed_bytes(int32_t format, int64_t outputs, int64_t inputs) {
    return headrace::panel_bytes(format, inputs) * headrace::ceil_div(outputs, headrace::PANEL);
}

// rows: [outputs] rows of `row_bytes` in the format `source`. Blocks of the file go into panels of one format each: Q4_0
// and Q4_1 into Q4, Q5_0 and Q8_0 into Q8; floats into any.
void headrace_pack(int32_t format, int32_t source, const uint8_t* rows, int64_t row_bytes, int64_t outputs, int64_t inputs,
                   uint8_t* panels, int32_t threads) {
    using namespace headrace;
    const int64_t count = ceil_div(outputs, PANEL);
    auto some = [&](int64_t first) {
        for (int64_t p = first; p < count; p += threads)
            one_panel(Format(format), Source(source), rows + p * PANEL * row_bytes, row_bytes, outputs - p * PANEL, inputs,
                      panels + p * panel_bytes(format, inputs));
    };
    std::vector<std::thread> others;
    for (int32_t t = 1; t < threads; t++) others.emplace_back(some, t);
    some(0);
    for (auto& thread : others) thread.join();
}
}
