// Rounding to element and to scaled formats on the CPU, to the bit what mezzo/formats/{rounding,blocks}.py say.
//
//   memory ──► a run of at most RUN numbers as float32 ──► rounded, in the cache ──► memory (past the cache if large)
//
// Plain C ABI, no headers of torch. Only IEEE float32 operations and integers: compile without -ffast-math. The loops
// are written for the compiler to vectorise: straight lines of selects, no branch on the data.

#include "common.h"

namespace {

constexpr int RUN = 512;              // numbers that are worked on at a time: some arrays of it stay in a core's L1
constexpr int WIDE = 1024;            // the same where several rows are: memory streams longer pieces better
constexpr i64 TILE = 16384;           // numbers of a strip of blocks with several rows: 64 KiB, within a core's L2
constexpr i64 LARGE = 65536;          // a few groups above this are worked on one after the other, by all threads
constexpr i64 STREAMED = 8 << 20;     // from here on the result would push all else out of the cache
constexpr float FLOAT32_MAX = 3.40282346638528859812e+38f;

enum Rounding : i32 { NEAREST = 0, TOWARD_ZERO = 1, STOCHASTIC = 2 };
enum Scaling : i32 { POWER = 0, FREE = 1, GIVEN = 2, NVFP4 = 3 };

}  // namespace

extern "C" {

// `_Job` of __init__.py says the same, field by field.
struct Job {
    const void* x;
    void* out;
    i64 count;
    i32 x_type, out_type;
    i32 threads;
    // the element format
    i32 rounding;
    i32 dropped;        // fraction bits of a float32 to drop, for formats with its exponents; -1 for the others
    i32 cap;            // of those: bits of the largest magnitude that stays
    i32 integer;
    i32 mantissa_bits, min_exponent, max_exponent;
    float max, lowest;  // magnitudes of the largest and the lowest value
    float over;         // what a number beyond becomes (integers: their limit)
    float infinite;     // what an infinity becomes
    // random words
    u32 step, site;
    u64 seed;
    // scaled formats: `outer` x `inner` matrices of height x width with rows `stride` apart, in blocks of tall x wide;
    // matrix (o, i) begins at o * height * stride + i * width
    i32 scaling;
    i32 round_up;       // powers of two: 1 for "pow2", 0 for "floor"
    float scale_min, scale_max;
    i64 outer, inner, height, width, stride, tall, wide;
    const float* given; // one scale or one a block, the blocks in the order of the array's axes
    i64 given_count;
};

}  // extern "C"

namespace {

// ---------------------------------------------------------------------------------------------------------- one number

// A format with fewer exponents than float32. Adding and taking away 2**(exponent + 23 - mantissa bits) leaves the
// float32 adder to round |x| at the format's last digit; the exponent is kept at that of the smallest normal or above.
struct Grid {
    u32 low, shift;
    float top;  // beyond every value; larger numbers are brought down to it, so that nothing overflows on the way
    float max, lowest, over, infinite;

