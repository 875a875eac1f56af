// Threads that work through a list of phases together: a phase begins when all chunks of the one before are done.
//
// Chunks are taken from one atomic word, many at a time while many are left and one at a time in the end: so neighbours
// in memory are read in one go, and a core that is slow or busy with somebody else takes fewer.
// Nobody waits for a thread, only for chunks: a thread that sleeps through a phase holds up no one.
//
//   ticket:  | phase | chunks | next |      next < chunks: take some by compare-and-swap, then do them
//                                           the last chunk done: its thread publishes the next phase
//
// A thread that finds no chunk left fetches what the next phase reads, piece by piece, into its cache: memory would lie
// idle otherwise. Waiting threads spin for some tens of microseconds and then sleep, so a neighbour loses little to them.
#pragma once
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace headrace {

struct Phase {
    int32_t kind, layer, chunks;
    const uint8_t* ahead;  // what the next phase reads first, for threads that find nothing to do in this one; or null
    int64_t ahead_bytes;
};

class Pool {
  public:
    // `threads` counts the caller of `run`. `cores`: where each thread but the caller may run, or null.
    Pool(int threads, const int32_t* cores);
    ~Pool();
    Pool(const Pool&) = delete;

    using Work = void (*)(void* context, const Phase& phase, int32_t chunk, int worker);
    // Adds the nanoseconds of every phase to `spent`, indexed by kind. One run at a time.
    void run(const std::vector<Phase>& phases, Work work, void* context, int64_t* spent);
    int threads() const { return threads_; }

  private:
    bool take(int worker);
    bool fetch();
    void publish(size_t phase);
    void wait(uint64_t ticket);
    void serve(int worker);

    const int threads_;
    std::vector<std::thread> others_;
    alignas(64) std::atomic<uint64_t> ticket_{0};
    alignas(64) std::atomic<int32_t> done_{0};
    alignas(64) std::atomic<int64_t> fetched_{0};  // bytes of what lies ahead that somebody has fetched in this phase
    std::atomic<int64_t> ahead_bytes_{0};
    std::atomic<const uint8_t*> ahead_{nullptr};
    alignas(64) std::atomic<uint32_t> epoch_{0};
    std::atomic<int32_t> sleepers_{0};
    std::atomic<bool> stopping_{false};
    const std::vector<Phase>* phases_ = nullptr;
    Work work_ = nullptr;
    void* context_ = nullptr;
    int64_t* spent_ = nullptr;
    int64_t begin_ns_ = 0;
};

}  // namespace headrace
