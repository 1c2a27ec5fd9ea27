// Tests of the CPU library's C interface, to run under sanitizers: every instruction set and dtype,
// rows that start and end anywhere, in memory of exactly their size. A team of several lanes with
// short tiles walks the same rows as a thread block would. Values are compared with float64 within
// wide bounds here, and within derived bounds by tests/kernels/test_row_pass_native.py. Only the
// tests that go through every number are exact here: roundings to float16 and bfloat16, and the
// exponential.
#include <algorithm>
#include <barrier>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "one_row.h"

namespace {

void check(bool holds, const std::string &promise) {
    if (holds) return;
    std::fprintf(stderr, "broken: %s\n", promise.c_str());
    std::exit(1);
}

template <typename Logit>
constexpr int32_t kDtype = DERTA_FLOAT32;
template <>
constexpr int32_t kDtype<BFloat16> = DERTA_BFLOAT16;
template <>
constexpr int32_t kDtype<Float16> = DERTA_FLOAT16;

template <typename Logit>
Logit rounded(float value) {
    Logit logit;
    round_to(value, logit);
    return logit;
}

template <typename Logit>
bool same_bits(const std::vector<Logit> &a, const std::vector<Logit> &b) {
    if (a.empty() || a.size() != b.size()) return a.size() == b.size();
    return memcmp(a.data(), b.data(), a.size() * sizeof(Logit)) == 0;
}

// The thread block of row_pass_cuda.cu, with CPU threads as its threads.
template <typename T>
struct Block {
    using Logit = T;
    static constexpr int kTile = 16 / sizeof(T);
    static constexpr int kLanes = 5;

    static inline thread_local int64_t i_lane;
    static inline Summary of_lane[kLanes];
    static inline std::barrier<> barrier{kLanes};

    static int64_t lane() { return i_lane; }
    static int64_t lanes() { return kLanes; }
    static void wait() { barrier.arrive_and_wait(); }
    static void load(T *tile, const T *row, int count) {
        for (int i = 0; i < kTile; ++i) tile[i] = i < count ? row[i] : T{};
    }
    static void store(T *row, const T *tile, int count) { std::copy_n(tile, count, row); }
    static Summary merged(Summary mine) {
        of_lane[i_lane] = mine;
        wait();
        Summary all = of_lane[0];
        for (int i = 1; i < kLanes; ++i) all = ::merged(all, of_lane[i]);
        return all;
    }