    Grid(int mantissa_bits, int min_exponent, int max_exponent, float max, float lowest, float over, float infinite)
        : low(static_cast<u32>(min_exponent + 127) << 23), shift(static_cast<u32>(23 - mantissa_bits) << 23),
          top(to_float(static_cast<u32>(max_exponent + 2 + 127) << 23)), max(max), lowest(lowest), over(over),
          infinite(infinite) {}
    explicit Grid(const Job& j)
        : Grid(j.mantissa_bits, j.min_exponent, j.max_exponent, j.max, j.lowest, j.over, j.infinite) {}
};

const Grid E4M3(3, -6, 8, 448.0f, 448.0f, 448.0f, 448.0f);

// NaN stays NaN only where KEEP says so: elsewhere the scale of a group with a NaN is NaN, and the product with it.
template <int R, bool INTEGER, bool KEEP>
INLINE float round_one(float x, u32 word, const Grid& g) {
    const u32 bits = to_bits(x), sign = bits & SIGN;
    const float a = to_float(bits & MAGNITUDE);
    const float b = a < g.top ? a : g.top;
    const u32 exponent = to_bits(b) & INFINITE;
    const u32 c_bits = (exponent > g.low ? exponent : g.low) + g.shift;
    const float c = to_float(c_bits);
    float y = (b + c) - c;
    if (R != NEAREST) {
        const float gap = c * 0x1p-23f;
        y = y > b ? y - gap : y;
        if (R == STOCHASTIC) {
            // floor(fraction * 2**32) in two halves, since there is no conversion to unsigned: c * 2**-23 is the gap,
            // so 2**39 / c = 2**16 / gap.
            const float upper = (b - y) * to_float((254u + 39u) * 0x800000u - c_bits);
            const i32 high = static_cast<i32>(upper);
            const i32 low = static_cast<i32>((upper - static_cast<float>(high)) * 65536.0f);
            const u32 threshold = (static_cast<u32>(high) << 16) | static_cast<u32>(low);
            y += word < threshold ? gap : 0.0f;
        }
    }
    const float limit = INTEGER ? (sign ? g.lowest : g.max) : g.max;
    float over = INTEGER ? limit : g.over;
    if (R == TOWARD_ZERO && !INTEGER) over = a == to_float(INFINITE) ? g.infinite : limit;
    y = y > limit ? over : y;
    float result = to_float(to_bits(y) | sign);
    if (INTEGER) result = result + 0.0f;  // -0 + 0 is 0
    return KEEP ? (x == x ? result : x) : result;
}

// A format with float32's exponents: integer arithmetic on the bits, whose carry moves on into the exponent.
template <int R>
INLINE float round_bits(float x, u32 word, u32 dropped, u32 cap) {
    const u32 bits = to_bits(x), a = bits & MAGNITUDE, low = (1u << dropped) - 1;
    u32 r = a & ~low;
    if (R == NEAREST) r = (a + (low >> 1) + ((a >> dropped) & 1)) & ~low;
    if (R == STOCHASTIC) r += word < ((a & low) << (32 - dropped)) ? low + 1 : 0;  // dropped > 0
    r = static_cast<i32>(r) < static_cast<i32>(cap) ? r : cap;
    return to_float(a > INFINITE ? bits : r | (bits & SIGN));
}

// ----------------------------------------------------------------------------------------------------- runs of numbers

// Sixteen-bit types go by integers and one exact product; results are values of the type already.
void narrow_run(const float* x, i32 type, int n, u16* to) {
    if (type == BFLOAT16) {
        for (int i = 0; i < n; i++) {
            const u32 bits = to_bits(x[i]);
            to[i] = static_cast<u16>((bits & MAGNITUDE) > INFINITE ? 0x7fc0u : bits >> 16);
        }
        return;
    }
    for (int i = 0; i < n; i++) {
        const u32 bits = to_bits(x[i]), a = bits & MAGNITUDE;
        const u32 r = to_bits(to_float(a) * 0x1p-112f) >> 13;
        const u32 special = (a >= INFINITE ? 0x7c00u : 0u) | (a > INFINITE ? 0x200u : 0u);
        to[i] = static_cast<u16>((r & 0x7fffu) | special | ((bits & SIGN) >> 16));
    }
}

// Write past the cache: it saves reading the lines that are about to be overwritten.
void stream_run(const float* x, int n, float* to) {
#if defined(__AVX__)
    int i = 0;
    for (; i < n && (reinterpret_cast<std::uintptr_t>(to + i) & 31); i++) to[i] = x[i];
    for (; i + 8 <= n; i += 8) _mm256_stream_ps(to + i, _mm256_loadu_ps(x + i));
    for (; i < n; i++) to[i] = x[i];
#elif defined(__SSE2__)
    int i = 0;
    for (; i < n && (reinterpret_cast<std::uintptr_t>(to + i) & 15); i++) to[i] = x[i];
    for (; i + 4 <= n; i += 4) _mm_stream_ps(to + i, _mm_loadu_ps(x + i));
    for (; i < n; i++) to[i] = x[i];
#else
    std::memcpy(to, x, sizeof(float) * static_cast<size_t>(n));
#endif
}

// Philox4x32-10 at the counters first … first + blocks - 1, rounded up to a multiple of eight: see
// mezzo/formats/philox.py.
void philox_run(u64 first, int blocks, u32 step, u32 site, u64 seed, u32* words) {
    constexpr u32 M0 = 0xD2511F53u, M1 = 0xCD9E8D57u, W0 = 0x9E3779B9u, W1 = 0xBB67AE85u;
    const u32 k0 = static_cast<u32>(seed), k1 = static_cast<u32>(seed >> 32);
#if defined(__AVX2__)
    // 64-bit lanes hold one word each in their lower half; the product ignores what is in the upper one. Two vectors of
    // counters go side by side, so that the products of one wait in the shadow of the other's.
    const __m256i m0 = _mm256_set1_epi64x(M0), m1 = _mm256_set1_epi64x(M1);
    __m256i keys0[10], keys1[10];
    for (u32 r = 0; r < 10; r++) {
        keys0[r] = _mm256_set1_epi64x(k0 + r * W0);
        keys1[r] = _mm256_set1_epi64x(k1 + r * W1);
    }
    for (int b = 0; b < blocks; b += 8, words += 32) {
        __m256i c0[2], c1[2], c2[2], c3[2];
        for (int v = 0; v < 2; v++) {
            c0[v] = _mm256_add_epi64(_mm256_set1_epi64x(static_cast<i64>(first + static_cast<u64>(b + 4 * v))),
                                     _mm256_set_epi64x(3, 2, 1, 0));
            c1[v] = _mm256_srli_epi64(c0[v], 32);
            c2[v] = _mm256_set1_epi64x(step);
            c3[v] = _mm256_set1_epi64x(site);
        }
        for (int r = 0; r < 10; r++) {
            for (int v = 0; v < 2; v++) {
                const __m256i p0 = _mm256_mul_epu32(c0[v], m0), p1 = _mm256_mul_epu32(c2[v], m1);
                c0[v] = _mm256_xor_si256(_mm256_srli_epi64(p1, 32), _mm256_xor_si256(c1[v], keys0[r]));
                c2[v] = _mm256_xor_si256(_mm256_srli_epi64(p0, 32), _mm256_xor_si256(c3[v], keys1[r]));
                c1[v] = p1;
                c3[v] = p0;
            }
        }
        for (int v = 0; v < 2; v++) {
            const __m256i low = _mm256_blend_epi32(c0[v], _mm256_slli_epi64(c1[v], 32), 0xAA);   // words 0, 1 of each
            const __m256i high = _mm256_blend_epi32(c2[v], _mm256_slli_epi64(c3[v], 32), 0xAA);  // words 2, 3
            const __m256i even = _mm256_unpacklo_epi64(low, high), odd = _mm256_unpackhi_epi64(low, high);
            __m256i* to = reinterpret_cast<__m256i*>(words + 16 * v);
            _mm256_storeu_si256(to, _mm256_permute2x128_si256(even, odd, 0x20));
            _mm256_storeu_si256(to + 1, _mm256_permute2x128_si256(even, odd, 0x31));
        }
    }
#else
    for (int b = 0; b < blocks; b++, words += 4) {
        const u64 counter = first + static_cast<u64>(b);
        u32 c0 = static_cast<u32>(counter), c1 = static_cast<u32>(counter >> 32), c2 = step, c3 = site;
        for (u32 r = 0; r < 10; r++) {
            const u64 p0 = static_cast<u64>(M0) * c0, p1 = static_cast<u64>(M1) * c2;
            c0 = static_cast<u32>(p1 >> 32) ^ c1 ^ (k0 + r * W0);
            c2 = static_cast<u32>(p0 >> 32) ^ c3 ^ (k1 + r * W1);
            c1 = static_cast<u32>(p1);
            c3 = static_cast<u32>(p0);
        }
        words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
    }
#endif
}

// The buffers of one thread.
struct Buffers {
    float in[WIDE], out[WIDE];
    u32 words[WIDE + 32];
    i32 amax[WIDE];
    float scale[WIDE], factor[WIDE];
};

// Numbers begin … begin + n - 1 of a job (n <= WIDE): read, their random words, and written again.
struct Run {
    const Job& job;
    Buffers& buffers;
    bool streamed;

