#include "pool.h"

#include <algorithm>
#include <chrono>

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif

namespace headrace {
namespace {

constexpr uint64_t FIELD = (1u << 22) - 1;  // chunks and next; the phase has the upper 20 bits
constexpr int64_t SPIN_NS = 50'000;
constexpr int64_t LINE = 64, PIECE = 1024;  // bytes that are fetched between two looks
constexpr int64_t MOST_AHEAD = 256 << 10;   // bytes for each thread: a part of the cache that it has to itself

uint64_t phase_of(uint64_t ticket) { return ticket >> 44; }
int32_t chunks_of(uint64_t ticket) { return int32_t(ticket >> 22 & FIELD); }
int32_t next_of(uint64_t ticket) { return int32_t(ticket & FIELD); }

int64_t now_ns() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

void pin([[maybe_unused]] std::thread& thread, [[maybe_unused]] int core) {
#if defined(__linux__)
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(core, &set);
    pthread_setaffinity_np(thread.native_handle(), sizeof set, &set);  // a wish: without it the thread runs anywhere
#endif
}

}  // namespace

Pool::Pool(int threads, const int32_t* cores) : threads_(threads) {
    for (int worker = 1; worker < threads; worker++) {
        others_.emplace_back([this, worker] { serve(worker); });
        if (cores) pin(others_.back(), cores[worker]);
    }
}

Pool::~Pool() {
    stopping_ = true;
    epoch_++;
    epoch_.notify_all();
    for (auto& thread : others_) thread.join();
}

void Pool::run(const std::vector<Phase>& phases, Work work, void* context, int64_t* spent) {
    phases_ = &phases;
    work_ = work;
    context_ = context;
    spent_ = spent;
    begin_ns_ = now_ns();
    publish(0);
    for (;;) {
        const uint64_t ticket = ticket_.load(std::memory_order_acquire);
        if (phase_of(ticket) == phases.size()) return;
        if (!take(0)) wait(ticket);
    }
}

// Do some chunks if there are any.
bool Pool::take(int worker) {
    uint64_t ticket = ticket_.load(std::memory_order_acquire);
    const int32_t next = next_of(ticket), left = chunks_of(ticket) - next;
    if (left <= 0) return false;
    const int32_t count = std::max(1, left / (2 * threads_));
    if (!ticket_.compare_exchange_weak(ticket, ticket + count, std::memory_order_acq_rel)) return true;  // somebody was faster
    const size_t index = phase_of(ticket);  // stays the current phase until these chunks are done
    const Phase& phase = (*phases_)[index];
    for (int32_t chunk = next; chunk < next + count; chunk++) work_(context_, phase, chunk, worker);
    if (done_.fetch_add(count, std::memory_order_acq_rel) + count == phase.chunks) {
        const int64_t end_ns = now_ns();
        spent_[phase.kind] += end_ns - begin_ns_;
        begin_ns_ = end_ns;
        publish(index + 1);
    }
    return true;
}

void Pool::publish(size_t phase) {
    done_.store(0, std::memory_order_relaxed);
    const bool more = phase < phases_->size();
    ahead_.store(more ? (*phases_)[phase].ahead : nullptr, std::memory_order_relaxed);
    ahead_bytes_.store(more ? std::min((*phases_)[phase].ahead_bytes, threads_ * MOST_AHEAD) : 0, std::memory_order_relaxed);
    fetched_.store(0, std::memory_order_relaxed);
    const uint64_t chunks = more ? uint64_t((*phases_)[phase].chunks) : 0;
    ticket_.store(uint64_t(phase) << 44 | chunks << 22, std::memory_order_seq_cst);
    epoch_.fetch_add(1, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst)) epoch_.notify_all();
}

// Fetch a piece of what the next phase reads, if there is any left. Phases may change meanwhile: then it is a piece of
// something else, or of nothing, which a fetch ignores.
bool Pool::fetch() {
    const int64_t begin = fetched_.fetch_add(PIECE, std::memory_order_relaxed);
    const int64_t end = std::min(begin + PIECE, ahead_bytes_.load(std::memory_order_relaxed));
    const uint8_t* ahead = ahead_.load(std::memory_order_relaxed);
    for (int64_t at = begin; at < end; at += LINE) __builtin_prefetch(ahead + at);
    return begin < end;
}

// Until there is another ticket than this one.
void Pool::wait(uint64_t ticket) {
    while (ticket_.load(std::memory_order_acquire) == ticket && fetch()) {}
    const int64_t until = now_ns() + SPIN_NS;
    do {
        for (int i = 0; i < 32; i++) {
            const uint64_t seen = ticket_.load(std::memory_order_acquire);
            if (seen != ticket || stopping_) return;
            pause();
        }
    } while (now_ns() < until);
    sleepers_.fetch_add(1, std::memory_order_seq_cst);
    const uint32_t epoch = epoch_.load(std::memory_order_seq_cst);
    if (ticket_.load(std::memory_order_seq_cst) == ticket && !stopping_) epoch_.wait(epoch);
    sleepers_.fetch_sub(1);
}

void Pool::serve(int worker) {
    while (!stopping_) {
        const uint64_t ticket = ticket_.load(std::memory_order_acquire);
        if (!take(worker)) wait(ticket);
    }
}

}  // namespace headrace
