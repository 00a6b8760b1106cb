// What a rounding lost: counts, sums of squares and a histogram of exponents, in one pass over the numbers before it and
// after it.
//
//   memory ──► a run of at most RUN numbers as float32 ──► counts and exponents ──► squares in double ──► histogram
//
// Squares are added in 16 lanes within a chunk, and the chunks in their order: the result does not depend on the number
// of threads, nor on the instructions that the processor has.
//
// And the same for each block of a scaled format: its largest magnitude, its sums of squares, and whether it lost a value.
// A block is the work of one thread.
//
//   blocks of one row         numbers ──► 16 lanes ──► the block
//   blocks of several rows    a row of numbers after the other ──► sums of each column, in L1 ──► the block

#include "common.h"

#include <iterator>
#include <mutex>

using u8 = std::uint8_t;

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

// `_BlocksJob` of measure.py says the same, field by field.
struct MeasureBlocksJob {
    const void* x;    // before
    const void* y;    // after
    i64 count;
    i32 x_type, y_type;
    i32 threads;
    i32 upright;      // whether blocks follow each other in the results down the columns, not along the rows
    i64 outer, inner, height, width, stride, tall, wide;  // as in `Job` of rounding.cpp
    float* amax;      // of each block, as are the others; the blocks of a matrix (o, i) after those of the one before
    double* signal;
    double* noise;
    u8* lossy;
};

}  // extern "C"

namespace {

constexpr int RUN = 512;       // numbers that are worked on at a time, in a core's L1
constexpr i64 CHUNK = 16384;   // numbers whose squares make one partial sum: whole runs
constexpr int LANES = 16;      // divides RUN
constexpr int PARTS = 8;       // histograms that neighbours go to, so that none waits for the other's count
constexpr int BINS = 256;
constexpr i32 ENDLESS = static_cast<i32>(INFINITE);

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

// -------------------------------------------------------------------------------------------------------------- blocks

// What is known of a block, or of a part of it.
struct Part {
    i32 amax = 0, lossy = 0;
    double signal = 0.0, noise = 0.0;

    void add(const Part& other) {
        amax = std::max(amax, other.amax), lossy |= other.lossy;
        signal += other.signal, noise += other.noise;
    }
};

INLINE void peaks(const float* x, const float* y, int n, Part& part) {
    i32 amax = 0, lossy = 0;
    for (int i = 0; i < n; i++) {
        const i32 a = magnitude(x[i]), b = magnitude(y[i]);
        amax = std::max(amax, a);
        lossy |= a != 0 && b == 0 ? 1 : 0;
    }
    part.amax = std::max(part.amax, amax), part.lossy |= lossy;
}

INLINE Part span(const float* x, const float* y, int n) {
    Part part;
    Squares squares;
    const int whole = n / LANES * LANES;
    peaks(x, y, whole, part);
    squares.add(x, y, whole);
    if (whole < n) {
        float last_x[LANES] = {}, last_y[LANES] = {};
        std::copy_n(x + whole, n - whole, last_x);
        std::copy_n(y + whole, n - whole, last_y);
        peaks(last_x, last_y, LANES, part);
        squares.add(last_x, last_y, LANES);
    }
    part.signal = Squares::total(squares.signal), part.noise = Squares::total(squares.noise);
    return part;
}

// The same for each column of some rows.
struct Columns {
    i32 amax[RUN], lossy[RUN];
    double signal[RUN], noise[RUN];

    void clear(int n) {
        std::fill_n(amax, n, 0), std::fill_n(lossy, n, 0);
        std::fill_n(signal, n, 0.0), std::fill_n(noise, n, 0.0);
    }

    void add(const float* x, const float* y, int n) {
        EACH for (int i = 0; i < n; i++) {
            const i32 a = magnitude(x[i]), b = magnitude(y[i]);
            amax[i] = std::max(amax[i], a);
            lossy[i] |= a != 0 && b == 0 ? 1 : 0;
        }
        EACH for (int i = 0; i < n; i++) {
            const double a = x[i], d = a - static_cast<double>(y[i]);
            signal[i] += a * a;
            noise[i] += d * d;
        }
    }

    Part part(int begin, int n) const {
        Part sum;
        for (int i = begin; i < begin + n; i++) sum.add({amax[i], lossy[i], signal[i], noise[i]});
        return sum;
    }
};

struct MeasureBlocks {
    const MeasureBlocksJob& job;
    i64 block_rows, block_columns;  // of one matrix

