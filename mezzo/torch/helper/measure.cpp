// What a rounding lost: counts, sums of squares and a histogram of exponents, in one pass over the numbers before it and
// after it.
//
//   memory ──► a run of at most RUN numbers as float32 ──► counts and exponents ──► squares in double ──► histogram
//
// Squares are added in 16 lanes within a chunk, and the chunks in their order: the result does not depend on the number
// of threads, nor on the instructions that the processor has.

#include "common.h"

#include <iterator>
#include <mutex>

extern "C" {

// `_Job` of measure.py says the same, field by field.
struct MeasureJob {
    const void* x;    // before
    const void* y;    // after
    i64 count;
    i32 x_type, y_type;
    i32 threads;
    float over;       // the largest magnitude that the rounding does not cut
    double* sums;     // count, zeros, nonfinite, underflow, overflow, amax, signal, noise
    i64* histogram;   // of 256 bins
};

}  // extern "C"

namespace {

constexpr int RUN = 512;       // numbers that are worked on at a time, in a core's L1
constexpr i64 CHUNK = 16384;   // numbers whose squares make one partial sum: whole runs
constexpr int LANES = 16;      // divides RUN
constexpr int PARTS = 8;       // histograms that neighbours go to, so that none waits for the other's count
constexpr int BINS = 256;
constexpr i32 ENDLESS = static_cast<i32>(INFINITE);

using u8 = std::uint8_t;
using Floats4 = float __attribute__((vector_size(16)));
using Doubles4 = double __attribute__((vector_size(32)));

struct Found {
    i64 zeros = 0, underflow = 0, overflow = 0;
    i32 amax = 0;

    void add(const Found& other) {
        zeros += other.zeros, underflow += other.underflow, overflow += other.overflow;
        amax = std::max(amax, other.amax);
    }
};

// The counts of a run, and its exponents; returns whether all is finite.
bool look(const float* x, const float* y, int n, i32 over, Found& found, u8* exponents) {
    i32 zeros = 0, underflow = 0, overflow = 0, amax = 0, most = 0;
    for (int i = 0; i < n; i++) {
        const i32 a = magnitude(x[i]), b = magnitude(y[i]);
        const i32 finite = a < ENDLESS ? 1 : 0, zero = a == 0 ? 1 : 0, gone = b == 0 ? 1 : 0;
        const i32 cut = a > over ? 1 : 0, endless = b >= ENDLESS ? 1 : 0;
        zeros += zero;
        underflow += finite & gone & ~zero;
        overflow += finite & (cut | endless);
        amax = std::max(amax, finite ? a : 0);
        most = std::max(most, std::max(a, b));
        exponents[i] = static_cast<u8>(a >> 23);
    }
    found.add({zeros, underflow, overflow, amax});
    return most < ENDLESS;
}

// Zeros in place of both numbers where one of them is not finite.
void clean(const float* x, const float* y, int n, float* to_x, float* to_y) {
    EACH for (int i = 0; i < n; i++) {
        const bool finite = std::max(magnitude(x[i]), magnitude(y[i])) < ENDLESS;
        const float a = finite ? x[i] : 0.0f, b = finite ? y[i] : 0.0f;
        to_x[i] = a, to_y[i] = b;
    }
}

struct Squares {
    Doubles4 signal[LANES / 4] = {}, noise[LANES / 4] = {};

    // n is a multiple of LANES.
    void add(const float* x, const float* y, int n) {
        Doubles4 s[LANES / 4], e[LANES / 4];
        for (int k = 0; k < LANES / 4; k++) s[k] = signal[k], e[k] = noise[k];
        for (int i = 0; i < n; i += LANES) {
            for (int k = 0; k < LANES / 4; k++) {
                Floats4 p, q;
                std::memcpy(&p, x + i + 4 * k, sizeof(p));
                std::memcpy(&q, y + i + 4 * k, sizeof(q));
                const Doubles4 a = __builtin_convertvector(p, Doubles4);
                const Doubles4 d = a - __builtin_convertvector(q, Doubles4);
                s[k] += a * a;
                e[k] += d * d;
            }
        }
        for (int k = 0; k < LANES / 4; k++) signal[k] = s[k], noise[k] = e[k];
    }