    const float* read(i64 begin, int n) const {
        if (job.x_type == FLOAT32) return static_cast<const float*>(job.x) + begin;
        widen_run(static_cast<const u16*>(job.x) + begin, job.x_type, n, buffers.in);
        return buffers.in;
    }
    // Ask for numbers that are read soon, so that memory works while this core computes.
    void expect(i64 begin, int n) const {
        const i64 size = job.x_type == FLOAT32 ? 4 : 2, end = std::min(begin + n, job.count) * size;
        for (i64 at = begin * size; at < end; at += 64) __builtin_prefetch(static_cast<const char*>(job.x) + at, 0, 2);
    }
    const u32* words(i64 begin, int n) const {
        if (job.rounding != STOCHASTIC) return buffers.words;  // never looked at
        const int skipped = static_cast<int>(begin & 3);
        philox_run(static_cast<u64>(begin >> 2), (n + skipped + 3) / 4, job.step, job.site, job.seed, buffers.words);
        return buffers.words + skipped;
    }
    float* target(i64 begin) const {
        const bool direct = job.out_type == FLOAT32 && !streamed;
        return direct ? static_cast<float*>(job.out) + begin : buffers.out;
    }
    void write(i64 begin, int n) const {
        if (job.out_type != FLOAT32) narrow_run(buffers.out, job.out_type, n, static_cast<u16*>(job.out) + begin);
        else if (streamed) stream_run(buffers.out, n, static_cast<float*>(job.out) + begin);
    }
};

bool streams(const Job& job) { return job.out_type == FLOAT32 && job.x != job.out && job.count >= STREAMED; }

// ------------------------------------------------------------------------------------------------------------ elements

template <int R, bool INTEGER>
void grid_run(const float* x, float* out, int n, const u32* words, const Grid& grid) {
    const Grid g = grid;
    EACH for (int i = 0; i < n; i++) out[i] = round_one<R, INTEGER, true>(x[i], R == STOCHASTIC ? words[i] : 0, g);
}

template <int R>
void bits_run(const float* x, float* out, int n, const u32* words, u32 dropped, u32 cap) {
    EACH for (int i = 0; i < n; i++) out[i] = round_bits<R>(x[i], R == STOCHASTIC ? words[i] : 0, dropped, cap);
}

template <int R>
void elements(const Job& job) {
    const Grid grid(job);
    parallel(job, (job.count + RUN - 1) / RUN, RUN, false, [&](i64 first, i64 last) {
        Buffers buffers;
        const Run run{job, buffers, streams(job)};
        for (i64 begin = first * RUN; begin < std::min(last * RUN, job.count); begin += RUN) {
            const int n = static_cast<int>(std::min<i64>(RUN, job.count - begin));
            const float* x = run.read(begin, n);
            float* out = run.target(begin);
            const u32* words = run.words(begin, n);
            if (job.dropped >= 0)
                bits_run<R>(x, out, n, words, static_cast<u32>(job.dropped), static_cast<u32>(job.cap));
            else if (job.integer) grid_run<R, true>(x, out, n, words, grid);
            else grid_run<R, false>(x, out, n, words, grid);
            run.write(begin, n);
        }
    });
}

// -------------------------------------------------------------------------------------------------------------- scales

INLINE i32 amax_span(const float* x, int n) {
    i32 most = 0;
    for (int i = 0; i < n; i++) most = std::max(most, magnitude(x[i]));
    return most;
}

i32 amax_run(const float* x, int n) { return amax_span(x, n); }

// amax of each block of `wide` numbers.
void amax_blocks(const float* x, int n, int wide, i32* amax) {
    int i = 0, b = 0;
#if defined(__AVX2__)
    // Eight blocks at a time: eight lanes of each, and then the eight vectors are transposed and reduced in one.
    const __m256i magnitudes = _mm256_set1_epi32(static_cast<i32>(MAGNITUDE));
    for (; wide % 8 == 0 && i + 8 * wide <= n; i += 8 * wide, b += 8) {
        __m256i most[8];
        for (int k = 0; k < 8; k++) {
            const float* block = x + i + k * wide;
            most[k] = _mm256_and_si256(magnitudes, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(block)));
            for (int j = 8; j < wide; j += 8) {
                const __m256i more = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(block + j));
                most[k] = _mm256_max_epi32(most[k], _mm256_and_si256(magnitudes, more));
            }
        }
        for (int k = 0; k < 8; k += 2)
            most[k / 2] = _mm256_max_epi32(_mm256_unpacklo_epi32(most[k], most[k + 1]),
                                           _mm256_unpackhi_epi32(most[k], most[k + 1]));
        for (int k = 0; k < 4; k += 2)
            most[k / 2] = _mm256_max_epi32(_mm256_unpacklo_epi64(most[k], most[k + 1]),
                                           _mm256_unpackhi_epi64(most[k], most[k + 1]));
        const __m256i all = _mm256_max_epi32(_mm256_permute2x128_si256(most[0], most[1], 0x20),
                                             _mm256_permute2x128_si256(most[0], most[1], 0x31));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(amax + b), all);
    }
