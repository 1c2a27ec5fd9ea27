// The row pass, written once for CPUs and GPUs: the mathematics of a logit and the walk over a row.
//
// A team walks a row, and each of its lanes takes a tile of neighbouring logits at a time. On a GPU
// the team is a thread block, a lane is a thread and a tile is one 16-byte load. On a CPU the team
// is one thread, and the compiler vectorises its long tiles.
//
// The first walk finds the highest logit and the sum of exp(z - highest), from which the losses
// follow. The second walk overwrites the logits with their gradient. That is two reads and one
// write of the logits, and no memory but the results. Where the vocabulary is sharded, the walks are
// calls of their own, and between them the summaries of all shards are merged.
//
// Invariant: a token's logit, read by itself, must equal the same logit in the walk to the last
// bit, or a loss could be negative. So sums are fused where multiply_add says so and nowhere else
// (contraction is off).
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "row_pass.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define DERTA_INLINE __device__ __forceinline__
#define DERTA_LANES(clauses) _Pragma("unroll")
#define DERTA_UNROLL _Pragma("unroll")
#define DERTA_SUM float  // a lane adds few tiles, and doubles are slow on consumer GPUs
#else
#define DERTA_INLINE inline
#define DERTA_PRAGMA(text) _Pragma(#text)
#define DERTA_LANES(clauses) DERTA_PRAGMA(omp simd clauses)
#define DERTA_UNROLL
#define DERTA_SUM double
#endif