    explicit MeasureBlocks(const MeasureBlocksJob& j)
        : job(j), block_rows((j.height + j.tall - 1) / j.tall), block_columns((j.width + j.wide - 1) / j.wide) {}

    // The buffers of one thread.
    struct Numbers {
        float x[RUN], y[RUN];
        Columns columns;
    };

    void write(i64 matrix, i64 block_row, i64 block_column, const Part& part) const {
        const i64 at = job.upright ? block_column * block_rows + block_row : block_row * block_columns + block_column;
        const i64 i = matrix * block_rows * block_columns + at;
        job.amax[i] = to_float(static_cast<u32>(part.amax));
        job.signal[i] = part.signal, job.noise[i] = part.noise;
        job.lossy[i] = static_cast<u8>(part.lossy);
    }

    // Columns column … column + n - 1 of one row of blocks: whole blocks but for the last, or one that is wider than RUN.
    void strip(Numbers& numbers, i64 matrix, i64 block_row, i64 column, i64 n) const {
        const i64 row = block_row * job.tall, rows = std::min(job.tall, job.height - row);
        const i64 start = (matrix / job.inner * job.height + row) * job.stride + matrix % job.inner * job.width + column;
        Part whole;
        for (i64 from = 0; from < n; from += RUN) {
            const int here = static_cast<int>(std::min<i64>(RUN, n - from));
            const int wide = static_cast<int>(std::min<i64>(job.wide, here));
            if (rows > 1) numbers.columns.clear(here);
            for (i64 r = 0; r < rows; r++) {
                const i64 begin = start + r * job.stride + from;
                const float* x = read(job.x, job.x_type, begin, here, numbers.x);
                const float* y = read(job.y, job.y_type, begin, here, numbers.y);
                if (rows > 1) numbers.columns.add(x, y, here);
                else if (job.wide > RUN) whole.add(span(x, y, here));
                else spans(x, y, here, wide, matrix, block_row, column / job.wide);
            }
            if (rows == 1) continue;
            if (job.wide > RUN) {
                whole.add(numbers.columns.part(0, here));
                continue;
            }
            i64 block = column / job.wide;
            for (int i = 0; i < here; i += wide, block++)
                write(matrix, block_row, block, numbers.columns.part(i, std::min(wide, here - i)));
        }
        if (job.wide > RUN) write(matrix, block_row, column / job.wide, whole);
    }

    void spans(const float* x, const float* y, int n, int wide, i64 matrix, i64 block_row, i64 block) const {
        int i = 0;
        if (wide == 16) {  // a fixed width, whose loops are unrolled
            for (; i + 16 <= n; i += 16, block++) write(matrix, block_row, block, span(x + i, y + i, 16));
        } else if (wide == 32) {
            for (; i + 32 <= n; i += 32, block++) write(matrix, block_row, block, span(x + i, y + i, 32));
        }
        for (; i < n; i += wide, block++) write(matrix, block_row, block, span(x + i, y + i, std::min(wide, n - i)));
    }

    // Whole blocks that fit a run; fewer where every thread would not get some. No result depends on it.
    i64 strip_width() const {
        const i64 wide = std::min(job.wide, job.width);
        if (wide > RUN) return wide;
        const i64 others = job.outer * job.inner * block_rows;
        const i64 shared = job.width * others / (4 * std::max(1, job.threads));
        return std::max<i64>(1, std::clamp<i64>(shared, 64, RUN) / wide) * wide;
    }

    void all() const {
        const i64 width = strip_width(), strips = (job.width + width - 1) / width;
        const i64 size = std::min(job.tall, job.height) * std::min(width, job.width);
        parallel(job, job.outer * job.inner * block_rows * strips, size, false, [&](i64 first, i64 last) {
            Numbers numbers;
            for (i64 task = first; task < last; task++) {
                const i64 column = task % strips * width, block_row = task / strips % block_rows;
                strip(numbers, task / (strips * block_rows), block_row, column, std::min(width, job.width - column));
            }
        });
    }
};

}  // namespace

extern "C" void mezzo_measure_blocks(const MeasureBlocksJob* job) {
    if (job->count > 0) MeasureBlocks(*job).all();
}

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