#endif
    for (; i < n; i += wide, b++) amax[b] = amax_span(x + i, std::min(wide, n - i));
}

void amax_columns(const float* x, int n, float* amax) {
    EACH for (int i = 0; i < n; i++)
        amax[i] = to_float(static_cast<u32>(std::max(magnitude(amax[i]), magnitude(x[i]))));
}

// How groups get their scales from their amax: mezzo/formats/blocks.py says it in words, with the order of operations.
struct Scales {
    i32 scaling;
    i32 up, top_exponent, top_mantissa;
    float max, min_scale, max_scale;
    float encode = 1.0f, tensor = 1.0f;

    explicit Scales(const Job& job)
        : scaling(job.scaling), up(job.round_up), max(job.max), min_scale(job.scale_min), max_scale(job.scale_max) {
        top_exponent = static_cast<i32>(to_bits(max) >> 23) - 126;  // max = m * 2**top_exponent, 0.5 <= m < 1
        top_mantissa = static_cast<i32>(to_bits(max) & 0x7fffffu);
    }

    void set_tensor(i32 amax_bits) {  // finite
        const float amax = to_float(static_cast<u32>(amax_bits));
        encode = amax == 0.0f ? 1.0f : std::min(2688.0f / amax, FLOAT32_MAX);
        tensor = 1.0f / encode;
    }