// This header is compiled once per instruction set. With external linkage the linker would keep one
// copy of each function, and a machine without AVX-512 might run AVX-512 code.
namespace {

struct BFloat16 {
    uint16_t bits;
};

struct Float16 {
    uint16_t bits;
};

DERTA_INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

DERTA_INLINE float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

DERTA_INLINE float multiply_add(float a, float b, float c) {
#if defined(__CUDACC__) || defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return fmaf(a, b, c);
#else
    return a * b + c;  // fmaf would be a function call
#endif
}

DERTA_INLINE float widened(float value) { return value; }

DERTA_INLINE float widened(BFloat16 value) { return float_of(uint32_t{value.bits} << 16); }

DERTA_INLINE float widened(Float16 value) {
#ifdef __CUDACC__
    return __half2float(__ushort_as_half(value.bits));
#else
    const uint32_t twice = uint32_t{value.bits} << 17;  // shifts the sign out
    const uint32_t sign = (uint32_t{value.bits} & 0x8000) << 16;
    const float normal = float_of((twice >> 4) + (224u << 23)) * 0x1p-112f;
    const float subnormal = float_of((twice >> 17) | (126u << 23)) - 0.5f;
    return float_of(sign | bits_of(twice < (1u << 27) ? subnormal : normal));
#endif
}

// Rounds to the nearest, ties to even; NaN stays NaN.
DERTA_INLINE void round_to(float value, float &rounded) { rounded = value; }

DERTA_INLINE void round_to(float value, BFloat16 &rounded) {
#ifdef __CUDACC__
    rounded.bits = __bfloat16_as_ushort(__float2bfloat16_rn(value));
#else
    const uint32_t bits = bits_of(value);
    const uint32_t nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    rounded.bits = static_cast<uint16_t>(value == value ? nearest : 0x7fc0);
#endif
}

DERTA_INLINE void round_to(float value, Float16 &rounded) {
#ifdef __CUDACC__
    rounded.bits = __half_as_ushort(__float2half_rn(value));
#else
    // The two factors turn values beyond float16's range into infinity. Adding a power of two that
    // is 2^13 times the value's then leaves float16's digits in the sum, rounded by the adder.
    const uint32_t twice = bits_of(value) << 1;
    const uint32_t exponent = twice & 0xff000000;
    const uint32_t at_least = exponent < 0x71000000 ? 0x71000000 : exponent;
    const float bounded = (float_of(twice >> 1) * 0x1p112f) * 0x1p-110f;
    const uint32_t sum = bits_of(float_of((at_least >> 1) + 0x07800000) + bounded);
    const uint32_t nearest = ((sum >> 13) & 0x7c00) + (sum & 0x0fff);
    const uint32_t sign = (bits_of(value) >> 16) & 0x8000;
    rounded.bits = static_cast<uint16_t>(sign | (value == value ? nearest : 0x7e00));
#endif
}

// Returns exp(x) for x <= 0, within 1.2 ulps, or 0 where the result would be subnormal.
DERTA_INLINE float exponential(float x) {
#ifdef __CUDACC__
    return expf(x);  // uses the hardware's power of two
#else
    // x = n log 2 + r. A sum of this size has no fractional bits: its lowest bits are n + 127, the
    // exponent of 2^n. The first part of log 2 is so short that its product with n is exact.
    constexpr float kExponent = 0x1.8p23f + 127.0f;
    const float exponent = multiply_add(x, 0x1.715476p0f, kExponent);
    const float n = exponent - kExponent;
    float r = multiply_add(n, -0.693359375f, x);
    r = multiply_add(n, 2.12194440e-4f, r);
    // e^r within a relative 3e-9, by least squares weighted towards the largest error.
    float p = 1.3814321844e-3f;
    p = multiply_add(p, r, 8.3688511291e-3f);
    p = multiply_add(p, r, 4.1668401063e-2f);
    p = multiply_add(p, r, 1.6666519523e-1f);
    p = multiply_add(p, r, 4.9999993373e-1f);
    p = multiply_add(p, r, 1.0f);
    p = multiply_add(p, r, 1.0f);
    // A product, not a sum of exponents, so that NaN stays NaN.
    const float power = float_of(bits_of(exponent) << 23);
    return x < -87.0f ? 0.0f : p * power;
#endif
}

// Near 0, where 1 - e cancels, it is the polynomial of Cephes' tanhf.
DERTA_INLINE float hyperbolic_tangent(float x) {
    const float magnitude = fabsf(x);
    const float e = exponential(-2.0f * magnitude);
    const float far = (1.0f - e) / (1.0f + e);
    const float s = x * x;
    float p = -5.70498872745e-3f;
    p = multiply_add(p, s, 2.06390887954e-2f);
    p = multiply_add(p, s, -5.37397155531e-2f);
    p = multiply_add(p, s, 1.33314422036e-1f);
    p = multiply_add(p, s, -3.33332819422e-1f);
    const float near = multiply_add(p * s, x, x);
    return magnitude < 0.625f ? near : copysignf(far, x);
}

struct FinalLogit {
    float z;
    float slope;  // dz / dlogit
};

template <bool kSoftcap>
DERTA_INLINE FinalLogit final_logit(float logit, const DertaRows &rows) {
    const float z = rows.logit_scale * logit;
    if (!kSoftcap) return {z, rows.logit_scale};
    const float bounded = hyperbolic_tangent(z * (1.0f / rows.softcap));
    return {rows.softcap * bounded, rows.logit_scale * multiply_add(-bounded, bounded, 1.0f)};
}

// The sum of exp(z - highest) over the logits seen so far. In a row that is sure of its token, the
// sum is 1 and a small rest, which is all that loss and gradient consist of. Added to 1 the rest
// would lose its digits, so terms that are 1 are counted and the rest is summed separately.
struct Summary {
    float highest;
    DERTA_SUM ones;
    DERTA_SUM rest;
};

// The start is finite: rows may hold -inf, and -inf - -inf is NaN.
constexpr Summary kNothingSeen = {-FLT_MAX, 0, 0};

// Rescales to a maximum that is at least as high. If it is higher, the ones shrink too and join the
// rest.
DERTA_INLINE Summary rescaled(Summary seen, float highest) {
    const float factor = exponential(seen.highest - highest);
    if (factor == 1.0f) return {highest, seen.ones, seen.rest};
    return {highest, 0, (seen.ones + seen.rest) * factor};
}

DERTA_INLINE Summary merged(Summary a, Summary b) {
    const float highest = a.highest > b.highest ? a.highest : b.highest;
    a = rescaled(a, highest);
    b = rescaled(b, highest);
    return {highest, a.ones + b.ones, a.rest + b.rest};
}

template <bool kSoftcap, typename Team>
DERTA_INLINE Summary with_tile(Summary seen, const typename Team::Logit *tile, int count,
                               const DertaRows &rows) {
    constexpr int kTile = Team::kTile;
    float z[kTile];
    DERTA_LANES()
    for (int i = 0; i < kTile; ++i) z[i] = final_logit<kSoftcap>(widened(tile[i]), rows).z;
    if (count < kTile) {
        DERTA_LANES()
        for (int i = 0; i < kTile; ++i) z[i] = i < count ? z[i] : -INFINITY;
    }
    float highest = seen.highest;  // never NaN: a NaN logit makes the rest NaN instead
    DERTA_LANES(reduction(max : highest))
    for (int i = 0; i < kTile; ++i) highest = z[i] > highest ? z[i] : highest;
    float ones = 0.0f;
    float rest = 0.0f;
    DERTA_LANES(reduction(+ : ones, rest))
    for (int i = 0; i < kTile; ++i) {
        const float term = exponential(z[i] - highest);
        ones += term == 1.0f ? 1.0f : 0.0f;
        rest += term == 1.0f ? 0.0f : term;
    }
    seen = rescaled(seen, highest);
    return {highest, seen.ones + ones, seen.rest + rest};
}

// A token that the row is trained not to say. Its loss is -log(1 - p). The gradient of its own
// logit is weight p; that of any other logit is -weight p times the logit's share in 1 - p.
struct Unlikely {
    float loss;
    float own;     // the gradient of the token's own logit
    float others;  // a logit's gradient is -others times its exp(z - highest)
};

DERTA_INLINE Unlikely unlikely(float term, float rest, float log_sum, float weight) {
    const float p = term / (1.0f + rest);
    // others / (1 + rest) is 1 - p. For a row that is sure of the token, others is exactly the
    // rest. Where it would be 0, the smallest normal float keeps the loss finite.
    float others = term == 1.0f ? rest : (1.0f + rest) - term;
    others = others > FLT_MIN ? others : FLT_MIN;
    const float push = weight * p;
    const float each = push / others;
    return {p < 0.5f ? -log1pf(-p) : log_sum - logf(others), push, each < FLT_MAX ? each : FLT_MAX};
}

// A team has the type `Logit` and the length `kTile` of a tile. lane() and lanes() number its
// lanes, load() and store() move the first logits of a tile, merged() merges the summaries of all
// lanes, and wait() waits for all lanes.
template <int kStage, bool kSoftcap, int kColumns, typename Team>
DERTA_INLINE void row_of_columns(const DertaRows &rows, int64_t i_row) {
    using Logit = typename Team::Logit;
    constexpr int kTile = Team::kTile;
    const int64_t first = Team::lane() * kTile;
    const int64_t step = Team::lanes() * kTile;
    const int64_t vocabulary = rows.vocabulary;
    Logit *row = static_cast<Logit *>(rows.logits) + i_row * rows.row_stride;
    const int64_t *tokens = rows.tokens + kColumns * i_row;
    const float *weight = rows.token_weight + kColumns * i_row;
    float *nll = rows.nll + kColumns * i_row;
    float *summary = kStage == DERTA_WHOLE ? nullptr : rows.summary + (3 + kColumns) * i_row;
    const auto is_here = [=](int k) { return kStage == DERTA_WHOLE || tokens[k] >= 0; };
    // The tokens' logits are read before merged() or wait(), which wait for all lanes. After it,
    // lanes overwrite logits that others would still have to read.
    FinalLogit of_token[kColumns];
    DERTA_UNROLL
    for (int k = 0; k < kColumns; ++k)
        of_token[k] = is_here(k) ? final_logit<kSoftcap>(widened(row[tokens[k]]), rows)
                                 : FinalLogit{-INFINITY, 0.0f};
    alignas(16) Logit tile[kTile];

    Summary seen = kNothingSeen;
    if constexpr (kStage == DERTA_SECOND_WALK) {
        seen = {summary[0], summary[1], summary[2]};
        DERTA_UNROLL
        for (int k = 0; k < kColumns; ++k) of_token[k].z = summary[3 + k];
        Team::wait();
    } else {
        // The first walk.
        for (int64_t start = first; start < vocabulary; start += step) {
            const int count = vocabulary - start < kTile ? int(vocabulary - start) : kTile;
            Team::load(tile, row + start, count);
            seen = with_tile<kSoftcap, Team>(seen, tile, count, rows);
        }
        seen = Team::merged(seen);
    }
    if constexpr (kStage == DERTA_FIRST_WALK) {
        if (Team::lane() != 0) return;
        summary[0] = seen.highest;
        summary[1] = float(seen.ones);
        summary[2] = float(seen.rest);
        DERTA_UNROLL
        for (int k = 0; k < kColumns; ++k) summary[3 + k] = of_token[k].z;
        return;
    }
    const float rest = float((seen.ones - 1) + seen.rest);
    const float log_sum = log1pf(rest);
    Unlikely third = {};
    if constexpr (kColumns == 3)
        third = unlikely(exponential(of_token[2].z - seen.highest), rest, log_sum, weight[2]);
    if (Team::lane() == 0) {
        rows.logsumexp[i_row] = seen.highest + log_sum;
        DERTA_UNROLL
        for (int k = 0; k < 2; ++k) nll[k] = (seen.highest - of_token[k].z) + log_sum;
        if constexpr (kColumns == 3) nll[2] = third.loss;
    }
    if (!rows.form_gradient) return;

    // The second walk, with the gradient that a logit has if it is none of the tokens.
    const float both = weight[0] + weight[1];
    const float share = both / (1.0f + rest) - third.others;
    for (int64_t start = first; start < vocabulary; start += step) {
        const int count = vocabulary - start < kTile ? int(vocabulary - start) : kTile;
        Team::load(tile, row + start, count);
        DERTA_LANES()
        for (int i = 0; i < kTile; ++i) {
            const FinalLogit logit = final_logit<kSoftcap>(widened(tile[i]), rows);
            round_to(exponential(logit.z - seen.highest) * share * logit.slope, tile[i]);
        }
        Team::store(row + start, tile, count);
    }
    // The tokens' gradients replace those that the walk wrote there, so that the walk compares no
    // logit with the tokens.
    Team::wait();
    if (Team::lane() == 0) {
        DERTA_UNROLL
        for (int k = 0; k < kColumns; ++k) {
            if (!is_here(k)) continue;
            const float own = (tokens[k] == tokens[0] ? weight[0] : 0.0f) +
                              (tokens[k] == tokens[1] ? weight[1] : 0.0f);
            const float term = exponential(of_token[k].z - seen.highest);
            // Exact where the row is sure of its token, since the first difference is 0.
            float gradient = ((both * term - own) - own * rest) / (1.0f + rest);
            if constexpr (kColumns == 3)
                gradient += tokens[k] == tokens[2] ? third.own : -(third.others * term);
            round_to(gradient * of_token[k].slope, row[tokens[k]]);
        }
    }
}

template <int kStage, bool kSoftcap, typename Team>
DERTA_INLINE void row_of_stage(const DertaRows &rows, int64_t i_row) {
    if (rows.columns == 3)
        row_of_columns<kStage, kSoftcap, 3, Team>(rows, i_row);
    else
        row_of_columns<kStage, kSoftcap, 2, Team>(rows, i_row);
}

template <bool kSoftcap, typename Team>
DERTA_INLINE void one_row(const DertaRows &rows, int64_t i_row) {
    switch (rows.stage) {
        case DERTA_WHOLE: return row_of_stage<DERTA_WHOLE, kSoftcap, Team>(rows, i_row);
        case DERTA_FIRST_WALK: return row_of_stage<DERTA_FIRST_WALK, kSoftcap, Team>(rows, i_row);
        case DERTA_SECOND_WALK: return row_of_stage<DERTA_SECOND_WALK, kSoftcap, Team>(rows, i_row);
    }
}

}  // namespace