    static double total(const Doubles4* v) {
        const Doubles4 all = (v[0] + v[1]) + (v[2] + v[3]);
        return (all[0] + all[1]) + (all[2] + all[3]);
    }
};

struct Buffers {
    float x[RUN], y[RUN];
    alignas(8) u8 exponents[RUN];
    u32 bins[PARTS][BINS] = {};

    void count(int n) {
        int i = 0;
        for (; i + 8 <= n; i += 8) {
            u64 eight;
            std::memcpy(&eight, exponents + i, 8);
            for (int k = 0; k < 8; k++) bins[k % PARTS][eight >> (8 * k) & 0xff]++;
        }
        for (; i < n; i++) bins[0][exponents[i]]++;
    }
};

const float* read(const void* x, i32 type, i64 begin, int n, float* buffer) {
    if (type == FLOAT32) return static_cast<const float*>(x) + begin;
    widen_run(static_cast<const u16*>(x) + begin, type, n, buffer);
    return buffer;
}

// A copy that zeros fill up to whole lanes.
const float* filled(const float* x, int n, float* buffer) {
    if (x != buffer) std::memcpy(buffer, x, sizeof(float) * static_cast<size_t>(n));
    for (int i = n; i % LANES; i++) buffer[i] = 0.0f;
    return buffer;
}

void measure_run(const MeasureJob& job, i64 begin, int n, Buffers& buffers, Found& found, Squares& squares) {
    const float* x = read(job.x, job.x_type, begin, n, buffers.x);
    const float* y = read(job.y, job.y_type, begin, n, buffers.y);
    if (!look(x, y, n, magnitude(job.over), found, buffers.exponents)) {
        clean(x, y, n, buffers.x, buffers.y);
        x = buffers.x, y = buffers.y;
    }
    if (n % LANES) x = filled(x, n, buffers.x), y = filled(y, n, buffers.y);
    squares.add(x, y, (n + LANES - 1) / LANES * LANES);
    buffers.count(n);
}

}  // namespace

extern "C" void mezzo_measure(const MeasureJob* pointer) {
    const MeasureJob& job = *pointer;
    const i64 chunks = (job.count + CHUNK - 1) / CHUNK;
    std::vector<double> signal(static_cast<size_t>(chunks)), noise(static_cast<size_t>(chunks));
    std::fill_n(job.histogram, BINS, 0);
    std::mutex mutex;
    Found all;
    parallel(job, chunks, CHUNK, false, [&](i64 first, i64 last) {
        Buffers buffers;
        Found found;
        for (i64 chunk = first; chunk < last; chunk++) {
            Squares squares;
            const i64 end = std::min((chunk + 1) * CHUNK, job.count);
            for (i64 i = chunk * CHUNK; i < end; i += RUN)
                measure_run(job, i, static_cast<int>(std::min<i64>(RUN, end - i)), buffers, found, squares);
            signal[static_cast<size_t>(chunk)] = Squares::total(squares.signal);
            noise[static_cast<size_t>(chunk)] = Squares::total(squares.noise);
        }
        const std::lock_guard<std::mutex> lock(mutex);
        all.add(found);
        for (int i = 0; i < BINS; i++)
            for (int k = 0; k < PARTS; k++) job.histogram[i] += buffers.bins[k][i];
    });
    const Floats floats;
    double power = 0.0, error = 0.0;
    for (const double part : signal) power += part;
    for (const double part : noise) error += part;
    const i64 nonfinite = job.histogram[BINS - 1];  // the exponent that infinities and NaN have
    job.histogram[BINS - 1] = 0;
    const double sums[] = {
        static_cast<double>(job.count), static_cast<double>(all.zeros), static_cast<double>(nonfinite),
        static_cast<double>(all.underflow), static_cast<double>(all.overflow),
        to_float(static_cast<u32>(all.amax)), power, error,
    };
    std::copy(std::begin(sums), std::end(sums), job.sums);
}