    // factor: what x is multiplied by; for FREE what it is divided by, which is the scale.
    void run(const i32* amax, int n, float* scale, float* factor) const {
        const float nan = to_float(0x7fc00000u);
        if (scaling == POWER) {
            const i32 offset = 1 - top_exponent, add = up, top = top_mantissa;
            EACH for (int i = 0; i < n; i++) {
                const i32 m = amax[i];
                i32 e = (m >> 23) + offset + ((m & 0x7fffff) > top ? add : 0);  // plus 127
                e = e < 0 ? 0 : e > 254 ? 254 : e;  // 0 for every subnormal amax, and for 0
                const float s = to_float(e == 0 ? 0x400000u : static_cast<u32>(e) << 23);
                const float f = to_float(e == 254 ? 0x400000u : static_cast<u32>(254 - e) << 23);
                scale[i] = m < static_cast<i32>(INFINITE) ? s : nan;
                factor[i] = f;
            }
        } else if (scaling == FREE) {
            const float most = max, low = min_scale, high = max_scale;
            EACH for (int i = 0; i < n; i++) {
                float s = to_float(static_cast<u32>(amax[i])) / most;
                s = s < low ? low : s;
                s = s > high ? high : s;
                scale[i] = factor[i] = amax[i] < static_cast<i32>(INFINITE) ? s : nan;
            }
        } else {
            const float times = encode, whole = tensor;
            const Grid e4m3 = E4M3;
            EACH for (int i = 0; i < n; i++) {
                const float raw = to_float(static_cast<u32>(amax[i])) / 6.0f * times;
                const float s = round_one<NEAREST, false, false>(raw, 0, e4m3);
                const float back = 1.0f / (s * whole);
                scale[i] = s;
                factor[i] = back < FLOAT32_MAX ? back : FLOAT32_MAX;
            }
        }
    }
};