    static void row(const DertaRows &rows, int64_t i_row) {
        std::vector<std::thread> lanes;
        for (int i = 0; i < kLanes; ++i)
            lanes.emplace_back([&rows, i_row, i] {
                i_lane = i;
                rows.softcap != 0.0f ? one_row<true, Block>(rows, i_row)
                                     : one_row<false, Block>(rows, i_row);
            });
        for (std::thread &lane : lanes) lane.join();
    }
};

struct Result {
    std::vector<float> logsumexp, nll;
};

const char *walk(const DertaRows &rows, const std::string &walker, int threads) {
    if (walker != "block") return derta_row_pass(&rows, walker.c_str(), threads);
    for (int64_t i = 0; i < rows.count; ++i) switch (rows.dtype) {
            case DERTA_BFLOAT16: Block<BFloat16>::row(rows, i); break;
            case DERTA_FLOAT16: Block<Float16>::row(rows, i); break;
            case DERTA_FLOAT32: Block<float>::row(rows, i); break;
        }
    return nullptr;
}

// Walks the rows as shards of the vocabulary that begin at `starts`, in turn, as ranks would do at
// once: all first walks, the merged summary, all second walks.
template <typename Logit>
const char *walk_shards(const DertaRows &whole, const std::vector<int64_t> &starts,
                        const std::string &walker, int threads) {
    const int64_t width = 3 + whole.columns;
    std::vector<float> merged_summary(whole.count * width);
    std::vector<float> of_shard(whole.count * width);
    for (int32_t stage : {DERTA_FIRST_WALK, DERTA_SECOND_WALK}) {
        for (size_t i_shard = 0; i_shard < starts.size(); ++i_shard) {
            const int64_t start = starts[i_shard];
            const int64_t end = i_shard + 1 < starts.size() ? starts[i_shard + 1] : whole.vocabulary;
            std::vector<int64_t> tokens;
            for (int64_t i = 0; i < whole.count * whole.columns; ++i) {
                const int64_t token = whole.tokens[i];
                tokens.push_back(token >= start && token < end ? token - start : -1);
            }
            DertaRows rows = whole;
            rows.logits = static_cast<Logit *>(whole.logits) + start;
            rows.vocabulary = end - start;
            rows.tokens = tokens.data();
            rows.stage = stage;
            rows.summary = stage == DERTA_FIRST_WALK ? of_shard.data() : merged_summary.data();
            if (const char *error = walk(rows, walker, threads)) return error;
            if (stage == DERTA_SECOND_WALK) continue;
            for (int64_t i = 0; i < whole.count; ++i) {
                float *all = &merged_summary[i * width];
                const float *mine = &of_shard[i * width];
                const Summary seen =
                    i_shard == 0 ? Summary{mine[0], mine[1], mine[2]}
                                 : ::merged({all[0], all[1], all[2]}, {mine[0], mine[1], mine[2]});
                all[0] = seen.highest;
                all[1] = float(seen.ones);
                all[2] = float(seen.rest);
                for (int64_t k = 3; k < width; ++k)
                    all[k] = i_shard == 0 ? mine[k] : std::max(all[k], mine[k]);
            }
        }
    }
    return nullptr;
}

template <typename Logit>
Result run(std::vector<Logit> &logits, int64_t count, int64_t vocabulary, int64_t stride,
           int columns, const std::vector<int64_t> &tokens, const std::vector<float> &weight,
           float softcap, bool form_gradient, const std::string &walker, int threads,
           const std::vector<int64_t> &shards = {}) {
    Result result{std::vector<float>(count, NAN), std::vector<float>(columns * count, NAN)};
    DertaRows rows{};
    rows.logits = logits.data();
    rows.count = count;
    rows.vocabulary = vocabulary;
    rows.columns = columns;
    rows.row_stride = stride;
    rows.tokens = tokens.data();
    rows.token_weight = weight.data();
    rows.logsumexp = result.logsumexp.data();
    rows.nll = result.nll.data();
    rows.softcap = softcap;
    rows.logit_scale = -0.5f;
    rows.dtype = kDtype<Logit>;
    rows.form_gradient = form_gradient;
    const char *error = shards.empty() ? walk(rows, walker, threads)
                                       : walk_shards<Logit>(rows, shards, walker, threads);
    check(error == nullptr, error ? error : "");
    return result;
}

template <typename Logit>
void rows_are_right(const std::string &walker, int64_t count, int64_t vocabulary, int64_t stride,
                    int columns, float softcap, double band,
                    const std::vector<int64_t> &shards = {}) {
    std::mt19937 random(0);
    std::normal_distribution<float> normal(0.0f, 8.0f);
    // The memory ends with the last row, without its padding.
    std::vector<Logit> logits(count == 0 ? 0 : (count - 1) * stride + vocabulary);
    for (Logit &logit : logits) logit = rounded<Logit>(normal(random));
    std::vector<int64_t> tokens;
    std::vector<float> weight;
    for (int64_t i = 0; i < count; ++i) {
        tokens.insert(tokens.end(), {i % vocabulary, (i * i + 1) % vocabulary});
        weight.insert(weight.end(), {1.5f, i % 2 ? 0.75f : 0.0f});
        if (columns == 3) {
            tokens.push_back((i % 2 ? i : 2 * i + 1) % vocabulary);
            weight.push_back(0.5f);
        }
    }
    const std::vector<Logit> before = logits;
    const Result only_read = run(logits, count, vocabulary, stride, columns, tokens, weight,
                                 softcap, false, walker, 1, shards);
    check(same_bits(logits, before), "logits stay as they are without a gradient");
    const Result result = run(logits, count, vocabulary, stride, columns, tokens, weight, softcap,
                              true, walker, 3, shards);
    check(same_bits(result.nll, only_read.nll), "a gradient and more threads change no loss");

    for (int64_t i = 0; i < count; ++i) {
        std::vector<double> z, slope;
        for (int64_t j = 0; j < vocabulary; ++j) {
            const double x = -0.5 * widened(before[i * stride + j]);
            const double bounded = softcap ? std::tanh(x / softcap) : 0.0;
            z.push_back(softcap ? softcap * bounded : x);
            slope.push_back(-0.5 * (1 - bounded * bounded));
        }
        const double highest = *std::max_element(z.begin(), z.end());
        double sum = 0;
        for (double value : z) sum += std::exp(value - highest);
        const float *w = &weight[columns * i];
        const int64_t *t = &tokens[columns * i];
        check(std::abs(result.logsumexp[i] - (highest + std::log(sum))) < 1e-4, "logsumexp");
        for (int k = 0; k < 2; ++k) {
            const float nll = result.nll[columns * i + k];
            check(nll >= 0 && std::abs(nll - (highest - z[t[k]] + std::log(sum))) < 1e-4, "nll");
        }
        // With a vocabulary of one token, 1 - p is 0, and the loss only has to be finite.
        const double p_third = columns == 3 ? std::exp(z[t[2]] - highest) / sum : 0.0;
        double others = 0;
        for (int64_t j = 0; columns == 3 && j < vocabulary; ++j)
            others += j == t[2] ? 0.0 : std::exp(z[j] - highest);
        if (columns == 3) {
            const float loss = result.nll[columns * i + 2];
            const double exact = std::log(sum) - std::log(others);
            check(loss >= 0 && std::isfinite(loss), "unlikelihood is finite");
            check(vocabulary == 1 || std::abs(loss - exact) < 1e-4, "unlikelihood");
        }
        for (int64_t j = 0; j < vocabulary; ++j) {
            const double p = std::exp(z[j] - highest) / sum;
            double g = (w[0] + w[1]) * p - (j == t[0] ? w[0] : 0) - (j == t[1] ? w[1] : 0);
            if (columns == 3)
                g += w[2] * p_third *
                     (j == t[2] ? 1.0 : -std::exp(z[j] - highest) / std::max(others, 1e-300));
            const double error = std::abs(widened(logits[i * stride + j]) - slope[j] * g);
            check(error <= band * std::abs(slope[j] * g) + 1e-6, "gradient");
        }
        for (int64_t j = vocabulary; i + 1 < count && j < stride; ++j)
            check(memcmp(&logits[i * stride + j], &before[i * stride + j], sizeof(Logit)) == 0,
                  "memory between rows is not touched");
    }
}

template <typename Logit>
void every_shape_is_right(const std::string &walker, double band) {
    for (int64_t vocabulary : {1, 2, 97, 1023, 1024, 1025, 4097})
        for (int64_t padding : {0, 1, 7})
            for (int64_t count : {0, 1, 3})
                for (float softcap : {0.0f, 20.0f})
                    for (int columns : {2, 3})
                        rows_are_right<Logit>(walker, count, vocabulary, vocabulary + padding,
                                              columns, softcap, band);
    rows_are_right<Logit>(walker, 64, 4096, 4099, 2, 0.0f, band);  // work for several threads
    // Shards of any size, empty ones among them.
    for (const std::vector<int64_t> &shards :
         {std::vector<int64_t>{0}, {0, 1}, {0, 0, 1500}, {0, 700, 1026, 1026, 2047}})
        for (float softcap : {0.0f, 20.0f})
            for (int columns : {2, 3})
                rows_are_right<Logit>(walker, 3, 2049, 2050, columns, softcap, band, shards);
}

// Rounding to a 16-bit format is to the nearest, ties to even: tested with each number of the
// format, the middle between it and the next, and the floats beside the middle.
template <typename Logit>
void rounding_is_to_nearest_even(uint16_t infinity, const std::string &name) {
    for (uint16_t bits = 0; bits < infinity; ++bits) {
        const uint16_t next = bits + 1;
        const double low = widened(Logit{bits});
        const double beyond = 2 * low - widened(Logit{uint16_t(bits - 1)});
        const double high = next == infinity ? beyond : widened(Logit{next});
        const float middle = float((low + high) / 2);
        check(double(middle) == (low + high) / 2 || middle < FLT_MIN, "the middle is a float");
        for (int sign : {1, -1}) {
            const auto to = [&](float value) {
                return rounded<Logit>(sign * value).bits - (sign < 0 ? 0x8000 : 0);
            };
            check(to(float(low)) == bits, name + " numbers are kept");
            if (double(middle) != (low + high) / 2) continue;
            check(to(middle) == (bits % 2 ? next : bits), name + " ties go to the even number");
            check(to(std::nextafter(middle, 0.0f)) == bits, name + " below the middle, down");
            check(to(std::nextafter(middle, INFINITY)) == next, name + " above the middle, up");
        }
    }
    check(rounded<Logit>(INFINITY).bits == infinity, name + " keeps infinity");
    for (uint32_t nan : {0x7fc00000u, 0x7f800001u, 0xffffffffu, 0x7fffffffu})
        check(std::isnan(widened(rounded<Logit>(float_of(nan)))), name + " keeps NaN");
}

void exponential_is_within_its_error() {
    double worst = 0;
    for (float x = 0.0f; x > -87.0f; x -= 1e-4f) {
        const double exact = std::exp(double(x));
        const double ulp = std::ldexp(1.0, std::ilogb(exact) - 23);
        worst = std::max(worst, std::abs(exponential(x) - exact) / ulp);
    }
    std::printf("exponential: within %.3f ulp\n", worst);
    check(worst <= 1.2, "the exponential is within 1.2 ulps");
    check(exponential(0.0f) == 1.0f, "exp(0) is 1, or a loss could be negative");
    check(exponential(-INFINITY) == 0.0f && exponential(-1e30f) == 0.0f, "far below 0 it is 0");
    for (uint32_t nan : {0x7fc00000u, 0x7f800001u, 0xffffffffu, 0x7fc00001u})
        check(std::isnan(exponential(float_of(nan))), "the exponential of NaN is NaN");
}

void hyperbolic_tangent_is_within_two_ulps() {
    double worst = 0;
    for (float x = 1e-6f; x < 20.0f; x *= 1.0001f) {
        const double exact = std::tanh(double(x));
        const double ulp = std::ldexp(1.0, std::ilogb(exact) - 23);
        worst = std::max(worst, std::abs(hyperbolic_tangent(x) - exact) / ulp);
        check(hyperbolic_tangent(-x) == -hyperbolic_tangent(x), "tanh is odd");
    }
    std::printf("hyperbolic tangent: within %.3f ulp\n", worst);
    check(worst <= 2.0, "the hyperbolic tangent is within two ulps");
}

}  // namespace

int main() {
    rounding_is_to_nearest_even<BFloat16>(0x7f80, "bfloat16");
    rounding_is_to_nearest_even<Float16>(0x7c00, "float16");
    exponential_is_within_its_error();
    hyperbolic_tangent_is_within_two_ulps();

    std::istringstream walkers("block " + std::string(derta_row_pass_instruction_sets()));
    for (std::string walker; walkers >> walker;) {
        every_shape_is_right<BFloat16>(walker, 0x1p-8);
        every_shape_is_right<Float16>(walker, 0x1p-10);
        every_shape_is_right<float>(walker, 1e-4);
        std::printf("%s: right\n", walker.c_str());
    }
    DertaRows rows{};
    check(derta_row_pass(&rows, "vax", 1) != nullptr, "an unknown instruction set is refused");
    check(derta_row_pass(&rows, nullptr, 1) != nullptr, "rows without tokens are refused");
    rows.columns = 2;
    rows.dtype = 3;
    check(derta_row_pass(&rows, nullptr, 1) != nullptr, "an unknown dtype is refused");
    rows.dtype = DERTA_FLOAT32;
    rows.stage = 3;
    check(derta_row_pass(&rows, nullptr, 1) != nullptr, "an unknown stage is refused");
    return 0;
}
