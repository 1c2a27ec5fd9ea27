// The CPU library: it chooses the instruction set and hands rows to threads.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "rows_cpu.h"

namespace {

struct InstructionSet {
    const char *name;
    void (*one_row)(const DertaRows &rows, int64_t i_row);
};

// The instruction sets that this machine runs, the best one last.
const std::vector<InstructionSet> &instruction_sets() {
    static const std::vector<InstructionSet> sets = [] {
        std::vector<InstructionSet> found = {{"portable", row_portable}};
#ifdef DERTA_X86
        // The features that CMakeLists.txt compiles each with.
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
            found.push_back({"avx2", row_avx2});
            if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
                found.push_back({"avx512", row_avx512});
        }
#endif
        return found;
    }();
    return sets;
}

// Starting a thread takes about as long as this many logits.
constexpr int64_t kLogitsWorthAThread = 1 << 16;

}  // namespace

int64_t derta_row_pass_rows_bytes() { return sizeof(DertaRows); }

const char *derta_row_pass(const DertaRows *rows, const char *instruction_set, int threads) {
    if (rows->dtype < DERTA_BFLOAT16 || rows->dtype > DERTA_FLOAT32) return "unknown dtype";
    if (rows->columns != 2 && rows->columns != 3) return "rows have two tokens or three";
    if (rows->stage < DERTA_WHOLE || rows->stage > DERTA_SECOND_WALK) return "unknown stage";
    const auto &sets = instruction_sets();
    auto chosen = std::prev(sets.end());
    if (instruction_set != nullptr) {
        chosen = std::find_if(sets.begin(), sets.end(), [&](const InstructionSet &set) {
            return std::strcmp(set.name, instruction_set) == 0;
        });
        if (chosen == sets.end()) return "this machine does not run that instruction set";
    }

    // Rows are handed out one by one: the next free thread takes the next row, and if no thread can
    // be started, this one takes them all. A row's result depends on nothing but the row.
    std::atomic<int64_t> next{0};
    const auto work = [&] {
        for (int64_t i_row; (i_row = next.fetch_add(1)) < rows->count;)
            chosen->one_row(*rows, i_row);
    };
    const int64_t worth = rows->count * rows->vocabulary / kLogitsWorthAThread;
    const int64_t helpers = std::min({int64_t{threads}, worth, rows->count}) - 1;
    std::vector<std::thread> started;
    try {
        for (int64_t i = 0; i < helpers; ++i) started.emplace_back(work);
    } catch (const std::system_error &) {
        // The system starts no more threads: those that run take all rows.
    }
    work();
    for (std::thread &thread : started) thread.join();
    return nullptr;
}

const char *derta_row_pass_instruction_sets(void) {
    static const std::string names = [] {
        std::string joined;
        for (const InstructionSet &set : instruction_sets())
            joined += (joined.empty() ? "" : " ") + std::string(set.name);
        return joined;
    }();
    return names.c_str();
}