template <int R, bool INTEGER, int S>
INLINE float scale_one(float x, u32 word, float scale, float factor, float tensor, const Grid& g) {
    if (S == GIVEN) x = magnitude(x) < static_cast<i32>(INFINITE) ? x : to_float(0x7fc00000u);
    const float scaled = S == FREE || S == GIVEN ? x / factor : x * factor;
    const float y = round_one<R, INTEGER, S == GIVEN>(scaled, word, g) * scale;
    return S == NVFP4 ? y * tensor : y;
}

template <int R, bool INTEGER, int S>
INLINE void scale_span(const float* x, float* out, int n, const u32* words, float s, float f, float t, const Grid& g) {
    EACH for (int i = 0; i < n; i++)
        out[i] = scale_one<R, INTEGER, S>(x[i], R == STOCHASTIC ? words[i] : 0, s, f, t, g);
}

// n columns in blocks of `wide`, each with its scale.
template <int R, bool INTEGER, int S>
void scale_run(const float* x, float* out, int n, int wide, const u32* words, const float* scale, const float* factor,
               float t, const Grid& grid) {
    const Grid g = grid;
    if (wide == 1) {
        EACH for (int i = 0; i < n; i++)
            out[i] = scale_one<R, INTEGER, S>(x[i], R == STOCHASTIC ? words[i] : 0, scale[i], factor[i], t, g);
        return;
    }
    int i = 0, b = 0;
    if (wide == 32) {  // a fixed width, whose loop is unrolled
        for (; i + 32 <= n; i += 32, b++)
            scale_span<R, INTEGER, S>(x + i, out + i, 32, words + i, scale[b], factor[b], t, g);
    } else if (wide == 16) {
        for (; i + 16 <= n; i += 16, b++)
            scale_span<R, INTEGER, S>(x + i, out + i, 16, words + i, scale[b], factor[b], t, g);
    }
    for (; i < n; i += wide, b++)
        scale_span<R, INTEGER, S>(x + i, out + i, std::min(wide, n - i), words + i, scale[b], factor[b], t, g);
}

using ScaleRun = void (*)(const float*, float*, int, int, const u32*, const float*, const float*, float, const Grid&);

template <int R>
ScaleRun pick_scale_run(const Job& job) {
    if (job.scaling == NVFP4) return scale_run<R, false, NVFP4>;
    if (job.scaling == FREE) return job.integer ? scale_run<R, true, FREE> : scale_run<R, false, FREE>;
    if (job.scaling == GIVEN) return job.integer ? scale_run<R, true, GIVEN> : scale_run<R, false, GIVEN>;
    return job.integer ? scale_run<R, true, POWER> : scale_run<R, false, POWER>;
}

ScaleRun pick_scale_run(const Job& job) {
    if (job.rounding == NEAREST) return pick_scale_run<NEAREST>(job);
    return job.rounding == TOWARD_ZERO ? pick_scale_run<TOWARD_ZERO>(job) : pick_scale_run<STOCHASTIC>(job);
}

// -------------------------------------------------------------------------------------------------------------- blocks

struct Blocks {
    const Job& job;
    Grid grid;
    Scales scales;
    ScaleRun scale_run;
    bool streamed;
    i64 block_rows, block_columns;  // of one matrix

    explicit Blocks(const Job& j)
        : job(j), grid(j), scales(j), scale_run(pick_scale_run(j)), streamed(streams(j)),
          block_rows((j.height + j.tall - 1) / j.tall), block_columns((j.width + j.wide - 1) / j.wide) {}

    // Given scales of `n` blocks from one on.
    void take(i64 outer, i64 block_row, i64 inner, i64 block_column, int n, Buffers& b) const {
        const i64 first = ((outer * block_rows + block_row) * job.inner + inner) * block_columns + block_column;
        for (int i = 0; i < n; i++) b.scale[i] = b.factor[i] = job.given[job.given_count == 1 ? 0 : first + i];
    }

    void apply(const Run& run, i64 begin, int n, int wide) const {
        const float* x = run.read(begin, n);
        const u32* words = run.words(begin, n);
        scale_run(x, run.target(begin), n, wide, words, run.buffers.scale, run.buffers.factor, scales.tensor, grid);
        run.write(begin, n);
    }

