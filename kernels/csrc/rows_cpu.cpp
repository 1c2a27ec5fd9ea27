// Compiled once per instruction set, as DERTA_ROW_PASS. It includes only C headers of the C++
// library, whose functions are never inline; one_row.h says why that matters.
#include "rows_cpu.h"

#include "one_row.h"

namespace {

// A team of one thread. A tile of floats and a tile of logits stay in the first-level cache.
template <typename T>
struct Thread {
    using Logit = T;
    static constexpr int kTile = 1024;
    static int64_t lane() { return 0; }
    static int64_t lanes() { return 1; }
    static Summary merged(Summary seen) { return seen; }
    static void wait() {}
    static void store(T *row, const T *tile, int count) { memcpy(row, tile, count * sizeof(T)); }
    static void load(T *tile, const T *row, int count) {
        memcpy(tile, row, count * sizeof(T));
        memset(tile + count, 0, (kTile - count) * sizeof(T));
    }
};

template <typename Logit>
void row_of(const DertaRows &rows, int64_t i_row) {
    if (rows.softcap != 0.0f)
        one_row<true, Thread<Logit>>(rows, i_row);
    else
        one_row<false, Thread<Logit>>(rows, i_row);
}

}  // namespace

void DERTA_ROW_PASS(const DertaRows &rows, int64_t i_row) {
    switch (rows.dtype) {
        case DERTA_BFLOAT16: return row_of<BFloat16>(rows, i_row);
        case DERTA_FLOAT16: return row_of<Float16>(rows, i_row);
        case DERTA_FLOAT32: return row_of<float>(rows, i_row);
    }
}
