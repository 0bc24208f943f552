// The threads of a step: those of torch's own OpenMP runtime where it can be reached, so that two
// pools never spin against each other for the same cores; else threads of their own.

#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <ctime>
#include <thread>
#include <vector>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
static inline void relax() { _mm_pause(); }
#else
static inline void relax() {}
#endif

// Entry points of GNU OpenMP, found by Python in the library that torch has loaded.
struct OpenMP {
    void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
    int (*thread)() = nullptr;
    int (*threads)() = nullptr;
};

// Where threads meet, and what they share between two meetings.
class Barrier {
   public:
    void wait(int64_t count) {
        if (count == 1) return;
        const uint32_t turn = turn_.load(std::memory_order_acquire);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count) {
            arrived_.store(0, std::memory_order_relaxed);
            taken_.store(0, std::memory_order_relaxed);
            turn_.store(turn + 1, std::memory_order_release);
            return;
        }
        // Phases are microseconds apart, far less than a wake-up costs; who waits much longer has
        // lost its partner's core to another process, and gives way.
        for (int64_t spins = 0; turn_.load(std::memory_order_acquire) == turn; ++spins) {
            relax();
            if (spins > 4096) std::this_thread::yield();
        }
    }

    // Takes n parts more of what is shared; gives how many were taken before.
    int64_t take(int64_t n) { return taken_.fetch_add(n, std::memory_order_relaxed); }

   private:
    alignas(64) std::atomic<int64_t> arrived_{0};
    alignas(64) std::atomic<int64_t> taken_{0};
    alignas(64) std::atomic<uint32_t> turn_{0};
};

// One of `count` threads that compute a step together.
struct Worker {
    int64_t index, count;
    Barrier* barrier;

    void wait() const { barrier->wait(count); }

    // This thread's even part of 0 .. n: from begin to end.
    int64_t begin(int64_t n) const { return n * index / count; }
    int64_t end(int64_t n) const { return n * (index + 1) / count; }

    // Calls part(begin, end) until all of 0 .. n is done, once between two meetings: three quarters of an
    // even part at once, then, as threads are done with theirs, bits of the rest. Cores are not equally
    // fast, of a laptop by design and elsewhere for what else they have to do; the slowest of even parts
    // would hold up all others.
    // Where `finely`, bits are single ones, each of which takes far longer than taking it.
    template <class Part>
    void share(int64_t n, const Part& part, bool finely = false) const {
        if (count == 1) return part(0, n);  // who meets nobody counts nothing
        const int64_t own = n / count * 3 / 4, rest = own * count;
        if (own) part(own * index, own * (index + 1));
        const int64_t bit = finely ? 1 : (n - rest) / (2 * count) + 1;
        for (int64_t at = rest + barrier->take(bit); at < n; at = rest + barrier->take(bit)) {
            part(at, at + bit < n ? at + bit : n);
        }
    }
};

inline int64_t wall_ns() {
    return std::chrono::nanoseconds(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// What a thread has spent on a core: ns, or -1 where the system doesn't say.
inline int64_t cpu_ns() {
#if defined(CLOCK_THREAD_CPUTIME_ID)
    timespec time;
    if (!clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time)) return int64_t(time.tv_sec) * 1000000000 + time.tv_nsec;
#endif
    return -1;
}