    // Columns column … column + n - 1 of one row of blocks, n at most WIDE and whole blocks but for the last: one read
    // brings them to the cache, the second finds them there.
    void strip(const Run& run, i64 outer, i64 inner, i64 block_row, i64 column, int n) const {
        Buffers& b = run.buffers;
        const i64 row = block_row * job.tall, rows = std::min(job.tall, job.height - row);
        const i64 begin = (outer * job.height + row) * job.stride + inner * job.width + column;
        const int wide = static_cast<int>(std::min<i64>(job.wide, n)), blocks = (n + wide - 1) / wide;
        if (job.scaling == GIVEN) {
            take(outer, block_row, inner, column / job.wide, blocks, b);
        } else {
            if (rows == 1) {
                amax_blocks(run.read(begin, n), n, wide, b.amax);
                run.expect(begin + n, n);
            } else {
                float most[WIDE] = {};  // of each column; then of each block
                for (i64 r = 0; r < rows; r++) {
                    run.expect(begin + (r + 1) * job.stride, n);
                    amax_columns(run.read(begin + r * job.stride, n), n, most);
                }
                if (wide == 1) std::memcpy(b.amax, most, sizeof(float) * static_cast<size_t>(n));
                else amax_blocks(most, n, wide, b.amax);
            }
            scales.run(b.amax, blocks, b.scale, b.factor);
        }
        const i64 next = column + n < job.width ? begin + n : begin - column + rows * job.stride;  // the next strip
        for (i64 r = 0; r < rows; r++) {
            if (rows > 1) run.expect(next + r * job.stride, n);
            apply(run, begin + r * job.stride, n, wide);
        }
    }

    // One block wider than a run.
    void large(const Run& run, i64 outer, i64 inner, i64 block_row, i64 column, i64 n) const {
        Buffers& b = run.buffers;
        const i64 row = block_row * job.tall, rows = std::min(job.tall, job.height - row);
        const i64 begin = (outer * job.height + row) * job.stride + inner * job.width + column;
        if (job.scaling == GIVEN) {
            take(outer, block_row, inner, column / job.wide, 1, b);
        } else {
            b.amax[0] = 0;
            for (i64 r = 0; r < rows; r++)
                b.amax[0] = std::max(b.amax[0], amax_range(run, begin + r * job.stride, begin + r * job.stride + n));
            scales.run(b.amax, 1, b.scale, b.factor);
        }
        for (i64 r = 0; r < rows; r++) apply_range(run, begin + r * job.stride, begin + r * job.stride + n);
    }

    static i32 amax_range(const Run& run, i64 begin, i64 end) {
        i32 most = 0;
        for (i64 i = begin; i < end; i += RUN) {
            const int n = static_cast<int>(std::min<i64>(RUN, end - i));
            most = std::max(most, amax_run(run.read(i, n), n));
        }
        return most;
    }

    void apply_range(const Run& run, i64 begin, i64 end) const {
        for (i64 i = begin; i < end; i += RUN) apply(run, i, static_cast<int>(std::min<i64>(RUN, end - i)), RUN);
    }

    // amax of the numbers begin … begin + n - 1, by all threads.
    i32 amax_parallel(i64 begin, i64 n) const {
        std::atomic<i32> most{0};
        parallel(job, (n + RUN - 1) / RUN, RUN, false, [&](i64 first, i64 last) {
            Buffers buffers;
            const Run run{job, buffers, false};
            const i32 found = amax_range(run, begin + first * RUN, begin + std::min(last * RUN, n));
            i32 seen = most.load();
            while (found > seen && !most.compare_exchange_weak(seen, found)) {}
        });
        return most.load();
    }

    // One block of consecutive numbers, by all threads: for few large ones.
    void block_parallel(i64 begin, i64 n, i64 index) const {
        float scale, factor;
        if (job.scaling == GIVEN) {
            scale = factor = job.given[job.given_count == 1 ? 0 : index];
        } else {
            const i32 most = amax_parallel(begin, n);
            const Floats floats;
            scales.run(&most, 1, &scale, &factor);
        }
        parallel(job, (n + RUN - 1) / RUN, RUN, true, [&](i64 first, i64 last) {
            Buffers buffers;
            const Run run{job, buffers, streamed};
            buffers.scale[0] = scale, buffers.factor[0] = factor;
            apply_range(run, begin + first * RUN, begin + std::min(last * RUN, n));
        });
    }

