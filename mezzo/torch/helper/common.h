// What the sources of the helper share: types, bits of numbers, and threads. Each source has its own copy of all but the
// two variables about torch's threads, which rounding.cpp holds.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <system_error>
#include <thread>
#include <unistd.h>
#include <vector>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#if defined(__clang__)
#define EACH _Pragma("clang loop vectorize(assume_safety)")
#else
#define EACH _Pragma("GCC ivdep")  // x and out may be the same array; element i depends on element i only
#endif
#define INLINE static inline __attribute__((always_inline))

using i32 = std::int32_t;
using i64 = std::int64_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;
using u16 = std::uint16_t;

// torch's own threads, borrowed through the OpenMP runtime that torch has loaded: those still wait, spinning, for more
// work when an operation of torch has ended, and threads of ours would have to fight them for the cores. After a fork
// they are gone, so a child starts threads of its own.
using ParallelFunction = void (*)(void (*)(void*), void*, unsigned, unsigned);
#define HIDDEN __attribute__((visibility("hidden")))  // no other library sees it, or puts its own in its place
extern HIDDEN std::atomic<ParallelFunction> torch_parallel;
extern HIDDEN std::atomic<i64> torch_process;

namespace {

constexpr i64 GRAIN = 524288;         // numbers that a thread takes at a time, or fewer, so that each takes a few times
constexpr i64 THREADED = 262144;      // below this one thread is faster
constexpr u32 SIGN = 0x80000000u, MAGNITUDE = 0x7fffffffu, INFINITE = 0x7f800000u;

enum Type : i32 { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

INLINE u32 to_bits(float x) { u32 b; std::memcpy(&b, &x, 4); return b; }
INLINE float to_float(u32 b) { float x; std::memcpy(&x, &b, 4); return x; }

// Bits of magnitudes are in the order of the magnitudes, infinities and NaN above all: amax is a maximum of integers.
INLINE i32 magnitude(float x) { return static_cast<i32>(to_bits(x) & MAGNITUDE); }

// Sixteen-bit types come by integers and one exact product.
inline void widen_run(const u16* x, i32 type, int n, float* to) {
    if (type == BFLOAT16) {
        for (int i = 0; i < n; i++) to[i] = to_float(static_cast<u32>(x[i]) << 16);
        return;
    }
    for (int i = 0; i < n; i++) {
        const u32 a = (x[i] & 0x7fffu) << 13;
        const u32 r = to_bits(to_float(a) * 0x1p112f) | (a >= 0x0f800000u ? INFINITE : 0u);
        to[i] = to_float(r | (static_cast<u32>(x[i] & 0x8000u) << 16));
    }
}

// ------------------------------------------------------------------------------------------------------------- threads

// Subnormal numbers count, and rounding is to nearest, whatever the calling thread has set.
class Floats {
#if defined(__SSE2__)
    unsigned saved_ = _mm_getcsr();
  public:
    Floats() { _mm_setcsr(0x1f80); }
    ~Floats() { _mm_sfence(); _mm_setcsr(saved_); }
#elif defined(__aarch64__)
    u64 saved_;
  public:
    Floats() { u64 zero = 0; __asm__ volatile("mrs %0, fpcr\n\tmsr fpcr, %1" : "=&r"(saved_) : "r"(zero) : "memory"); }
    ~Floats() { __asm__ volatile("msr fpcr, %0" : : "r"(saved_) : "memory"); }
#else
  public:
    Floats() {}
    ~Floats() {}
#endif
    Floats(const Floats&) = delete;
    Floats& operator=(const Floats&) = delete;
};

template <class Body>
struct Shared {
    const Body& body;
    i64 tasks, grain;
    bool backwards;
    std::atomic<i64> next{0};

    static __attribute__((noinline)) void work(void* pointer) {
        Shared& shared = *static_cast<Shared*>(pointer);
        const Floats floats;
        for (;;) {
            const i64 begin = shared.next.fetch_add(shared.grain, std::memory_order_relaxed);
            if (begin >= shared.tasks) return;
            const i64 end = std::min(begin + shared.grain, shared.tasks);
            if (shared.backwards) shared.body(shared.tasks - end, shared.tasks - begin);
            else shared.body(begin, end);
        }
    }
};

// body(begin, end) over 0 … tasks - 1, of `size` numbers each, for a job that says `count` and `threads`. A second pass
// goes backwards: it begins with what the first one has just left in the cache.
template <class AnyJob, class Body>
void parallel(const AnyJob& job, i64 tasks, i64 size, bool backwards, const Body& body) {
    const i64 grain = std::min(GRAIN, job.count / (4 * std::max(1, job.threads)));
    Shared<Body> shared{body, tasks, std::max<i64>(1, grain / std::max<i64>(1, size)), backwards};
    const i64 pieces = (tasks + shared.grain - 1) / shared.grain;
    const i64 threads = job.count < THREADED ? 1 : std::min<i64>(job.threads, pieces);
    if (threads > 1) {
        const ParallelFunction borrowed = torch_parallel.load();
        if (borrowed && torch_process.load() == getpid()) {
            borrowed(&Shared<Body>::work, &shared, static_cast<unsigned>(threads), 0);
            return;
        }
        std::vector<std::thread> others;
        try {
            for (i64 i = 1; i < threads; i++) others.emplace_back(&Shared<Body>::work, &shared);
        } catch (const std::system_error&) {
            // No more threads to be had: those that there are do the work.
        }
        Shared<Body>::work(&shared);
        for (std::thread& thread : others) thread.join();
        return;
    }
    Shared<Body>::work(&shared);
}

}  // namespace
