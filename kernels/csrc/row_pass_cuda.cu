// The CUDA library: one thread block per row. A thread's tile is one 16-byte load where the row is
// aligned. Shuffles merge the summaries within a warp, shared memory those of the warps.
#include <algorithm>

#include "one_row.h"

namespace {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 512;

template <typename T>
struct Block {
    using Logit = T;
    static constexpr int kTile = sizeof(uint4) / sizeof(T);

    static __device__ int64_t lane() { return threadIdx.x; }
    static __device__ int64_t lanes() { return blockDim.x; }
    static __device__ void wait() { __syncthreads(); }

    static __device__ bool wide(const T *row, int count) {
        return count == kTile && reinterpret_cast<uintptr_t>(row) % sizeof(uint4) == 0;
    }

    static __device__ void load(T *tile, const T *row, int count) {
        if (wide(row, count)) {
            const uint4 all = *reinterpret_cast<const uint4 *>(row);
            memcpy(tile, &all, sizeof all);
        } else {
#pragma unroll
            for (int i = 0; i < kTile; ++i) tile[i] = i < count ? row[i] : T{};
        }
    }

    static __device__ void store(T *row, const T *tile, int count) {
        if (wide(row, count)) {
            uint4 all;
            memcpy(&all, tile, sizeof all);
            *reinterpret_cast<uint4 *>(row) = all;
        } else {
#pragma unroll
            for (int i = 0; i < kTile; ++i)
                if (i < count) row[i] = tile[i];
        }
    }

    static __device__ Summary merged(Summary mine) {
        for (int away = kWarp / 2; away > 0; away /= 2) {
            const Summary theirs = {__shfl_xor_sync(~0u, mine.highest, away),
                                    __shfl_xor_sync(~0u, mine.ones, away),
                                    __shfl_xor_sync(~0u, mine.rest, away)};
            mine = ::merged(mine, theirs);
        }
        __shared__ Summary of_warp[kMaxThreads / kWarp];
        if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = mine;
        wait();
        Summary all = of_warp[0];
        for (int i = 1; i < blockDim.x / kWarp; ++i) all = ::merged(all, of_warp[i]);
        return all;
    }
};

template <int kStage, bool kSoftcap, typename Logit>
__global__ void __launch_bounds__(kMaxThreads) row_pass(const DertaRows rows) {
    row_of_stage<kStage, kSoftcap, Block<Logit>>(rows, blockIdx.x);
}

using Kernel = void (*)(DertaRows);

template <int kStage, typename Logit>
Kernel kernel_of_stage(const DertaRows &rows) {
    return rows.softcap != 0.0f ? row_pass<kStage, true, Logit> : row_pass<kStage, false, Logit>;
}

// Returns null for an unknown stage.
template <typename Logit>
Kernel kernel_of(const DertaRows &rows) {
    switch (rows.stage) {
        case DERTA_WHOLE: return kernel_of_stage<DERTA_WHOLE, Logit>(rows);
        case DERTA_FIRST_WALK: return kernel_of_stage<DERTA_FIRST_WALK, Logit>(rows);
        case DERTA_SECOND_WALK: return kernel_of_stage<DERTA_SECOND_WALK, Logit>(rows);
        default: return nullptr;
    }
}

const char *message(cudaError_t error) {
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

int64_t derta_row_pass_rows_bytes() { return sizeof(DertaRows); }

const char *derta_row_pass_cuda(const DertaRows *rows, int device, void *stream) {
    Kernel kernel = nullptr;
    switch (rows->dtype) {
        case DERTA_BFLOAT16: kernel = kernel_of<BFloat16>(*rows); break;
        case DERTA_FLOAT16: kernel = kernel_of<Float16>(*rows); break;
        case DERTA_FLOAT32: kernel = kernel_of<float>(*rows); break;
        default: return "unknown dtype";
    }
    if (kernel == nullptr) return "unknown stage";
    if (rows->columns != 2 && rows->columns != 3) return "rows have two tokens or three";
    if (rows->count == 0) return nullptr;
    if (rows->count > INT32_MAX) return "more rows than a grid has blocks";
    const int64_t warps = std::min<int64_t>(rows->vocabulary / 256 + 1, kMaxThreads / kWarp);
    cudaError_t error = cudaSetDevice(device);
    if (error != cudaSuccess) return message(error);
    kernel<<<static_cast<unsigned>(rows->count), static_cast<unsigned>(warps * kWarp), 0,
             static_cast<cudaStream_t>(stream)>>>(*rows);
    return message(cudaGetLastError());
}

const char *derta_row_pass_cuda_unavailable(int device) {
    cudaError_t error = cudaSetDevice(device);
    cudaFuncAttributes attributes;  // available only if the kernel can be loaded
    if (error == cudaSuccess) error = 
        error = cudaFuncGetAttributes(&attributes, row_pass<DERTA_WHOLE, false, float>);
    return message(error);
}