    bool few_large() const {
        const i64 blocks = job.outer * job.inner * block_rows * block_columns;
        return job.tall == 1 && job.wide > LARGE && job.threads > 1 && blocks < 4 * job.threads;
    }

    i64 longest() const { return job.tall > 1 ? WIDE : RUN; }

    i64 strip_width() const {
        const i64 wide = std::min(job.wide, job.width);
        if (wide > longest()) return wide;
        i64 most = longest();
        if (job.tall > 1) {
            // A strip that fits the cache is read from memory once. Where it would be too narrow for memory to stream,
            // it is wide instead, and read twice.
            most = TILE / std::min(job.tall, job.height);
            most = most < 64 ? WIDE : std::min<i64>(most, WIDE);
            // Where the blocks fill the whole height of a narrow array, narrower strips give every thread some.
            const i64 others = job.outer * job.inner * block_rows;
            if (job.threads > 1 && others < 2 * job.threads)
                most = std::min(most, std::max<i64>(16, (job.width * others / (2 * job.threads) + 15) / 16 * 16));
        }
        return std::max<i64>(1, most / wide) * wide;
    }

    void all() {
        if (scales.scaling == NVFP4) {
            const i32 most = amax_parallel(0, job.count);
            if (most >= static_cast<i32>(INFINITE)) {
                fill_nan();
                return;
            }
            const Floats floats;
            scales.set_tensor(most);
        }
        if (few_large()) {
            i64 index = 0;
            for (i64 row = 0; row < job.outer * job.inner * job.height; row++)
                for (i64 column = 0; column < job.width; column += job.wide, index++)
                    block_parallel(row * job.width + column, std::min(job.wide, job.width - column), index);
            return;
        }
        const i64 most = longest(), width = strip_width(), strips = (job.width + width - 1) / width;
        const i64 size = std::min(job.tall, job.height) * std::min(width, job.width);
        const bool second = scales.scaling == NVFP4;
        parallel(job, job.outer * job.inner * block_rows * strips, size, second, [&](i64 first, i64 last) {
            Buffers buffers;
            const Run run{job, buffers, streamed};
            i64 at = first % strips, block_row = first / strips % block_rows;
            i64 inner = first / (strips * block_rows) % job.inner, outer = first / (strips * block_rows * job.inner);
            for (i64 task = first; task < last; task++) {
                const i64 n = std::min(width, job.width - at * width);
                if (n > most) large(run, outer, inner, block_row, at * width, n);
                else strip(run, outer, inner, block_row, at * width, static_cast<int>(n));
                if (++at < strips) continue;
                at = 0;
                if (++block_row < block_rows) continue;
                block_row = 0;
                if (++inner < job.inner) continue;
                inner = 0, outer++;
            }
        });
    }

    void fill_nan() const {
        parallel(job, (job.count + RUN - 1) / RUN, RUN, false, [&](i64 first, i64 last) {
            Buffers buffers;
            const Run run{job, buffers, false};
            for (i64 begin = first * RUN; begin < std::min(last * RUN, job.count); begin += RUN) {
                const int n = static_cast<int>(std::min<i64>(RUN, job.count - begin));
                std::fill_n(run.target(begin), n, to_float(0x7fc00000u));
                run.write(begin, n);
            }
        });
    }
};

}  // namespace

std::atomic<ParallelFunction> torch_parallel{nullptr};
std::atomic<i64> torch_process{0};

extern "C" {

// `parallel` is GOMP_parallel of the OpenMP runtime that torch runs on, or null: then threads come and go with a call.
void mezzo_use_threads(void* parallel) {
    torch_process.store(getpid());
    torch_parallel.store(reinterpret_cast<ParallelFunction>(parallel));
}

void mezzo_elements(const Job* job) {
    if (job->rounding == NEAREST) elements<NEAREST>(*job);
    else if (job->rounding == TOWARD_ZERO) elements<TOWARD_ZERO>(*job);
    else elements<STOCHASTIC>(*job);
}

void mezzo_blocks(const Job* job) {
    if (job->count > 0) Blocks(*job).all();
}

}  // extern "C"
