/* The row pass of the head loss behind a plain C interface: no torch, no C++ in the signatures.
 * The mathematics is in kernels/README.md.
 *
 * Every function that can fail returns NULL, or an error message in static memory. */
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define DERTA_API __attribute__((visibility("default")))

enum { DERTA_BFLOAT16 = 0, DERTA_FLOAT16 = 1, DERTA_FLOAT32 = 2 };

/* Both walks over whole rows, or one of them over a shard: consecutive logits of every row. The
 * first walk writes the shard's summary and leaves the logits as they are. The summaries of all
 * shards are then merged, and the second walk reads the result. */
enum { DERTA_WHOLE = 0, DERTA_FIRST_WALK = 1, DERTA_SECOND_WALK = 2 };

/* C rows of V logits, and what to compute from them. */
struct DertaRows {
    void *logits;              /* (C, V) of dtype; with form_gradient overwritten by the gradient */
    int64_t count;             /* C */
    int64_t vocabulary;        /* V, at least 1; of a shard its own logits, at least 0 */
    int64_t columns;           /* K, tokens of a row: 2 to say and, if 3, one not to say */
    int64_t row_stride;        /* in logits, at least V; rows may start at any logit */
    const int64_t *tokens;     /* (C, K), within [0, V); -1 for a token of another shard */
    const float *token_weight; /* (C, K); unused by the first walk, as are the next two */
    float *logsumexp;          /* (C,) */
    float *nll;                /* (C, K): -log p(token), for the third -log(1 - p(token)) */
    float *summary;            /* (C, 3 + K), only of shards: the highest logit m, how many terms
                                  exp(z - m) are 1, the sum of the others, and the tokens' logits,
                                  -inf for a token of another shard */
    float softcap;             /* 0: none */
    float logit_scale;
    int32_t dtype; /* DERTA_* */
    int32_t form_gradient;
    int32_t stage; /* DERTA_WHOLE, DERTA_FIRST_WALK or DERTA_SECOND_WALK */
};

/* sizeof(struct DertaRows), by which a caller knows a library that was built from other sources. */
DERTA_API int64_t derta_row_pass_rows_bytes(void);

/* Runs on the CPU, with at most `threads` threads. `instruction_set` is one of those below, or NULL
 * for the best. Results do not depend on the number of threads. */
DERTA_API const char *derta_row_pass(const struct DertaRows *rows, const char *instruction_set,
                                     int threads);

/* Returns the instruction sets that this machine runs, separated by spaces, the best one last. */
DERTA_API const char *derta_row_pass_instruction_sets(void);

/* Queues the row pass on `stream`, a cudaStream_t of the CUDA device. It is in a library of its
 * own, so that the CPU library needs no CUDA. */
DERTA_API const char *derta_row_pass_cuda(const struct DertaRows *rows, int device, void *stream);

/* Returns why the CUDA row pass cannot run on a device, or NULL if it can. */
DERTA_API const char *derta_row_pass_cuda_unavailable(int device);

#ifdef __cplusplus
}
#endif
